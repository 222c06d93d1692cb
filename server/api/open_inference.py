"""The service's second face, for KServe: the Open Inference Protocol, version 2.

Tensors and parameters become requests of our own contract, one for each prompt, and go the way of these: the same
checks, jobs, statuses and limits. Their answers become tensors.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf import json_format

from server import __version__
from server.api import auth, contract
from server.api.contract import InvalidRequest, ParsedRequest, UnknownModel, Violation
from server.api.images import ImageTooLarge
from server.domain import ModelInfo, Notice
from server.servicer import Context, TextToImageServicer
from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb

_VERSION = "1"
_PLATFORM = "pytorch_diffusers"

# Inputs, each also a parameter of the request: where it stands in a GenerateRequest, and the datatype that is told.
_INPUTS = {
    "prompt": ("data.prompt", "BYTES"),
    "negative_prompt": ("parameter.negative_prompt", "BYTES"),
    "aspect_ratio": ("parameter.aspect_ratio", "BYTES"),
    "n": ("parameter.n", "UINT32"),
    "seed": ("parameter.seed", "UINT32"),
    "steps": ("sampling.steps", "UINT32"),
    "guidance_scale": ("sampling.guidance_scale", "FP64"),
    "high_noise_frac": ("sampling.high_noise_frac", "FP64"),
    "scheduler": ("sampling.scheduler", "BYTES"),
    "width": ("sampling.width", "UINT32"),
    "height": ("sampling.height", "UINT32"),
    "format": ("output.format", "BYTES"),
    "quality": ("output.quality", "UINT32"),
    "max_message_bytes": ("output.max_message_bytes", "UINT32"),
}
_PARAMETERS = ("timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output")
"""Parameters of a request that are no inputs, with Triton's meanings (its schedule policy and sequence extensions)."""
_OF_ALL = ("n", "max_message_bytes")  # which decide the shape of the one answer to all prompts
_OUTPUTS = {
    "image": ("BYTES", 2),
    "finish_reason": ("BYTES", 2),
    "seed": ("UINT32", 2),
    "metadata": ("BYTES", 1),
}  # with the number of their dimensions: prompts, and images of each

# Where the elements of a datatype stand when they are not raw, and what they are when they are.
_DATATYPES = {
    "BOOL": ("bool_contents", "?"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP16": (None, "<f2"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", None),
}

# Kept free of images for the metadata, which as JSON is longer than our contract reckons with.
_JSON_BYTES, _JSON_BYTES_PER_IMAGE = 4096, 2048

_LONGEST_ECHO = 64  # characters of what is not known here
_LOWEST = 5  # of the protocol's priority levels; all below it are the same here

_NO_SHARED_MEMORY = "must be in the message itself: shared memory is not used here"
_NO_PARAMETERS = "must be without parameters of its own, of which none is known here"

_Value = str | int | float


class _Malformed(Exception):
    """A tensor does not hold what it says."""


class OpenInferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """Serves what `first`, the face of our own contract, serves."""

    def __init__(self, first: TextToImageServicer) -> None:
        self._first = first

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=self._first.ready)

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:
        ready = self._first.ready
        if ready:
            info, _ = self._first.model(auth.caller_of(context))
            ready = _is_served(info, request.name, request.version)
        return oip.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: oip.ServerMetadataRequest, context: Context) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(
            name="text-to-image-service", version=__version__, extensions=["schedule_policy"]
        )

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Context) -> oip.ModelMetadataResponse:
        async with self._first.statuses("ModelMetadata", None, context):
            info, _ = self._first.model(auth.caller_of(context))
            _check_served(info, request.name, request.version)
            tensor = oip.ModelMetadataResponse.TensorMetadata
            return oip.ModelMetadataResponse(
                name=info.name,
                versions=[_VERSION],
                platform=_PLATFORM,
                inputs=[tensor(name=name, datatype=datatype, shape=[-1]) for name, (_, datatype) in _INPUTS.items()],
                outputs=[
                    tensor(name=name, datatype=datatype, shape=[-1] * rank)
                    for name, (datatype, rank) in _OUTPUTS.items()
                ],
            )

    async def ModelInfer(self, request: oip.ModelInferRequest, context: Context) -> oip.ModelInferResponse:
        request_id = contract.request_id_of(pb.GenerateRequest(request_id=contract.safe_name(request.id)))
        async with self._first.statuses("ModelInfer", request_id, context):
            caller = auth.caller_of(context)
            info, limits = self._first.model(caller)
            _check_served(info, request.model_name, request.model_version)
            batch = read(request, limits.max_images)
            tasks = self._first.parse_all(batch.requests, request_id, caller, batch.name_of, "n", batch.unreadable)
            echoed = len(request.id.encode())
            asked = [
                (each, _with_level(_shared(task, len(tasks), echoed), each.priority))
                for each, task in zip(batch.requests, tasks, strict=True)
            ]
            answers = await self._first.answer_all(asked, info, caller, context, batch.timeout)
            return response(request, answers, batch.max_message_bytes)


