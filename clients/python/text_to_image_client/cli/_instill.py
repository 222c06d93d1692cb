"""Parse the input of `t2i run -i`: Instill AI's TASK_TEXT_TO_IMAGE as JSON, with all errors reported at once."""

import json
from collections.abc import Callable
from typing import Any

from .._exceptions import FieldViolation, InvalidRequest
from .._types import GenerateOptions

SHAPES = (
    '{"prompt": "..."} or {"data": {"prompt", "model"?}, '
    '"parameter"?: {"aspect-ratio"?, "negative-prompt"?, "n"?, "seed"?}}'
)


def parse_input(text: str) -> tuple[str, GenerateOptions]:
    """Return the prompt and the options of an Instill task input, in its short or its full form.

    Raises InvalidRequest with every field that is missing, unknown or of the wrong type.
    """
    task = _parse_json(text)
    violations: list[FieldViolation] = []
    if "prompt" in task and "data" not in task:
        fields = _read(task, "", {"prompt": _string}, violations)
    else:
        parts = _read(task, "", {"data": _object, "parameter": _object}, violations)
        fields = _read(parts.get("data", {}), "data.", {"prompt": _string, "model": _string}, violations)
        fields |= _read(
            parts.get("parameter", {}),
            "parameter.",
            {"aspect-ratio": _string, "negative-prompt": _string, "n": _integer, "seed": _integer},
            violations,
        )
        if "data" not in task:
            violations.append(FieldViolation("data", "is missing"))
        elif "data" in parts and "prompt" not in parts["data"]:
            violations.append(FieldViolation("data.prompt", "is missing"))
    if violations:
        raise InvalidRequest(f"the input must be {SHAPES}", violations=tuple(violations))
    prompt: str = fields.pop("prompt")
    options: GenerateOptions = {}
    for name, value in fields.items():
        options[name.replace("-", "_")] = value  # type: ignore[literal-required] # checked by name above
    return prompt, options


def _parse_json(text: str) -> dict[str, Any]:
    try:
        task = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the input is not JSON: {error}") from error
    if not isinstance(task, dict):
        raise InvalidRequest(f"the input must be {SHAPES}, not {text.strip()[:40]}")
    return task


def _read(
    given: dict[str, Any],
    prefix: str,
    readers: dict[str, Callable[[Any], Any]],
    violations: list[FieldViolation],
) -> dict[str, Any]:
    """Return the values of `given` that `readers` accept, and add a violation for every other field."""
    values: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("_", "-")  # the service accepts aspect_ratio as well as aspect-ratio
        if name not in readers:
            violations.append(FieldViolation(prefix + key, f"is unknown; the known fields are {', '.join(readers)}"))
            continue
        if key != name and given.get(name, value) != value:
            both = f"has different values as {name} and as {key}; leave one out"
            violations.append(FieldViolation(prefix + name, both))
        try:
            values[name] = readers[name](value)
        except TypeError as error:
            violations.append(FieldViolation(prefix + name, str(error)))
    return values


def _string(value: Any) -> str:
    if isinstance(value, str):
        return value
    raise TypeError(f"must be a string, not {json.dumps(value)}")


def _integer(value: Any) -> int:
    # JSON has one number type, and Instill Core sends integers as doubles.
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    raise TypeError(f"must be a whole number, not {json.dumps(value)}")


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise TypeError(f"must be an object, not {json.dumps(value)}")
