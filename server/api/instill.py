"""The two services of Instill: the one by which Core calls its models, and Core's public API.

Both have inputs and outputs of TASK_TEXT_TO_IMAGE. Each input becomes a request of our own contract, with the same
checks, jobs, statuses and limits.
"""

import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from google.protobuf.struct_pb2 import Struct, Value

from server.api import auth, requests
from server.api.errors import InvalidRequest, UnknownModel, Violation
from server.api.frontend import Frontend
from server.api.grpc_calls import Context, answering, send_admitted, timeout_of
from server.stubs.model_model_v1alpha import model_public_pb2 as public
from server.stubs.model_model_v1alpha import model_public_pb2_grpc as public_grpc
from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb

log = logging.getLogger(__name__)

MESSAGE_BYTES = 64 * 1024 * 1024
"""The size limit of these services' messages, either way: Core cannot ask for less, and raises its own limits."""

_KEYS = {"data": {"prompt", "model"}, "parameter": {"aspect-ratio", "negative-prompt", "n", "seed"}}
"""The keys of Instill's schema. Python users write "_" for "-", which is accepted too."""
_WHOLE_NUMBER = re.compile(r" *[0-9]{1,10}(\.0*)? *", re.ASCII)
_MAX_LOGGED_KEYS, _MAX_LOGGED_CHARACTERS = 8, 64  # unknown keys of a call that are logged, and characters of each


class InstillServicer(user_defined_grpc.UserDefinedServiceServicer):
    """Serves the Frontend's model to Core."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def __call__(self, request: user_defined.CallRequest, context: Context) -> user_defined.CallResponse:
        outputs = await _outputs(self._frontend, "__call__", request.task_inputs, context)
        return user_defined.CallResponse(task_outputs=outputs)


class ModelPublicServicer(public_grpc.ModelPublicServiceServicer):
    """Serves the Frontend's model to clients of Core's public API, without Core."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Liveness(self, request: public.LivenessRequest, context: Context) -> public.LivenessResponse:
        return public.LivenessResponse(health_check_response=_health(True))

    async def Readiness(self, request: public.ReadinessRequest, context: Context) -> public.ReadinessResponse:
        return public.ReadinessResponse(health_check_response=_health(self._frontend.ready))

    async def TriggerNamespaceModel(
        self, request: public.TriggerNamespaceModelRequest, context: Context
    ) -> public.TriggerNamespaceModelResponse:
        outputs = await _outputs(
            self._frontend, "TriggerNamespaceModel", request.task_inputs, context, request.model_id
        )
        return public.TriggerNamespaceModelResponse(task=public.TASK_TEXT_TO_IMAGE, task_outputs=outputs)

    async def TriggerNamespaceLatestModel(
        self, request: public.TriggerNamespaceLatestModelRequest, context: Context
    ) -> public.TriggerNamespaceLatestModelResponse:
        outputs = await _outputs(
            self._frontend, "TriggerNamespaceLatestModel", request.task_inputs, context, request.model_id
        )
        return public.TriggerNamespaceLatestModelResponse(task=public.TASK_TEXT_TO_IMAGE, task_outputs=outputs)