def _shared(task: ParsedRequest, prompts: int, echoed: int) -> ParsedRequest:
    """The task with its share of the room that one message has for so many prompts, and `echoed` bytes."""
    room = (task.output.max_message_bytes - echoed) // prompts
    share = room - _JSON_BYTES - _JSON_BYTES_PER_IMAGE * len(task.image.seeds)
    return dataclasses.replace(task, output=dataclasses.replace(task.output, max_message_bytes=max(0, share)))


def _with_level(task: ParsedRequest, priority: int) -> ParsedRequest:
    """The task with its warning of a lowered `priority` in the protocol's levels."""
    lowered = f"level {_level(priority)} became {_level(task.priority)}, the highest that is allowed here"
    warnings = (
        dataclasses.replace(each, message=lowered) if each.notice is Notice.PRIORITY_LOWERED else each
        for each in task.warnings
    )
    return dataclasses.replace(task, warnings=tuple(warnings))


def _level(priority: int) -> int:
    """The protocol's level for a priority of our own contract, -2 to 2, and the way back. 1 is the highest level."""
    return 3 - priority


def _is_served(info: ModelInfo, name: str, version: str) -> bool:
    return name == info.name and version in ("", _VERSION)


def _check_served(info: ModelInfo, name: str, version: str) -> None:
    if not _is_served(info, name, version):
        raise UnknownModel(f'"{info.name}", version {_VERSION}, is the model that is served here')


# From tensors to requests.


@dataclass(frozen=True)
class Batch:
    """The requests of all prompts, which inputs had a value for each, and how many seconds all may take together.

    `unreadable` is what is wrong with the message itself.
    """

    requests: Sequence[pb.GenerateRequest]
    each: frozenset[str]
    timeout: float = math.inf
    unreadable: Sequence[Violation] = ()

    @property
    def max_message_bytes(self) -> int:
        output = self.requests[0].output
        return output.max_message_bytes if output.HasField("max_message_bytes") else contract.DEFAULT_MESSAGE_BYTES

    def name_of(self, field: str, places: str) -> str:
        """What this face calls a field of the requests at `places`, such as "0" or "0-2,5"."""
        name = _NAMES.get(field, field)
        return f"{name}[{places}]" if name in self.each else name


def read(message: oip.ModelInferRequest, max_prompts: int) -> Batch:
    """Return the requests that the message makes, and the violations for what cannot be read.

    An input that cannot be read has a value that breaks no rule. Raises InvalidRequest for more parts than are known
    here, and for more than `max_prompts` prompts.
    """
    # What is longer than all that is known here is not looked at, so that what is said of it cannot become long either.
    for part, count, most in (
        ("inputs", len(message.inputs), len(_INPUTS)),
        ("parameters", len(message.parameters), len(_INPUTS) + len(_PARAMETERS)),
        ("outputs", len(message.outputs), len(_OUTPUTS)),
    ):
        if count > most:
            raise InvalidRequest([Violation(part, f"must be at most {most}, are {count}")])
    wrong: list[Violation] = []
    values = dict(_tensors(message, wrong))
    policy: dict[str, _Value] = {}
    for name, parameter in message.parameters.items():
        value = getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
        if name in values:
            wrong.append(Violation(_short(name), "must be an input or a parameter, not both"))
        if name in _PARAMETERS:
            policy[name] = value
        else:
            values[name] = [value]
    timeout, priority = _policy(policy, wrong)
    for name in sorted(values.keys() - _INPUTS.keys()):
        known = (
            "must be a parameter, not an input" if name in _PARAMETERS else "is not known here; ModelMetadata has all"
        )
        wrong.append(Violation(_short(name), known))
        del values[name]
    for output in message.outputs:
        wrong += _output_violations(output)
    prompts = len(values.setdefault("prompt", [""]))
    if prompts > max_prompts:
        wrong.append(Violation("prompt", f"must have at most {max_prompts} elements, has {prompts}"))
        raise InvalidRequest(wrong)
    for name, given in list(values.items()):
        if name in _OF_ALL and len(given) > 1:
            wrong.append(Violation(name, "must have one element, for all prompts"))
        elif len(given) not in (1, prompts):
            wrong.append(Violation(name, f"must have one element, or one for each of {prompts} prompts"))
        else:
            continue
        del values[name]
    each = frozenset(name for name, given in values.items() if len(given) > 1)
    name = contract.safe_name(message.id)
    common = pb.GenerateRequest(request_id=name, priority=priority, output=pb.Output(raw=True))
    requests = [_request(common, {n: v[i % len(v)] for n, v in values.items()}, wrong) for i in range(prompts)]
    if any(violation.field == "prompt" for violation in wrong):
        for request in requests:
            request.data.prompt = contract.UNREADABLE_TEXT
    return Batch(requests, each, timeout, tuple(dict.fromkeys(wrong)))


