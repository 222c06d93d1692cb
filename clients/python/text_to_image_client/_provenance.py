"""Metadata that was kept: the requests that make its images again, and what differs since."""

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
    """How the images of one answer were made, from its metadata: `Result.metadata`, or a file of it.

    made = Provenance.load("cat.json")
    result = client.generate(**made.request())
    print(made.differences(result) or "the same bytes")

    What grpcurl prints of Generate is taken, too. Raises InvalidRequest for anything that is no such metadata.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        message = _parsed(metadata)
        if not message.images:
            raise InvalidRequest("the metadata has no images, which a service always tells")
        for index, image in enumerate(message.images):
            if not image.request.parameter.HasField("seed"):
                raise InvalidRequest(f"image {index} of the metadata lacks its request; was it made by an old service?")
        self.fingerprint = message.fingerprint
        """SHA-256 of the weights and configuration that were served, in hex."""
        self.environment = read_environment(message.environment)
        self.requests = tuple(read_request(image.request) for image in message.images)
        """For each image the request that makes it alone."""
        self.sha256 = tuple(image.sha256 for image in message.images)
        """Of each image's bytes, in hex."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that holds metadata as JSON. Raises InvalidRequest, or OSError if it cannot be read."""
        try:
            return cls(json.loads(Path(path).read_text("utf-8")))
        except ValueError as error:  # of JSON, and of text that is none
            raise InvalidRequest(f"{path} is not JSON: {error}") from error
        except InvalidRequest as error:
            raise InvalidRequest(f"{path}: {error}") from error

    def request(
        self, image: int | None = None, *, prompt: str | None = None, **changes: Unpack[GenerateOptions]
    ) -> Request:
        """The request for all images at once, or for image number `image`, from 0, with some options changed.

        Another aspect ratio takes the place of width and height, another format that of the quality as well.
        """
        asked = self._of_all() if image is None else self._of(image)
        changed = {name: value for name, value in {"prompt": prompt, **changes}.items() if value is not None}
        replaced: set[str] = set()
        if "aspect_ratio" in changed:
            replaced |= {"width", "height"}
        if changed.get("format") not in (None, asked.get("format")):
            replaced |= {"quality"}
        return cast("Request", {name: value for name, value in asked.items() if name not in replaced} | changed)

    def differences(self, result: Result) -> tuple[str, ...]:
        """What differs with `result`, each in a few words: "torch: 2.13.0 then, 2.14.0 now".

        That is what it was made by, and the bytes of each image that was asked for as it was then.
        """
        then, now = (_facts(each.fingerprint, each.environment) for each in (self, result))
        if then["weights"] != now["weights"]:
            del then["reference image"], now["reference image"]  # which other weights draw otherwise, of course
        found = [
            f"{name}: {_short(then.get(name))} then, {_short(now.get(name))} now"
            for name in dict.fromkeys((*then, *now))
            if then.get(name) != now.get(name)
        ]
        if not found and self.environment.fingerprint != result.environment.fingerprint:
            found.append("environment: in something that this client is too old to name")
        for index, (request, sha256) in enumerate(zip(self.requests, self.sha256, strict=True)):
            again = {image.sha256 for image in result.images if image.request == request}
            if again - {sha256}:
                found.append(f"image {index}: other bytes")
        return tuple(found)

    def _of(self, image: int) -> Request:
        if not 0 <= image < len(self.requests):
            raise InvalidRequest(f"there is no image {image} in the metadata, {_numbers(self.requests)}")
        return self.requests[image]

    def _of_all(self) -> Request:
        first = self.requests[0]
        for index, request in enumerate(self.requests):
            if request != {**first, "seed": (cast("int", first["seed"]) + index) % 2**32}:
                raise InvalidRequest(
                    f"the images of the metadata differ in more than their seeds; choose one, {_numbers(self.requests)}"
                )
        return cast("Request", {**first, "n": len(self.requests)})


def _parsed(metadata: Mapping[str, Any]) -> pb.Metadata:
    if isinstance(metadata, Mapping) and "metadata" in metadata:  # a whole answer
        metadata = metadata["metadata"]
    if not isinstance(metadata, Mapping):
        raise InvalidRequest("metadata is a JSON object, as `t2i generate --metadata` writes it")
    try:
        return json_format.ParseDict(dict(metadata), pb.Metadata())
    except json_format.ParseError as error:
        reason = str(error).splitlines()[0]
        raise InvalidRequest(f"this is not the metadata of an answer: {reason}") from error


def _numbers(requests: tuple[Request, ...]) -> str:
    return f"0 to {len(requests) - 1}" if len(requests) > 1 else "only image 0"


def _facts(fingerprint: str, environment: Environment) -> dict[str, str]:
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


def _short(fact: str | None) -> str:
    if not fact:
        return "none"
    return f"{fact[:12]}..." if len(fact) == 64 else fact  # a digest
