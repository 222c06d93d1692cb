"""The service's faces for Instill: inputs and outputs of TASK_TEXT_TO_IMAGE, as Core calls its models with them, and as
clients of Core's public API do.

Each input becomes a request of our own contract and goes the way of these: the same checks, jobs, statuses and limits.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence

from google.protobuf.struct_pb2 import Struct, Value

from server.api import auth, contract
from server.api.contract import InvalidRequest, ParsedRequest, UnknownModel, Violation
from server.servicer import Context, TextToImageServicer
from server.stubs.model_model_v1alpha import model_public_pb2 as public
from server.stubs.model_model_v1alpha import model_public_pb2_grpc as public_grpc
from server.stubs.model_ray_v1alpha import user_defined_pb2 as user_defined
from server.stubs.model_ray_v1alpha import user_defined_pb2_grpc as user_defined_grpc
from text_to_image_client.v1 import text_to_image_pb2 as pb

log = logging.getLogger(__name__)

MESSAGE_BYTES = 64 * 1024 * 1024
"""What a message of these faces may have, either way: Core has no way to ask for less, and raises its own limits."""

_KEYS = {"data": {"prompt", "model"}, "parameter": {"aspect-ratio", "negative-prompt", "n", "seed"}}
"""As Instill's schema spells them. Python's users write "_" for "-", which is understood too."""
_WHOLE_NUMBER = re.compile(r" *[0-9]{1,10}(\.0*)? *", re.ASCII)
_MOST_TOLD = 8  # unknown keys of a call that are named in the log,
_LONGEST_TOLD = 64  # and of each so many characters


class InstillServicer(user_defined_grpc.UserDefinedServiceServicer):
    """Serves what `first`, the face of our own contract, serves, to Core."""

    def __init__(self, first: TextToImageServicer) -> None:
        self._first = first

    async def __call__(self, request: user_defined.CallRequest, context: Context) -> user_defined.CallResponse:
        return user_defined.CallResponse(
            task_outputs=await _outputs(self._first, "__call__", request.task_inputs, context)
        )


class ModelPublicServicer(public_grpc.ModelPublicServiceServicer):
    """Serves what `first` serves to clients of Core's public API, with no Core between."""

    def __init__(self, first: TextToImageServicer) -> None:
        self._first = first

    async def Liveness(self, request: public.LivenessRequest, context: Context) -> public.LivenessResponse:
        return public.LivenessResponse(health_check_response=_health(True))

    async def Readiness(self, request: public.ReadinessRequest, context: Context) -> public.ReadinessResponse:
        return public.ReadinessResponse(health_check_response=_health(self._first.ready))

    async def TriggerNamespaceModel(
        self, request: public.TriggerNamespaceModelRequest, context: Context
    ) -> public.TriggerNamespaceModelResponse:
        made = await _outputs(
            self._first, "TriggerNamespaceModel", request.task_inputs, context, model=request.model_id
        )
        return public.TriggerNamespaceModelResponse(task=public.TASK_TEXT_TO_IMAGE, task_outputs=made)

    async def TriggerNamespaceLatestModel(
        self, request: public.TriggerNamespaceLatestModelRequest, context: Context
    ) -> public.TriggerNamespaceLatestModelResponse:
        made = await _outputs(
            self._first, "TriggerNamespaceLatestModel", request.task_inputs, context, model=request.model_id
        )
        return public.TriggerNamespaceLatestModelResponse(task=public.TASK_TEXT_TO_IMAGE, task_outputs=made)


async def _outputs(
    first: TextToImageServicer, method: str, inputs: Sequence[Struct], context: Context, model: str | None = None
) -> list[Struct]:
    """The outputs of a call's inputs, in their order, by the model of that name; None is whichever is served."""
    request_id = contract.request_id_of(pb.GenerateRequest())
    async with first.statuses(method, request_id, context):
        caller = auth.caller_of(context)
        info, limits = first.model(caller)
        if model not in (None, info.name):
            raise UnknownModel(f'"{info.name}" is the model that is served here')
        requests, unreadable = read(inputs, limits.max_images)
        tasks = first.parse_all(requests, request_id, caller, name_of, "task_inputs", unreadable)
        asked = [(each, _shared(task, len(tasks))) for each, task in zip(requests, tasks, strict=True)]
        return [output(each) for each in await first.answer_all(asked, info, caller, context)]


def _health(serving: bool) -> public.HealthCheckResponse:
    status = public.HealthCheckResponse
    return status(status=status.SERVING_STATUS_SERVING if serving else status.SERVING_STATUS_NOT_SERVING)


def name_of(field: str, places: str) -> str:
    """What these faces call a field of the requests at `places`, such as "0" or "0-2,5"."""
    return f"task_inputs[{places}].{field}"


def _shared(task: ParsedRequest, inputs: int) -> ParsedRequest:
    """The task with its share of the room that one message has for so many inputs."""
    share = MESSAGE_BYTES // inputs
    return dataclasses.replace(task, output=dataclasses.replace(task.output, max_message_bytes=share))


