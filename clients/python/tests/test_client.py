"""Errors, retries, deadlines and cancellation of both clients, over a real connection."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1.health_pb2 import HealthCheckResponse

from text_to_image_client import (
    AlreadyExists,
    AsyncTextToImage,
    Cancelled,
    DeadlineExceeded,
    Done,
    FieldViolation,
    InvalidRequest,
    ModelInfo,
    NotFound,
    Progress,
    ResourceExhausted,
    ServerError,
    ServingStatus,
    TextToImage,
    TextToImageError,
    Unauthenticated,
    Unavailable,
)
from text_to_image_client.v1 import text_to_image_pb2 as pb

STEP = pb.StreamGenerateResponse(progress=pb.Progress(stage=pb.STAGE_BASE, step=1, steps=2))
DONE = pb.StreamGenerateResponse(done=pb.Done())


async def generate_in_a_thread(target: str, resubmit: int = 1, **options: Any) -> Any:
    with TextToImage(target, resubmit=resubmit) as client:
        return await asyncio.to_thread(client.generate, "cat", **options)


async def generate_async(target: str, resubmit: int = 1, **options: Any) -> Any:
    async with AsyncTextToImage(target, resubmit=resubmit) as client:
        return await client.generate("cat", **options)


async def stream_in_a_thread(target: str, resubmit: int = 1, **options: Any) -> Any:
    with TextToImage(target, resubmit=resubmit) as client, client.stream("cat", **options) as events:
        return await asyncio.to_thread(list, events)


async def stream_async(target: str, resubmit: int = 1, **options: Any) -> Any:
    async with AsyncTextToImage(target, resubmit=resubmit) as client, client.stream("cat", **options) as events:
        return [event async for event in events]


unary = pytest.mark.parametrize("call", [generate_in_a_thread, generate_async])
streaming = pytest.mark.parametrize("call", [stream_in_a_thread, stream_async])
every = pytest.mark.parametrize("call", [generate_in_a_thread, generate_async, stream_in_a_thread, stream_async])


@every
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhausted),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, AlreadyExists),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, ServerError),
    ],
)
async def test_every_status_has_its_error_with_the_servers_words(service, status, call, code, kind):
    service.answer(status(code, "the server's words"))
    with pytest.raises(TextToImageError) as caught:
        await call(service.target)
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.code) == ("the server's words", code)
    assert str(caught.value) == "the server's words"


@every
async def test_a_bad_request_names_every_bad_field(service, status, call):
    violations = [
        BadRequest.FieldViolation(field="data.prompt", description="must not be blank"),
        BadRequest.FieldViolation(field="parameter.n", description="must be 1 to 8, is 9"),
    ]
    service.answer(status(grpc.StatusCode.INVALID_ARGUMENT, "bad", BadRequest(field_violations=violations)))
    with pytest.raises(InvalidRequest) as caught:
        await call(service.target)
    assert caught.value.violations == (
        FieldViolation("data.prompt", "must not be blank"),
        FieldViolation("parameter.n", "must be 1 to 8, is 9"),
    )
    assert str(caught.value) == "bad\n  data.prompt: must not be blank\n  parameter.n: must be 1 to 8, is 9"


@every
async def test_resource_exhausted_has_the_time_to_wait(service, status, call):
    delay = Duration(seconds=2, nanos=500_000_000)
    service.answer(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", RetryInfo(retry_delay=delay)))
    with pytest.raises(ResourceExhausted) as caught:
        await call(service.target)
    assert caught.value.retry_after == 2.5


@unary
async def test_unparsable_details_leave_the_status(service, call):
    def refuse(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")

    service.answer(refuse)
    with pytest.raises(ResourceExhausted, match="full") as caught:
        await call(service.target)
    assert caught.value.retry_after is None


@unary
async def test_an_unavailable_service_is_retried(service, status, call):
    loading = status(grpc.StatusCode.UNAVAILABLE, "loading")
    service.answer(loading, loading, pb.GenerateResponse(metadata=pb.Metadata(model="mini")))
    assert (await call(service.target)).model == "mini"
    assert len(service.requests) == 3


@streaming
async def test_a_stream_is_retried_before_its_first_event(service, status, call):
    service.answer(status(grpc.StatusCode.UNAVAILABLE, "loading"), [STEP, DONE])
    assert len(await call(service.target)) == 2
    assert len(service.requests) == 2


@streaming
async def test_a_stream_is_not_retried_after_its_first_event(service, status, call):
    service.answer([STEP, status(grpc.StatusCode.UNAVAILABLE, "draining")])
    with pytest.raises(Unavailable, match="draining"):
        await call(service.target, resubmit=0)
    assert len(service.requests) == 1


@every
@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED"])
async def test_other_statuses_are_not_retried(service, status, call, code):
    service.answer(status(grpc.StatusCode[code]))
    with pytest.raises(TextToImageError):
        await call(service.target)
    assert len(service.requests) == 1


def test_without_retries_the_first_error_is_raised(service, status):
    service.answer(status(grpc.StatusCode.UNAVAILABLE, "loading"))
    with TextToImage(service.target, retries=0) as client, pytest.raises(Unavailable, match="loading"):
        client.model()
    assert len(service.requests) == 1


ENOUGH = 5000  # calls; it is random which of the servers are connected at the first ones


async def models_in_a_thread(target: str) -> AsyncIterator[ModelInfo]:
    with TextToImage(target, round_robin=True, retries=0) as client:
        for _ in range(ENOUGH):
            yield await asyncio.to_thread(client.model)


async def models_async(target: str) -> AsyncIterator[ModelInfo]:
    async with AsyncTextToImage(target, round_robin=True, retries=0) as client:
        for _ in range(ENOUGH):
            yield await client.model()


@pytest.mark.parametrize("calls", [models_in_a_thread, models_async])
async def test_round_robin_calls_every_server(services, calls):
    for service in services:
        service.answer(*[pb.GetModelResponse()] * ENOUGH)
        service.health.set("text_to_image.v1.TextToImageService", HealthCheckResponse.SERVING)
    async for _ in calls(f"ipv4:{services[0].target},{services[1].target}"):
        if all(service.requests for service in services):
            return
    pytest.fail("one server was never called")


@pytest.mark.parametrize("calls", [models_in_a_thread, models_async])
async def test_round_robin_skips_a_server_that_is_not_ready(services, calls):
    loading, ready = services
    loading.health.set("text_to_image.v1.TextToImageService", HealthCheckResponse.NOT_SERVING)
    ready.health.set("text_to_image.v1.TextToImageService", HealthCheckResponse.SERVING)
    ready.answer(*[pb.GetModelResponse()] * 200)
    async with contextlib.aclosing(calls(f"ipv4:{loading.target},{ready.target}")) as answers:
        for _ in range(200):
            await anext(answers)
    assert (len(loading.requests), len(ready.requests)) == (0, 200)


async def test_round_robin_without_a_ready_server_is_unavailable(services):
    for service in services:
        service.health.set("text_to_image.v1.TextToImageService", HealthCheckResponse.NOT_SERVING)
    with pytest.raises(Unavailable):
        await anext(models_async(f"ipv4:{services[0].target},{services[1].target}"))
    assert services[0].requests == services[1].requests == []


@pytest.mark.parametrize("retries", [-1, 5])
def test_retries_outside_0_to_4_are_rejected(retries):
    with pytest.raises(ValueError, match="0 to 4"):
        TextToImage("127.0.0.1:1", retries=retries)


@pytest.fixture
def unreachable() -> Iterator[str]:
    """An address that is bound, so that no other process gets it, and where no server listens."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