async def _outputs(
    frontend: Frontend, method: str, inputs: Sequence[Struct], context: Context, model: str | None = None
) -> list[Struct]:
    """Return the outputs of a call's inputs, in their order. A `model` other than the served one is UnknownModel."""
    request_id = requests.request_id_of(pb.GenerateRequest())
    async with answering(frontend, method, request_id, context):
        caller = auth.caller_of(context)
        info, limits = frontend.model(caller)
        if model not in (None, info.name):
            raise UnknownModel(f'"{info.name}" is the model that is served here')
        messages, violations = read(inputs, limits.max_images)
        batch = frontend.parse_batch(
            messages,
            request_id,
            caller,
            name_of=name_of,
            count_field="task_inputs",
            violations=violations,
            timeout=timeout_of(context),
        )
        shares = [requests.with_message_bytes(parsed, MESSAGE_BYTES // len(batch)) for parsed in batch]
        return [output(each) for each in await frontend.answer(shares, partial(send_admitted, context))]


def _health(serving: bool) -> public.HealthCheckResponse:
    status = public.HealthCheckResponse
    return status(status=status.SERVING_STATUS_SERVING if serving else status.SERVING_STATUS_NOT_SERVING)


def name_of(field: str, indices: str) -> str:
    """Return these services' name for a field of the requests at `indices`, such as "0" or "0-2,5"."""
    return f"task_inputs[{indices}].{field}"


# From inputs to requests.


def read(inputs: Sequence[Struct], max_inputs: int) -> tuple[list[pb.GenerateRequest], list[Violation]]:
    """Return the requests that the inputs stand for, and the violations of their unreadable fields.

    An unreadable field gets a value that breaks no rule. Raises InvalidRequest for more than `max_inputs` inputs.
    """
    if len(inputs) > max_inputs:
        raise InvalidRequest([Violation("task_inputs", f"must be at most {max_inputs}, are {len(inputs)}")])
    found: dict[Violation, list[int]] = {}
    unknown: list[str] = []
    messages = []
    for index, struct in enumerate(inputs):
        violations: list[Violation] = []
        messages.append(_request(struct, violations, unknown))
        for each in violations:
            found.setdefault(each, []).append(index)
    if unknown:
        shown = ", ".join(repr(each[:_MAX_LOGGED_CHARACTERS]) for each in unknown[:_MAX_LOGGED_KEYS])
        log.warning("ignored keys of the task's inputs, %d that are not known here: %s", len(unknown), shown)
    return messages, requests.violations_of_batch(found, name_of)


def _request(struct: Struct, violations: list[Violation], unknown: list[str]) -> pb.GenerateRequest:
    """Return the request of one input. Adds its errors to `violations` and keys without a meaning to `unknown`."""
    objects: dict[str, dict[str, Value]] = {}
    for name, value in _non_null(struct):
        if name not in _KEYS:
            unknown.append(name)
        elif value.WhichOneof("kind") != "struct_value":
            violations.append(Violation(name, "must be an object"))
        else:
            objects[name] = _known(name, value.struct_value, violations, unknown)
    data, parameter = objects.get("data", {}), objects.get("parameter", {})
    request = pb.GenerateRequest(parameter=pb.TaskParameter(n=1, seed=0), output=pb.Output(format=pb.FORMAT_JPEG_RGB))
    if "prompt" in data:
        request.data.prompt = _text("data.prompt", data["prompt"], violations) or ""
    if any(each.field in ("data", "data.prompt") for each in violations):
        request.data.prompt = requests.UNREADABLE_TEXT
    if "aspect-ratio" in parameter:
        ratio = _text("parameter.aspect-ratio", parameter["aspect-ratio"], violations)
        if ratio is not None:
            request.parameter.aspect_ratio = ratio
    if "negative-prompt" in parameter:
        negative = _text("parameter.negative-prompt", parameter["negative-prompt"], violations)
        request.parameter.negative_prompt = negative or ""
    if "n" in parameter:
        request.parameter.n = _integer("parameter.n", parameter["n"], violations) or 1
    if "seed" in parameter:
        request.parameter.seed = _integer("parameter.seed", parameter["seed"], violations)
    return request


def _known(name: str, struct: Struct, violations: list[Violation], unknown: list[str]) -> dict[str, Value]:
    """Return the values of the object `name` by their keys, as the schema spells them."""
    known: dict[str, Value] = {}
    for key, value in _non_null(struct):
        spelled = key.replace("_", "-")
        if spelled not in _KEYS[name]:
            unknown.append(f"{name}.{key}")
        elif known.setdefault(spelled, value) != value:
            both = f"is given twice, as {spelled} and {spelled.replace('-', '_')}, with different values; leave one out"
            violations.append(Violation(f"{name}.{spelled}", both))
            del known[spelled]
    return known


def _non_null(struct: Struct) -> Iterator[tuple[str, Value]]:
    """Yield the keys with a value. Clients in typed languages send null for a key that they leave out."""
    for key, value in struct.fields.items():
        if value.WhichOneof("kind") not in (None, "null_value"):
            yield key, value


def _text(field: str, value: Value, violations: list[Violation]) -> str | None:
    if value.WhichOneof("kind") == "string_value":
        return value.string_value
    violations.append(Violation(field, "must be a string"))
    return None


def _integer(field: str, value: Value, violations: list[Violation]) -> int:
    """Read a whole number: a double, the only number of a Struct, or text, which forms and templates send."""
    number = value.number_value if value.WhichOneof("kind") == "number_value" else math.nan
    if _WHOLE_NUMBER.fullmatch(value.string_value):
        number = float(value.string_value)
    if not number.is_integer() or not 0 <= number < 2**32:
        violations.append(Violation(field, "must be a whole number of 0 to 4294967295"))
        return 0
    return int(number)


# From answers to outputs.


def output(answer: pb.GenerateResponse) -> Struct:
    """Return the task's output with the fields of Instill's schema, and no other."""
    struct = Struct()
    struct.update({"data": {"choices": list(_choices(answer.data.choices))}})
    return struct


def _choices(choices: Iterable[pb.Choice]) -> Iterator[dict[str, str]]:
    for choice in choices:
        yield {"finish-reason": choice.finish_reason, "image": choice.image}
