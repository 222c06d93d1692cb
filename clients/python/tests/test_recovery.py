"""Lost servers and connections: a request is sent again once, and a detached stream attaches again.

The scripted servers answer as real ones do when they stop. tests/test_lost_servers.py kills real ones.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from text_to_image_client import (
    AsyncTextToImage,
    Cancelled,
    DeadlineExceeded,
    Done,
    Event,
    EventStream,
    ImageReady,
    NotFound,
    Progress,
    Queued,
    ServerError,
    TextToImage,
    Unavailable,
    _recovery,
)
from text_to_image_client.v1 import text_to_image_pb2 as pb

DETACHED = {"request_id": "mine", "on_disconnect": "detach"}
QUEUED = pb.StreamGenerateResponse(queued=pb.Queued(position=0), number=1)


def step(number: int) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(progress=pb.Progress(stage=pb.STAGE_BASE, step=1, steps=2), number=number)


def choice(index: int, number: int, seed: int = 7, raw: bytes = b"") -> pb.StreamGenerateResponse:
    ready = pb.ChoiceReady(choice_index=index, choice=pb.Choice(raw=raw or b"image %d" % index))
    ready.metadata.seed, ready.metadata.media_type = seed + index, "image/jpeg"
    return pb.StreamGenerateResponse(choice=ready, number=number)


def done(number: int) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(done=pb.Done(metadata=pb.Metadata(request_id="mine")), number=number)


ANSWER = pb.GenerateResponse(metadata=pb.Metadata(model="mini"))


class Caller:
    """Either client behind the same async methods."""

    def __init__(self, client: TextToImage | AsyncTextToImage) -> None:
        self.client = client

    async def generate(self, **options: Any) -> Any:
        if isinstance(self.client, TextToImage):
            return await asyncio.to_thread(self.client.generate, "cat", **options)
        return await self.client.generate("cat", **options)

    async def read(self, stream: Any) -> AsyncIterator[Event]:
        if isinstance(self.client, TextToImage):
            for event in iter(lambda: asyncio.to_thread(next, stream, None), None):
                if (read := await event) is None:
                    return
                yield read
        else:
            async for event in stream:
                yield event

    async def stream(self, **options: Any) -> list[Event]:
        return [event async for event in self.read(self.client.stream("cat", **options))]

    async def attach(self, *arguments: Any, **options: Any) -> list[Event]:
        return [event async for event in self.read(self.client.attach(*arguments, **options))]

    async def close(self) -> None:
        if isinstance(self.client, TextToImage):
            self.client.close()
        else:
            await self.client.aclose()


@pytest.fixture(params=[TextToImage, AsyncTextToImage], ids=["sync", "async"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Caller]]:
    callers = []

    def make(target: str, **options: Any) -> Caller:
        callers.append(Caller(request.param(target, **options)))
        return callers[-1]

    yield make
    for caller in callers:
        await caller.close()


def device_lost(status: Any) -> Any:
    info = ErrorInfo(reason="DEVICE_LOST", domain="text_to_image.v1")
    return status(grpc.StatusCode.ABORTED, "the device stopped answering", info)


def admitted_and_then(code: grpc.StatusCode, words: str) -> Callable[[grpc.ServicerContext], None]:
    """Returns an answer that admits the request, by its initial metadata, and then ends the call."""

    def answer(context: grpc.ServicerContext) -> None:
        context.send_initial_metadata((("t2i-admitted", "1"),))
        context.abort(code, words)

    return answer


def lost(context: grpc.ServicerContext) -> None:
    """Ends the call as it ends when the server is killed."""
    context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


class TestResubmit:
    async def test_a_lost_device_resubmits_the_request_with_the_same_seed(self, service, status, connect):
        service.answer(device_lost(status), ANSWER)
        assert (await connect(service.target).generate()).model == "mini"
        first, second = service.requests
        assert first == second
        assert first.parameter.HasField("seed"), "by the client, so that the images are the same"

    async def test_no_request_is_sent_a_third_time(self, service, status, connect):
        service.answer(*[device_lost(status)] * 2)
        with pytest.raises(ServerError, match="the device stopped answering") as caught:
            await connect(service.target).generate()
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert len(service.requests) == 2

    async def test_without_resubmit_the_error_is_raised_and_no_seed_is_sent(self, service, status, connect):
        service.answer(device_lost(status))
        with pytest.raises(ServerError):
            await connect(service.target, resubmit=0).generate()
        (request,) = service.requests
        assert not request.parameter.HasField("seed")

    async def test_an_admitted_request_that_ends_unavailable_is_resubmitted(self, service, connect):
        service.answer(admitted_and_then(grpc.StatusCode.UNAVAILABLE, "shutting down"), ANSWER)
        await connect(service.target).generate(seed=5)
        assert [request.parameter.seed for request in service.requests] == [5, 5]

    async def test_a_broken_connection_resubmits_the_request(self, service, connect):
        service.answer(lost, ANSWER)
        await connect(service.target, retries=0).generate()
        assert len(service.requests) == 2

    async def test_a_rejected_request_is_not_resubmitted(self, service, status, connect):
        service.answer(status(grpc.StatusCode.UNAVAILABLE, "loading"))
        with pytest.raises(Unavailable, match="loading"):
            await connect(service.target, retries=0).generate()
        assert len(service.requests) == 1

    @pytest.mark.parametrize("code", ["INTERNAL", "ABORTED", "RESOURCE_EXHAUSTED", "UNKNOWN"])
    async def test_another_failure_is_not_resubmitted(self, service, status, connect, code):
        service.answer(status(grpc.StatusCode[code], "words"))
        with pytest.raises(Exception, match="words"):
            await connect(service.target).generate()
        assert len(service.requests) == 1

    async def test_a_cancelled_job_is_not_resubmitted(self, service, connect):
        service.answer(admitted_and_then(grpc.StatusCode.CANCELLED, "cancelled by Cancel"))
        with pytest.raises(Cancelled, match="cancelled by Cancel"):
            await connect(service.target).generate()
        assert len(service.requests) == 1

    async def test_a_call_cancelled_by_a_stopping_server_before_its_headers_is_retried(self, service, status, connect):
        service.answer(status(grpc.StatusCode.CANCELLED, "CANCELLED"), ANSWER)
        await connect(service.target, resubmit=0).generate()
        assert len(service.requests) == 2

    async def test_a_resubmitted_stream_continues_and_no_image_comes_twice(self, service, status, connect):
        gone = status(grpc.StatusCode.UNAVAILABLE, "gone")
        service.answer(
            [QUEUED, step(2), choice(0, 3, raw=b"first"), step(4), gone],
            [QUEUED, step(2), choice(0, 3, raw=b"again"), step(4), choice(1, 5), done(6)],
        )
        caller = connect(service.target)
        stream = caller.client.stream("cat", n=2)
        events, resubmitted = [], []
        async for event in caller.read(stream):
            events.append(event)
            resubmitted.append(stream.resubmitted)
        assert [type(event) for event in events] == [
            *(Queued, Progress, ImageReady, Progress),
            *(Queued, Progress, Progress, ImageReady, Done),
        ]
        assert resubmitted == [0] * 4 + [1] * 5
        assert [event.number for event in events] == [1, 2, 3, 4, 1, 2, 4, 5, 6]
        assert [image.data for image in events[-1].result.images] == [b"first", b"image 1"]
        assert service.requests[0] == service.requests[1]

    async def test_a_stream_is_not_sent_a_third_time(self, service, status, connect):
        gone = status(grpc.StatusCode.UNAVAILABLE, "gone")
        service.answer([step(1), gone], [step(1), gone])
        with pytest.raises(Unavailable, match="gone"):
            await connect(service.target).stream()
        assert len(service.requests) == 2

    async def test_the_deadline_covers_both_attempts(self, service, connect):
        def slowly_lost(context: grpc.ServicerContext) -> None:
            left.append(context.time_remaining())
            time.sleep(0.5)
            lost(context)

        left: list[float] = []
        service.answer(slowly_lost, slowly_lost)
        with pytest.raises(Unavailable):
            # gRPC sends a timeout of less than 10 s with a resolution of 0.01 s.
            await connect(service.target, retries=0).generate(timeout=9)
        assert left[1] < left[0] - 0.4

    @pytest.mark.parametrize("resubmit", [-1, 2, "1", None])
    def test_resubmit_outside_0_to_1_is_rejected(self, resubmit):
        with pytest.raises(ValueError, match="resubmit must be 0 to 1"):
            TextToImage("127.0.0.1:1", resubmit=resubmit)


BROKEN = [
    (grpc.StatusCode.UNAVAILABLE, "Socket closed"),
    (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
    (grpc.StatusCode.UNKNOWN, "Stream removed"),
    (grpc.StatusCode.UNKNOWN, "Received http2 header with status: 500"),
    (grpc.StatusCode.CANCELLED, "Received RST_STREAM with error code 8"),
]


class TestResume:
    @pytest.mark.parametrize(("code", "words"), BROKEN)
    async def test_a_detached_stream_attaches_after_its_newest_event(self, service, connect, code, words):
        service.answer([QUEUED, step(2), (code, words)], [choice(0, 3), (code, words)], [done(4)])
        caller = connect(service.target)
        events = await caller.stream(**DETACHED)
        assert [event.number for event in events] == [1, 2, 3, 4]
        assert [image.data for image in events[-1].result.images] == [b"image 0"]
        asked = service.requests[1:]
        assert asked == [pb.AttachRequest(request_id="mine", after=2), pb.AttachRequest(request_id="mine", after=3)]

    async def test_an_attached_stream_attaches_again_after_its_newest_event(self, service, connect):
        service.answer([step(8), BROKEN[0]], [done(9)])
        assert [event.number for event in await connect(service.target).attach("mine", 7)] == [8, 9]
        assert [request.after for request in service.requests] == [7, 8]

    async def test_a_heartbeat_is_returned_with_its_number(self, service, connect):
        service.answer([step(1), step(1), BROKEN[0]], [step(1), done(2)])
        assert [event.number for event in await connect(service.target).stream(**DETACHED)] == [1, 1, 1, 2]
        assert service.requests[1].after == 1

    async def test_resume_waits_for_an_absent_server(self, service, status, connect):
        away = (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses")
        loading = status(grpc.StatusCode.UNAVAILABLE, "loading")
        service.answer([step(1), BROKEN[0]], away, loading, [done(2)])
        events = await connect(service.target, retries=0, resubmit=0).stream(**DETACHED)
        assert [event.number for event in events] == [1, 2]

    async def test_a_job_lost_with_its_server_is_resubmitted_under_its_name(self, service, status, connect):
        gone = status(grpc.StatusCode.NOT_FOUND, "no detached job is named mine here")
        service.answer([QUEUED, choice(0, 2, seed=41), BROKEN[0]], gone, [QUEUED, choice(0, 2), choice(1, 3), done(4)])
        events = await connect(service.target).stream(n=2, **DETACHED)
        assert [event.number for event in events] == [1, 2, 1, 3, 4]
        first, _, again = service.requests
        assert not first.parameter.HasField("seed"), "otherwise an equal request under its name would not join it"
        assert again.parameter.seed == 41, "the seed of the delivered image"
        again.parameter.ClearField("seed")
        assert again == first

    async def test_without_resubmit_a_lost_job_is_not_found(self, service, status, connect):
        service.answer([step(1), BROKEN[0]], status(grpc.StatusCode.NOT_FOUND, "no job is named mine here"))
        with pytest.raises(NotFound, match="no job is named mine"):
            await connect(service.target, resubmit=0).stream(**DETACHED)

    async def test_an_unreachable_server_at_the_first_call_is_an_error(self, service, connect):
        service.answer((grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"))
        with pytest.raises(Unavailable):
            await connect(service.target, retries=0).attach("mine")
        assert len(service.requests) == 1

    async def test_the_deadline_ends_resuming(self, service, connect):
        service.answer([step(1), BROKEN[0]], *[BROKEN[0]] * 99)
        with pytest.raises(DeadlineExceeded, match="the timeout passed"):
            await connect(service.target, retries=0).stream(timeout=1, **DETACHED)

    async def test_without_a_deadline_resuming_ends_after_resume_seconds(self, service, connect, monkeypatch):
        monkeypatch.setattr(_recovery, "RESUME_SECONDS", 0.5)
        service.answer([step(1), BROKEN[0]], *[BROKEN[0]] * 99)
        with pytest.raises(Unavailable, match="Socket closed"):
            await connect(service.target, retries=0).stream(**DETACHED)

    @pytest.mark.parametrize(("code", "words"), [(grpc.StatusCode.INTERNAL, "internal error"), BROKEN[1]])
    async def test_an_error_of_the_service_itself_is_raised(self, service, status, connect, code, words):
        service.answer([step(1), status(code, words)])  # with the details of the service's errors
        with pytest.raises(ServerError, match=words):
            await connect(service.target).stream(**DETACHED)

    @pytest.mark.parametrize("options", [{}, {"resume": False, **DETACHED}])
    async def test_other_streams_do_not_resume(self, service, connect, options):
        service.answer([step(1), BROKEN[1]])
        with pytest.raises(ServerError, match="RST_STREAM"):
            await connect(service.target, resubmit=0).stream(**options)

    async def test_a_connection_broken_after_the_last_event_is_no_error(self, service, connect):
        service.answer([done(1), BROKEN[1]])
        assert [type(event) for event in await connect(service.target).stream(**DETACHED)] == [Done]

    async def test_a_stream_closed_at_its_last_event_is_not_cancelled(self, service, connect):
        service.answer([done(1), service.pause])
        stream = (caller := connect(service.target)).client.stream("cat")
        async for event in caller.read(stream):
            assert isinstance(event, Done)
            break
        await (asyncio.to_thread(stream.close) if isinstance(stream, EventStream) else stream.aclose())
        assert await asyncio.to_thread(service.ended.get, timeout=60) == "complete"

    def test_closing_a_stream_ends_its_wait_to_attach(self, service):
        service.answer([step(1), BROKEN[0]], *[BROKEN[0]] * 99)
        with TextToImage(service.target, retries=0) as client, client.stream("cat", **DETACHED) as stream:
            next(stream)
            reading = asyncio.run(_closed_while_reading(stream))
        assert type(reading).__name__ in ("Cancelled", "Unavailable")


async def _closed_while_reading(stream: Any) -> BaseException | None:
    reading = asyncio.get_running_loop().run_in_executor(None, next, stream)
    await asyncio.sleep(0.5)
    stream.close()
    await asyncio.wait((reading,), timeout=30)
    return reading.exception()