def _policy(given: dict[str, _Value], wrong: list[Violation]) -> tuple[float, int]:
    """The seconds that the call may take, and its priority in our own contract, from Triton's parameters.

    What is wrong with them is added to `wrong`.
    """
    timeout, priority = given.get("timeout", 0), given.get("priority", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        wrong.append(Violation("timeout", "must be a whole number of microseconds, or 0 for no limit"))
        timeout = 0
    if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
        levels = f"must be 0, the default, or a level: 1 is the highest, {_level(0)} the default, {_LOWEST} the lowest"
        wrong.append(Violation("priority", levels))
        priority = 0
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if given.get(name):
            wrong.append(Violation(name, "must be left out: each image is drawn by itself, there are no sequences"))
    return timeout / 1e6 if timeout else math.inf, _level(min(priority, _LOWEST)) if priority else 0


def _output_violations(output: oip.ModelInferRequest.InferRequestedOutputTensor) -> Iterator[Violation]:
    if output.name not in _OUTPUTS:
        yield Violation(_short(output.name), f"must be one of {', '.join(_OUTPUTS)}")
    for name, parameter in output.parameters.items():
        if name.startswith("shared_memory"):
            yield Violation(_short(output.name), _NO_SHARED_MEMORY)
        elif name == "classification" and parameter.int64_param:
            yield Violation(_short(output.name), "has no classes, so the parameter classification must be left out")
        elif name not in ("classification", "binary_data"):
            yield Violation(_short(output.name), _NO_PARAMETERS)


def _request(common: pb.GenerateRequest, values: dict[str, _Value], wrong: list[Violation]) -> pb.GenerateRequest:
    """A copy of `common` with the values of one prompt."""
    request = pb.GenerateRequest()
    request.CopyFrom(common)
    for name, value in values.items():
        path, datatype = _INPUTS[name]
        kind, words = _KINDS[datatype]
        if not isinstance(value, kind) or isinstance(value, bool):
            wrong.append(Violation(name, f"must be {words}"))
            continue
        *rooms, field = path.split(".")
        room: Any = request
        for each in rooms:
            room = getattr(room, each)
        try:
            setattr(room, field, _format_of(value) if name == "format" else value)
        except ValueError:
            wrong.append(Violation(name, f"cannot be {_short(str(value))}"))
    return request


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "BYTES": ((str,), "text, BYTES"),
    "UINT32": ((int,), "an integer"),
    "FP64": ((int, float), "a number"),
}


def _short(said: str) -> str:
    return said if len(said) <= _LONGEST_ECHO else f"{said[:_LONGEST_ECHO]}..."


def _format_of(value: _Value) -> int:
    """ "jpeg" is FORMAT_JPEG. Raises ValueError."""
    return pb.Format.Value(f"FORMAT_{str(value).upper()}")


def _json_name(path: str) -> str:
    names, message = [], pb.GenerateRequest()
    for name in path.split("."):
        names.append(message.DESCRIPTOR.fields_by_name[name].json_name)
        message = getattr(message, name)
    return ".".join(names)


_NAMES = {_json_name(path): name for name, (path, _) in _INPUTS.items()}