@every
async def test_an_unreachable_target_is_unavailable_within_seconds_and_is_named(unreachable, call):
    began = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await call(unreachable)
    assert str(caught.value).startswith(f"{unreachable}: ")
    assert time.monotonic() - began < 10


@every
async def test_a_deadline_ends_the_call(service, call):
    service.answer([service.hold] if "stream" in call.__name__ else service.hold)
    with pytest.raises(DeadlineExceeded):
        await call(service.target, timeout=0.2)
    assert await asyncio.to_thread(service.gone.wait, 10)


def test_the_clients_timeout_is_the_default_of_calls(service):
    service.answer(service.hold)
    with TextToImage(service.target, timeout=0.2) as client, pytest.raises(DeadlineExceeded):
        client.generate("cat")


@streaming
async def test_a_stream_without_done_is_a_server_error(service, call):
    service.answer([STEP])
    with pytest.raises(ServerError, match="before its `done` event"):
        await call(service.target)


async def attach_in_a_thread(target: str, *arguments: Any) -> Any:
    with TextToImage(target) as client, client.attach(*arguments) as events:
        return await asyncio.to_thread(list, events)


async def attach_async(target: str, *arguments: Any) -> Any:
    async with AsyncTextToImage(target) as client, client.attach(*arguments) as events:
        return [event async for event in events]


