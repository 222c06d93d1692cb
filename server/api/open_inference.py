"""The Open Inference Protocol, version 2, which KServe and Triton speak.

Tensors and parameters become requests of our own contract, one for each prompt, with the same checks, jobs, statuses
and limits. The answers become tensors.
"""

import dataclasses
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from google.protobuf import json_format

from server import __version__
from server.api import auth, requests
from server.api.errors import InvalidRequest, UnknownModel, Violation
from server.api.frontend import Frontend
from server.api.grpc_calls import Context, answering, send_admitted, timeout_of
from server.api.images import ImageTooLarge
from server.api.requests import ParsedRequest
from server.domain import ModelInfo, Notice, sanitized_request_id
from server.stubs.inference_v2 import open_inference_pb2 as oip
from server.stubs.inference_v2 import open_inference_pb2_grpc as oip_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb

_VERSION = "1"
_PLATFORM = "pytorch_diffusers"

# The inputs, each also accepted as a parameter: the path of its field in a GenerateRequest, and its datatype.
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
"""Parameters that are not inputs. They mean what they do in Triton's schedule policy and sequence extensions."""
_CALL_WIDE_INPUTS = ("n", "max_message_bytes")  # they decide the shape of the one answer to all prompts
_OUTPUTS = {
    "image": ("BYTES", 2),
    "finish_reason": ("BYTES", 2),
    "seed": ("UINT32", 2),
    "metadata": ("BYTES", 1),
}  # datatype and rank; the dimensions are prompts, and images of each

# By datatype: the field of InferTensorContents, and NumPy's dtype of raw contents.
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

# Reserved in a message for the metadata: as JSON it is longer than requests.max_image_bytes assumes.
_JSON_BYTES, _JSON_BYTES_PER_IMAGE = 4096, 2048

_MAX_ECHO = 64  # characters of a caller's own text in an error
_LOWEST_LEVEL = 5  # of the protocol's priorities; all lower ones are the same here

_NO_SHARED_MEMORY = "must be in the message itself: shared memory is not used here"
_NO_PARAMETERS = "must be without parameters of its own, of which none is known here"

_Value = str | int | float


class _Malformed(Exception):
    """A tensor does not hold what it declares."""


class OpenInferenceServicer(oip_grpc.GRPCInferenceServiceServicer):
    """Serves the Frontend's model."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=self._frontend.ready)

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:
        ready = self._frontend.ready
        if ready:
            info, _ = self._frontend.model(auth.caller_of(context))
            ready = _is_served(info, request.name, request.version)
        return oip.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: oip.ServerMetadataRequest, context: Context) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(
            name="text-to-image-service", version=__version__, extensions=["schedule_policy"]
        )

    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Context) -> oip.ModelMetadataResponse:
        async with answering(self._frontend, "ModelMetadata", None, context):
            info, _ = self._frontend.model(auth.caller_of(context))
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
        request_id = requests.request_id_of(pb.GenerateRequest(request_id=sanitized_request_id(request.id)))
        async with answering(self._frontend, "ModelInfer", request_id, context):
            caller = auth.caller_of(context)
            info, limits = self._frontend.model(caller)
            _check_served(info, request.model_name, request.model_version)
            call = read(request, limits.max_images)
            batch = self._frontend.parse_batch(
                call.messages,
                request_id,
                caller,
                name_of=call.name_of,
                count_field="n",
                violations=call.violations,
                timeout=timeout_of(context, call.timeout),
            )
            available = call.max_message_bytes - len(request.id.encode())  # the answer repeats the id
            shares = [_with_level(_with_share(parsed, available // len(batch))) for parsed in batch]
            answers = await self._frontend.answer(shares, partial(send_admitted, context))
            return response(request, answers, call.max_message_bytes)


def _with_share(parsed: ParsedRequest, max_bytes: int) -> ParsedRequest:
    """Return the request with `max_bytes` of the one message for all prompts, its metadata in JSON included."""
    metadata = _JSON_BYTES + _JSON_BYTES_PER_IMAGE * len(parsed.image.seeds)
    return requests.with_message_bytes(parsed, max_bytes - metadata)


def _with_level(parsed: ParsedRequest) -> ParsedRequest:
    """Return the request with the warning of a lowered priority, if any, in the protocol's levels."""
    asked, given = _level(parsed.message.priority), _level(parsed.priority)
    lowered = f"level {asked} became {given}, the highest that is allowed here"
    warnings = (
        dataclasses.replace(each, message=lowered) if each.notice is Notice.PRIORITY_LOWERED else each
        for each in parsed.warnings
    )
    return dataclasses.replace(parsed, warnings=tuple(warnings))