def _tensors(message: oip.ModelInferRequest, wrong: list[Violation]) -> Iterator[tuple[str, list[Any]]]:
    """The inputs by their names, each with its elements. What is wrong with one is added to `wrong`."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        wrong.append(Violation("raw_input_contents", f"must have {len(message.inputs)} entries, one for each input"))
        return
    seen: set[str] = set()
    for place, tensor in enumerate(message.inputs):
        try:
            if tensor.name in seen:
                raise _Malformed("must be given once")
            yield tensor.name, _elements(tensor, raw[place] if raw else None)
        except _Malformed as error:
            wrong.append(Violation(_short(tensor.name), str(error)))
        seen.add(tensor.name)


def _elements(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[Any]:
    """Raises _Malformed."""
    if tensor.datatype not in _DATATYPES:
        raise _Malformed(f"must be of a datatype among {', '.join(_DATATYPES)}")
    if len(tensor.shape) not in (1, 2) or tensor.shape[0] < 1 or tuple(tensor.shape[1:]) not in ((), (1,)):
        raise _Malformed(f"must be of shape [b] or [b, 1], is {_short(str(list(tensor.shape)))}")
    if any(name.startswith("shared_memory") for name in tensor.parameters):
        raise _Malformed(_NO_SHARED_MEMORY)
    if tensor.parameters.keys() - {"binary_data_size"}:
        raise _Malformed(_NO_PARAMETERS)
    contents, raw_type = _DATATYPES[tensor.datatype]
    elements: list[Any]
    if raw is not None and tensor.HasField("contents"):
        raise _Malformed("must be in raw_input_contents or in contents, not both")
    if raw is None and contents is None:
        raise _Malformed(f"must be in raw_input_contents, as {tensor.datatype} has no contents")
    if raw is None:
        elements = list(getattr(tensor.contents, contents or ""))
    elif raw_type is None:
        elements = list(_unpacked(raw))
    elif len(raw) % np.dtype(raw_type).itemsize:
        raise _Malformed(f"must be whole elements of {tensor.datatype}, has {len(raw)} bytes")
    else:
        elements = np.frombuffer(raw, raw_type).tolist()
    if len(elements) != tensor.shape[0]:
        raise _Malformed(f"must have as many elements as its shape says, {tensor.shape[0]}, has {len(elements)}")
    return [_meant(tensor.datatype, element) for element in elements]


def _unpacked(raw: bytes) -> Iterator[bytes]:
    """Elements of BYTES, each with its length before it. Raises _Malformed."""
    place = 0
    while place < len(raw):
        if place + 4 > len(raw) or (end := place + 4 + struct.unpack_from("<I", raw, place)[0]) > len(raw):
            raise _Malformed("must be BYTES, each with its length before it in four bytes, and ends too early")
        yield raw[place + 4 : end]
        place = end


def _meant(datatype: str, element: Any) -> Any:
    """Text for BYTES. The nearest number of few digits for short floats: 0.8 in FP32 should not be 0.800000012."""
    if datatype == "BYTES":
        try:
            return element.decode()
        except UnicodeDecodeError as error:
            raise _Malformed("must be UTF-8") from error
    if datatype in ("FP16", "FP32"):
        return float(str(np.float16(element) if datatype == "FP16" else np.float32(element)))
    return element


# From answers to tensors.


def response(
    request: oip.ModelInferRequest, answers: Sequence[pb.GenerateResponse], max_message_bytes: int
) -> oip.ModelInferResponse:
    """The outputs that were asked for, in the form in which the inputs came. Raises ImageTooLarge."""
    choices = [choice for answer in answers for choice in answer.data.choices]
    elements: dict[str, list[Any]] = {
        "image": [choice.raw for choice in choices],
        "finish_reason": [choice.finish_reason.encode() for choice in choices],
        "seed": [image.seed for answer in answers for image in answer.metadata.images],
        "metadata": [_json(answer.metadata) for answer in answers],
    }
    made = oip.ModelInferResponse(model_name=request.model_name, model_version=_VERSION, id=request.id)
    for name in dict.fromkeys(each.name for each in request.outputs) or _OUTPUTS:
        datatype, rank = _OUTPUTS[name]
        shape = [len(answers), len(choices) // len(answers)][:rank]
        output = made.outputs.add(name=name, datatype=datatype, shape=shape)
        contents, raw_type = _DATATYPES[datatype]
        if not request.raw_input_contents:
            getattr(output.contents, contents or "").extend(elements[name])
        elif raw_type is None:
            made.raw_output_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in elements[name]))
        else:
            made.raw_output_contents.append(np.array(elements[name], raw_type).tobytes())
    if made.ByteSize() > max_message_bytes:
        raise ImageTooLarge(
            f"the answer does not fit into {max_message_bytes} bytes; raise max_message_bytes, ask for fewer images at "
            "once, or leave out the output metadata"
        )
    return made


def _json(metadata: pb.Metadata) -> bytes:
    return json_format.MessageToJson(metadata, indent=None, ensure_ascii=False).encode()