attaching = pytest.mark.parametrize("call", [attach_in_a_thread, attach_async])


@attaching
async def test_attach_sends_the_name_and_the_number_of_the_last_event(service, call):
    service.answer([STEP, DONE], [DONE])
    assert [type(event) for event in await call(service.target, "mine")] == [Progress, Done]
    assert [type(event) for event in await call(service.target, "mine", 7)] == [Done]
    assert service.requests == [pb.AttachRequest(request_id="mine"), pb.AttachRequest(request_id="mine", after=7)]


@attaching
async def test_attaching_after_the_last_event_yields_nothing(service, call):
    service.answer([], [])
    assert await call(service.target, "mine", 7) == []
    with pytest.raises(ServerError, match="before its `done` event"):
        await call(service.target, "mine")


@attaching
async def test_attaching_to_an_unknown_job_raises_not_found(service, status, call):
    service.answer(status(grpc.StatusCode.NOT_FOUND, "no longer kept"))
    with pytest.raises(NotFound, match="no longer kept"):
        await call(service.target, "mine")


async def test_cancel_sends_the_name_of_the_job(service, status):
    service.answer(pb.CancelResponse(), pb.CancelResponse(), *[status(grpc.StatusCode.NOT_FOUND, "unknown job")] * 2)
    with TextToImage(service.target) as client:
        async with AsyncTextToImage(service.target) as async_client:
            await asyncio.to_thread(client.cancel, "mine")
            await async_client.cancel("yours")
            with pytest.raises(NotFound, match="unknown job"):
                await asyncio.to_thread(client.cancel, "mine")
            with pytest.raises(NotFound, match="unknown job"):
                await async_client.cancel("yours")
    assert [each.request_id for each in service.requests] == ["mine", "yours", "mine", "yours"]


async def test_without_resume_the_stream_has_the_number_to_attach_after(service, status):
    first = [pb.StreamGenerateResponse(progress=STEP.progress, number=4), status(grpc.StatusCode.UNAVAILABLE, "gone")]
    rest = [pb.StreamGenerateResponse(done=pb.Done(), number=5)]
    service.answer(first, rest, first, rest)
    with TextToImage(service.target, resubmit=0) as client:
        events = client.stream("cat", request_id="mine", on_disconnect="detach", resume=False)
        assert events.number == 0
        with pytest.raises(Unavailable):
            await asyncio.to_thread(list, events)
        (done,) = await asyncio.to_thread(list, client.attach("mine", events.number))
        assert (events.number, done.number) == (4, 5)
    async with AsyncTextToImage(service.target, resubmit=0) as async_client:
        stream = async_client.stream("cat", request_id="mine", on_disconnect="detach", resume=False)
        with pytest.raises(Unavailable):
            [event async for event in stream]
        (done,) = [event async for event in async_client.attach("mine", stream.number)]
        assert (stream.number, done.number) == (4, 5)
    assert [each.after for each in service.requests if isinstance(each, pb.AttachRequest)] == [4, 4]