def _level(priority: int) -> int:
    """Convert a priority of our own contract, -2 to 2, to the protocol's level, 1 being the highest, and back."""
    return 3 - priority


def _is_served(info: ModelInfo, name: str, version: str) -> bool:
    return name == info.name and version in ("", _VERSION)


def _check_served(info: ModelInfo, name: str, version: str) -> None:
    if not _is_served(info, name, version):
        raise UnknownModel(f'"{info.name}", version {_VERSION}, is the model that is served here')


# From tensors to requests.


@dataclass(frozen=True)
class InferCall:
    """The requests of a call, one for each prompt, and the terms of all.

    `per_prompt` are the inputs that had a value for each prompt. All requests together may take `timeout` seconds.
    `violations` are what is wrong with the tensors and parameters themselves.
    """

    messages: Sequence[pb.GenerateRequest]
    per_prompt: frozenset[str]
    timeout: float = math.inf
    violations: Sequence[Violation] = ()

    @property
    def max_message_bytes(self) -> int:
        """The size limit of the answer."""
        output = self.messages[0].output
        return output.max_message_bytes if output.HasField("max_message_bytes") else requests.DEFAULT_MESSAGE_BYTES

    def name_of(self, field: str, indices: str) -> str:
        """Return the protocol's name for a field of the requests at `indices`, such as "0" or "0-2,5"."""
        name = _NAMES.get(field, field)
        return f"{name}[{indices}]" if name in self.per_prompt else name


@dataclass
class _Reading:
    """The values read from a message so far, by input, and the violations found on the way."""

    values: dict[str, list[_Value]] = field(default_factory=dict)
    policy: dict[str, _Value] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)

    def reject(self, name: str, description: str) -> None:
        self.violations.append(Violation(name, description))


def read(message: oip.ModelInferRequest, max_prompts: int) -> InferCall:
    """Return the requests that the message stands for, and the violations of its unreadable parts.

    An unreadable input gets a value that breaks no rule. Raises InvalidRequest for more parts than the protocol knows
    here, and for more than `max_prompts` prompts.
    """
    _check_counts(message)
    reading = _Reading()
    _read_inputs(message, reading)
    _read_parameters(message, reading)
    timeout, priority = _policy(reading)
    _drop_unknown_inputs(reading)
    for output in message.outputs:
        reading.violations += _output_violations(output)
    prompts = _check_lengths(reading, max_prompts)
    values = reading.values
    per_prompt = frozenset(name for name, elements in values.items() if len(elements) > 1)
    request_id = sanitized_request_id(message.id)
    common = pb.GenerateRequest(request_id=request_id, priority=priority, output=pb.Output(raw=True))
    messages = [
        _request(common, {name: elements[index % len(elements)] for name, elements in values.items()}, reading)
        for index in range(prompts)
    ]
    if any(violation.field == "prompt" for violation in reading.violations):
        for each in messages:
            each.data.prompt = requests.UNREADABLE_TEXT
    return InferCall(messages, per_prompt, timeout, tuple(dict.fromkeys(reading.violations)))