# From inputs to requests.


def read(inputs: Sequence[Struct], most: int) -> tuple[list[pb.GenerateRequest], list[Violation]]:
    """Return the requests that the inputs make, and the violations for what cannot be read.

    A field that cannot be read has a value that breaks no rule. Raises InvalidRequest for more than `most` inputs.
    """
    if len(inputs) > most:
        raise InvalidRequest([Violation("task_inputs", f"must be at most {most}, are {len(inputs)}")])
    found: dict[Violation, list[int]] = {}
    unknown: list[str] = []
    requests = []
    for index, given in enumerate(inputs):
        bad: list[Violation] = []
        requests.append(_request(given, bad, unknown))
        for each in bad:
            found.setdefault(each, []).append(index)
    if unknown:
        told = ", ".join(repr(each[:_LONGEST_TOLD]) for each in unknown[:_MOST_TOLD])
        log.warning("ignored keys of the task's inputs, %d that are not known here: %s", len(unknown), told)
    return requests, contract.violations_of_all(found, name_of)


def _request(given: Struct, wrong: list[Violation], unknown: list[str]) -> pb.GenerateRequest:
    """The request of one input. What is wrong with it is added to `wrong`, keys without a meaning to `unknown`."""
    rooms: dict[str, dict[str, Value]] = {}
    for room, value in _given(given):
        if room not in _KEYS:
            unknown.append(room)
        elif value.WhichOneof("kind") != "struct_value":
            wrong.append(Violation(room, "must be an object"))
        else:
            rooms[room] = _known(room, value.struct_value, wrong, unknown)
    data, parameter = rooms.get("data", {}), rooms.get("parameter", {})
    request = pb.GenerateRequest(parameter=pb.TaskParameter(n=1, seed=0), output=pb.Output(format=pb.FORMAT_JPEG_RGB))
    if "prompt" in data:
        request.data.prompt = _text("data.prompt", data["prompt"], wrong) or ""
    if any(each.field in ("data", "data.prompt") for each in wrong):
        request.data.prompt = contract.UNREADABLE_TEXT
    if "aspect-ratio" in parameter:
        ratio = _text("parameter.aspect-ratio", parameter["aspect-ratio"], wrong)
        if ratio is not None:
            request.parameter.aspect_ratio = ratio
    if "negative-prompt" in parameter:
        negative = _text("parameter.negative-prompt", parameter["negative-prompt"], wrong)
        request.parameter.negative_prompt = negative or ""
    if "n" in parameter:
        request.parameter.n = _integer("parameter.n", parameter["n"], wrong) or 1
    if "seed" in parameter:
        request.parameter.seed = _integer("parameter.seed", parameter["seed"], wrong)
    return request


def _known(room: str, struct: Struct, wrong: list[Violation], unknown: list[str]) -> dict[str, Value]:
    """The keys that have a meaning in `room`, as the schema spells them."""
    known: dict[str, Value] = {}
    for key, value in _given(struct):
        spelled = key.replace("_", "-")
        if spelled not in _KEYS[room]:
            unknown.append(f"{room}.{key}")
        elif known.setdefault(spelled, value) != value:
            both = f"is given twice, as {spelled} and {spelled.replace('-', '_')}, with different values; leave one out"
            wrong.append(Violation(f"{room}.{spelled}", both))
            del known[spelled]
    return known


def _given(struct: Struct) -> Iterator[tuple[str, Value]]:
    """The keys that have a value. One of null is a key that was left out, as clients in typed languages send it."""
    for key, value in struct.fields.items():
        if value.WhichOneof("kind") not in (None, "null_value"):
            yield key, value


def _text(field: str, value: Value, wrong: list[Violation]) -> str | None:
    if value.WhichOneof("kind") == "string_value":
        return value.string_value
    wrong.append(Violation(field, "must be a string"))
    return None


def _integer(field: str, value: Value, wrong: list[Violation]) -> int:
    """JSON knows one kind of number, and a Struct has it as a double. Forms and templates send it as text."""
    number = value.number_value if value.WhichOneof("kind") == "number_value" else math.nan
    if _WHOLE_NUMBER.fullmatch(value.string_value):
        number = float(value.string_value)
    if not number.is_integer() or not 0 <= number < 2**32:
        wrong.append(Violation(field, "must be a whole number of 0 to 4294967295"))
        return 0
    return int(number)


# From answers to outputs.


def output(answer: pb.GenerateResponse) -> Struct:
    """What Instill's schema has for the task's output, and nothing besides."""
    made = Struct()
    made.update({"data": {"choices": list(_choices(answer.data.choices))}})
    return made


def _choices(choices: Iterable[pb.Choice]) -> Iterator[dict[str, str]]:
    for choice in choices:
        yield {"finish-reason": choice.finish_reason, "image": choice.image}