def leave_the_block(client: TextToImage) -> None:
    with client.stream("cat") as events:
        next(events)


def close_the_stream(client: TextToImage) -> None:
    with contextlib.closing(client.stream("cat")) as events:
        next(events)


def break_out_of_the_loop(client: TextToImage) -> None:
    for event in client.stream("cat"):
        assert isinstance(event, Progress)
        break


@pytest.mark.parametrize("leave", [leave_the_block, close_the_stream, break_out_of_the_loop])
def test_leaving_a_stream_cancels_the_call(service, leave):
    service.answer([STEP, service.hold])
    with TextToImage(service.target) as client:
        leave(client)
        assert service.gone.wait(10)


async def leave_the_block_async(client: AsyncTextToImage) -> None:
    async with client.stream("cat") as events:
        await anext(events)


async def close_the_stream_async(client: AsyncTextToImage) -> None:
    async with contextlib.aclosing(client.stream("cat")) as events:
        await anext(events)


async def break_out_of_the_loop_async(client: AsyncTextToImage) -> None:
    async for _ in client.stream("cat"):
        break


async def cancel_the_task(client: AsyncTextToImage) -> None:
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream("cat"):
            begun.set()

    reading = asyncio.create_task(read())
    await begun.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


@pytest.mark.parametrize(
    "leave", [leave_the_block_async, close_the_stream_async, break_out_of_the_loop_async, cancel_the_task]
)
async def test_leaving_an_async_stream_cancels_the_call(service, leave):
    service.answer([STEP, service.hold])
    async with AsyncTextToImage(service.target) as client:
        await leave(client)
        assert await asyncio.to_thread(service.gone.wait, 10)


def test_closing_a_stream_from_another_thread_wakes_its_reader(service):
    service.answer([STEP, service.hold])
    with TextToImage(service.target) as client, client.stream("cat") as events:
        next(events)
        closer = threading.Timer(0.1, events.close)
        closer.start()
        with pytest.raises(Cancelled):
            next(events)
        closer.join()


@streaming
async def test_a_stream_ends_after_done(service, call):
    service.answer([STEP, DONE])
    assert [type(event) for event in await call(service.target)] == [Progress, Done]


@pytest.mark.parametrize("state", ["SERVING", "NOT_SERVING"])
async def test_health_returns_the_status_of_a_service(service, state):
    service.health.set("text_to_image.v1.TextToImageService", HealthCheckResponse.ServingStatus.Value(state))
    async with AsyncTextToImage(service.target) as async_client:
        with TextToImage(service.target) as client:
            assert client.health("text_to_image.v1.TextToImageService") is ServingStatus[state]
            assert client.health("nobody") is ServingStatus.SERVICE_UNKNOWN
        assert await async_client.health("text_to_image.v1.TextToImageService") is ServingStatus[state]
        assert await async_client.health("nobody") is ServingStatus.SERVICE_UNKNOWN


async def test_a_newer_health_status_is_unknown(service):
    service.health.set("", 99)
    with TextToImage(service.target) as client:
        assert client.health() is ServingStatus.UNKNOWN
    async with AsyncTextToImage(service.target) as async_client:
        assert await async_client.health() is ServingStatus.UNKNOWN


async def test_an_answer_of_many_megabytes_arrives(service):
    large = pb.GenerateResponse(data=pb.ResultData(choices=[pb.Choice(raw=b"x" * 20_000_000)]))
    large.metadata.images.add()
    for call in (generate_in_a_thread, generate_async):
        service.answer(large)
        assert len((await call(service.target)).images[0].data) == 20_000_000