def _check_counts(message: oip.ModelInferRequest) -> None:
    """Raise InvalidRequest for more parts than the protocol knows here, so that no error becomes long."""
    for part, count, limit in (
        ("inputs", len(message.inputs), len(_INPUTS)),
        ("parameters", len(message.parameters), len(_INPUTS) + len(_PARAMETERS)),
        ("outputs", len(message.outputs), len(_OUTPUTS)),
    ):
        if count > limit:
            raise InvalidRequest([Violation(part, f"must be at most {limit}, are {count}")])


def _read_parameters(message: oip.ModelInferRequest, reading: _Reading) -> None:
    for name, parameter in message.parameters.items():
        value = getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")
        if name in reading.values:
            reading.reject(_short(name), "must be an input or a parameter, not both")
        if name in _PARAMETERS:
            reading.policy[name] = value
        else:
            reading.values[name] = [value]


def _policy(reading: _Reading) -> tuple[float, int]:
    """Return the call's timeout in seconds and its priority in our own contract, from Triton's parameters."""
    policy = reading.policy
    timeout, priority = policy.get("timeout", 0), policy.get("priority", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or timeout < 0:
        reading.reject("timeout", "must be a whole number of microseconds, or 0 for no limit")
        timeout = 0
    if isinstance(priority, bool) or not isinstance(priority, int) or priority < 0:
        levels = f"1 is the highest, {_level(0)} the default, {_LOWEST_LEVEL} the lowest"
        reading.reject("priority", f"must be 0, the default, or a level: {levels}")
        priority = 0
    for name in ("sequence_id", "sequence_start", "sequence_end"):
        if policy.get(name):
            reading.reject(name, "must be left out: each image is drawn by itself, there are no sequences")
    return timeout / 1e6 if timeout else math.inf, _level(min(priority, _LOWEST_LEVEL)) if priority else 0


def _drop_unknown_inputs(reading: _Reading) -> None:
    for name in sorted(reading.values.keys() - _INPUTS.keys()):
        known = (
            "must be a parameter, not an input" if name in _PARAMETERS else "is not known here; ModelMetadata has all"
        )
        reading.reject(_short(name), known)
        del reading.values[name]


def _check_lengths(reading: _Reading, max_prompts: int) -> int:
    """Drop inputs of a wrong length. Return the number of prompts; raise InvalidRequest if there are too many.

    A missing prompt becomes an empty one, which breaks the rule that a prompt is required.
    """
    values = reading.values
    prompts = len(values.setdefault("prompt", [""]))
    if prompts > max_prompts:
        reading.reject("prompt", f"must have at most {max_prompts} elements, has {prompts}")
        raise InvalidRequest(reading.violations)
    for name, elements in list(values.items()):
        if name in _CALL_WIDE_INPUTS and len(elements) > 1:
            reading.reject(name, "must have one element, for all prompts")
        elif len(elements) not in (1, prompts):
            reading.reject(name, f"must have one element, or one for each of {prompts} prompts")
        else:
            continue
        del values[name]
    return prompts


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


def _request(common: pb.GenerateRequest, values: dict[str, _Value], reading: _Reading) -> pb.GenerateRequest:
    """Return a copy of `common` with the values of one prompt."""
    request = pb.GenerateRequest()
    request.CopyFrom(common)
    for name, value in values.items():
        path, datatype = _INPUTS[name]
        kind, words = _KINDS[datatype]
        if not isinstance(value, kind) or isinstance(value, bool):
            reading.reject(name, f"must be {words}")
            continue
        *parents, last = path.split(".")
        parent: Any = request
        for each in parents:
            parent = getattr(parent, each)
        try:
            setattr(parent, last, _format_of(value) if name == "format" else value)
        except ValueError:
            reading.reject(name, f"cannot be {_short(str(value))}")
    return request


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "BYTES": ((str,), "text, BYTES"),
    "UINT32": ((int,), "an integer"),
    "FP64": ((int, float), "a number"),
}


def _short(text: str) -> str:
    return text if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]}..."


def _format_of(value: _Value) -> int:
    """Return the Format of a word: "jpeg" is FORMAT_JPEG. Raises ValueError."""
    return pb.Format.Value(f"FORMAT_{str(value).upper()}")


