"""Saved metadata: the requests that reproduce its images, and the differences of a new result."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack, cast

from google.protobuf import json_format

from ._exceptions import InvalidRequest
from ._messages import read_environment, read_request
from ._types import Environment, GenerateOptions, Request, Result
from .v1 import text_to_image_pb2 as pb

__all__ = ["Provenance"]


class Provenance:
    """The requests and the environment behind the images of one answer, from `Result.metadata` or a file of it.

    saved = Provenance.load("cat.json")
    result = client.generate(**saved.request())
    print(saved.differences(result) or "the same bytes")

    A whole answer of Generate, as grpcurl prints it, is accepted, too. Raises InvalidRequest for other input.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        message = _parsed(metadata)
        if not message.images:
            raise InvalidRequest("the metadata has no images")
        for index, image in enumerate(message.images):
            if not image.request.parameter.HasField("seed"):
                raise InvalidRequest(f"image {index} of the metadata lacks its request; is it of an old service?")
        self.fingerprint = message.fingerprint
        """SHA-256 of the served weights and configuration, in hex."""
        self.environment = read_environment(message.environment)
        self.requests = tuple(read_request(image.request) for image in message.images)
        """For each image, the request that reproduces it alone."""
        self.sha256 = tuple(image.sha256 for image in message.images)
        """For each image, the SHA-256 of its bytes, in hex."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON file of metadata. Raises InvalidRequest, or OSError if it cannot be read."""
        try:
            return cls(json.loads(Path(path).read_text("utf-8")))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise InvalidRequest(f"{path} is not JSON: {error}") from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error}") from error

    def request(
        self, image: int | None = None, *, prompt: str | None = None, **changes: Unpack[GenerateOptions]
    ) -> Request:
        """Return the request for all images, or for image `image` counted from 0, with some options changed.

        A new aspect ratio removes width and height. A new format removes the quality.
        """
        saved = self._request_of_all() if image is None else self._request_of(image)
        changed = {name: value for name, value in {"prompt": prompt, **changes}.items() if value is not None}
        removed: set[str] = set()
        if "aspect_ratio" in changed:
            removed |= {"width", "height"}
        if changed.get("format") not in (None, saved.get("format")):
            removed |= {"quality"}
        return cast("Request", {name: value for name, value in saved.items() if name not in removed} | changed)

    def differences(self, result: Result) -> tuple[str, ...]:
        """Return the differences of `result`, one line each: "torch: 2.13.0 then, 2.14.0 now".

        They cover the weights, the environment, and the bytes of every image whose request is the same as then.
        """
        then, now = (_properties(each.fingerprint, each.environment) for each in (self, result))
        if then["weights"] != now["weights"]:
            del then["reference image"], now["reference image"]  # other weights always change it
        found = [
            f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now"
            for name in dict.fromkeys((*then, *now))
            if then.get(name) != now.get(name)
        ]
        if not found and self.environment.fingerprint != result.environment.fingerprint:
            found.append("environment: in a field that this client is too old to know")
        for index, (request, sha256) in enumerate(zip(self.requests, self.sha256, strict=True)):
            new = {image.sha256 for image in result.images if image.request == request}
            if new - {sha256}:
                found.append(f"image {index}: other bytes")
        return tuple(found)

    def _request_of(self, image: int) -> Request:
        if not 0 <= image < len(self.requests):
            raise InvalidRequest(f"there is no image {image} in the metadata, {_numbers(self.requests)}")
        return self.requests[image]

    def _request_of_all(self) -> Request:
        first = self.requests[0]
        for index, request in enumerate(self.requests):
            if request != {**first, "seed": (cast("int", first["seed"]) + index) % 2**32}:
                raise InvalidRequest(
                    f"the images of the metadata differ in more than their seeds; choose one, {_numbers(self.requests)}"
                )
        return cast("Request", {**first, "n": len(self.requests)})


def _parsed(metadata: Mapping[str, Any]) -> pb.Metadata:
    if isinstance(metadata, Mapping) and "metadata" in metadata:  # a whole GenerateResponse
        metadata = metadata["metadata"]
    if not isinstance(metadata, Mapping):
        raise InvalidRequest("metadata must be a JSON object, as `t2i generate --metadata` writes it")
    try:
        return json_format.ParseDict(dict(metadata), pb.Metadata())
    except json_format.ParseError as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"this is not the metadata of an answer: {reason}") from error


def _numbers(requests: tuple[Request, ...]) -> str:
    return f"0 to {len(requests) - 1}" if len(requests) > 1 else "only image 0"


def _properties(fingerprint: str, environment: Environment) -> dict[str, str]:
    return {
        "weights": fingerprint,
        **environment.versions,
        "hardware": environment.hardware,
        "precision": environment.precision,
        "fp32 math": environment.fp32_math,
        "threads": str(environment.threads),
        "largest batch": str(environment.max_batch),
        "compiled": environment.compiled,
        "reference image": environment.reference,
    }


def _short(value: str | None) -> str:
    if not value:
        return "none"
    return f"{value[:12]}..." if len(value) == 64 else value  # a SHA-256