def _json_name(path: str) -> str:
    """Return the path of a field of GenerateRequest in JSON names."""
    names: list[str] = []
    message: Any = pb.GenerateRequest.DESCRIPTOR
    for name in path.split("."):
        names.append(message.fields_by_name[name].json_name)
        message = message.fields_by_name[name].message_type
    return ".".join(names)


_NAMES = {_json_name(path): name for name, (path, _) in _INPUTS.items()}


def _read_inputs(message: oip.ModelInferRequest, reading: _Reading) -> None:
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        reading.reject("raw_input_contents", f"must have {len(message.inputs)} entries, one for each input")
        return
    seen: set[str] = set()
    for index, tensor in enumerate(message.inputs):
        try:
            if tensor.name in seen:
                raise _Malformed("must be given once")
            reading.values[tensor.name] = _elements(tensor, raw[index] if raw else None)
        except _Malformed as error:
            reading.reject(_short(tensor.name), str(error))
        seen.add(tensor.name)


def _elements(tensor: oip.ModelInferRequest.InferInputTensor, raw: bytes | None) -> list[Any]:
    """Return the elements of an input. Raises _Malformed."""
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
        elements = list(_split_bytes(raw))
    elif len(raw) % np.dtype(raw_type).itemsize:
        raise _Malformed(f"must be whole elements of {tensor.datatype}, has {len(raw)} bytes")
    else:
        elements = np.frombuffer(raw, raw_type).tolist()
    if len(elements) != tensor.shape[0]:
        raise _Malformed(f"must have as many elements as its shape says, {tensor.shape[0]}, has {len(elements)}")
    return [_decode_element(tensor.datatype, element) for element in elements]


def _split_bytes(raw: bytes) -> Iterator[bytes]:
    """Split raw BYTES into elements, each preceded by its length. Raises _Malformed."""
    start = 0
    while start < len(raw):
        if start + 4 > len(raw) or (end := start + 4 + struct.unpack_from("<I", raw, start)[0]) > len(raw):
            raise _Malformed("must be BYTES, each with its length before it in four bytes, and ends too early")
        yield raw[start + 4 : end]
        start = end


def _decode_element(datatype: str, element: Any) -> Any:
    """Decode BYTES as UTF-8, and round short floats to their shortest decimal: 0.8 in FP32 is not 0.800000012."""
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
    """Return the requested outputs, raw if the inputs were. Raises ImageTooLarge."""
    choices = [choice for answer in answers for choice in answer.data.choices]
    elements: dict[str, list[Any]] = {
        "image": [choice.raw for choice in choices],
        "finish_reason": [choice.finish_reason.encode() for choice in choices],
        "seed": [image.seed for answer in answers for image in answer.metadata.images],
        "metadata": [_json(answer.metadata) for answer in answers],
    }
    result = oip.ModelInferResponse(model_name=request.model_name, model_version=_VERSION, id=request.id)
    for name in dict.fromkeys(each.name for each in request.outputs) or _OUTPUTS:
        datatype, rank = _OUTPUTS[name]
        shape = [len(answers), len(choices) // len(answers)][:rank]
        output = result.outputs.add(name=name, datatype=datatype, shape=shape)
        contents, raw_type = _DATATYPES[datatype]
        if not request.raw_input_contents:
            getattr(output.contents, contents or "").extend(elements[name])
        elif raw_type is None:
            result.raw_output_contents.append(b"".join(struct.pack("<I", len(each)) + each for each in elements[name]))
        else:
            result.raw_output_contents.append(np.array(elements[name], raw_type).tobytes())
    if result.ByteSize() > max_message_bytes:
        raise ImageTooLarge(
            f"the answer does not fit into {max_message_bytes} bytes; raise max_message_bytes, ask for fewer images at "
            "once, or leave out the output metadata"
        )
    return result


def _json(metadata: pb.Metadata) -> bytes:
    return json_format.MessageToJson(metadata, indent=None, ensure_ascii=False).encode()
