"""Errors survive pickling, gRPC's own errors are distinguished from the service's, and bad arguments are rejected."""

import asyncio
import copy
import inspect
import math
import multiprocessing
import pickle
import re
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2

import text_to_image_client
from text_to_image_client import (
    AsyncTextToImage,
    Cancelled,
    FieldViolation,
    InvalidRequest,
    MessageTooLarge,
    ResourceExhausted,
    ServingStatus,
    TextToImage,
    TextToImageError,
)
from text_to_image_client.v1 import text_to_image_pb2 as pb

CODE = grpc.StatusCode.UNAVAILABLE
ERRORS = [
    InvalidRequest("bad", CODE, (FieldViolation("data.prompt", "must not be blank"),)),
    ResourceExhausted("full", CODE, 2.5),
    *(
        kind("words", CODE)
        for kind in vars(text_to_image_client).values()
        if isinstance(kind, type)
        and issubclass(kind, TextToImageError)
        and kind not in (InvalidRequest, ResourceExhausted)  # below
    ),
]


def fail(error: TextToImageError) -> None:
    raise error


def fail_in_a_call(target: str) -> None:
    with TextToImage(target, retries=0) as client:
        client.generate("cat")


def described(error: BaseException) -> tuple[Any, ...]:
    return type(error), str(error), error.args, vars(error)


def test_every_error_class_is_in_the_table():
    assert {type(error) for error in ERRORS} >= set(TextToImageError.__subclasses__())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickle_and_copy(error: TextToImageError):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert described(pickle.loads(pickle.dumps(error, protocol))) == described(error)
    assert described(copy.copy(error)) == described(error)


def test_an_error_leaves_its_worker_process_unchanged(service, status):
    service.answer(status(grpc.StatusCode.ALREADY_EXISTS, "words"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for error in ERRORS:
            caught = pool.submit(fail, error).exception(60)
            assert caught is not None
            assert described(caught) == described(error)
        caught = pool.submit(fail_in_a_call, service.target).exception(60)
        assert isinstance(caught, text_to_image_client.AlreadyExists)
        assert (caught.message, caught.code) == ("words", grpc.StatusCode.ALREADY_EXISTS)


async def test_an_error_of_the_async_client_survives_pickle(service, status):
    service.answer(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"))
    async with AsyncTextToImage(service.target) as client:
        with pytest.raises(ResourceExhausted) as caught:
            await client.generate("cat")
    assert described(pickle.loads(pickle.dumps(caught.value))) == described(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "received metadata size exceeds soft limit (14123 vs. 8192); :path:...",
        "received initial metadata size exceeds limit",
        "received trailing metadata size exceeds hard limit (23000 vs. 16384)",
        "Received message larger than max (4201636 vs. 4194304)",
        "CLIENT: Sent message larger than max (70000000 vs. 67108864)",
        "grpc: received message larger than max (5 vs. 4)",
    ],
)
def test_a_size_limit_of_grpc_is_not_a_full_queue(service, words):
    service.answer((grpc.StatusCode.RESOURCE_EXHAUSTED, words))
    with TextToImage(service.target) as client, pytest.raises(MessageTooLarge) as caught:
        client.generate("cat")
    assert str(caught.value) == words


def test_metadata_above_grpcs_limit_is_message_too_large(service):
    with (
        TextToImage(service.target, token="x" * 40_000, retries=0) as client,
        pytest.raises(MessageTooLarge, match="metadata"),
    ):
        client.generate("cat")
    assert service.requests == []


def test_the_services_own_status_is_never_message_too_large(service, status):
    service.answer(status(grpc.StatusCode.RESOURCE_EXHAUSTED, "the message of this request is larger than what waits"))
    with TextToImage(service.target) as client, pytest.raises(ResourceExhausted):
        client.generate("cat")


def test_a_closed_client_raises_cancelled(service):
    with TextToImage(service.target) as client:
        pass
    calls = [
        lambda: client.generate("cat"),
        lambda: client.stream("cat"),
        lambda: client.attach("mine"),
        lambda: client.cancel("mine"),
        client.model,
        client.health,
    ]
    for call in calls:
        with pytest.raises(Cancelled, match="this client is closed; make another one"):
            call()


@pytest.mark.parametrize("used", [True, False])
async def test_a_closed_async_client_raises_cancelled(service, status, used):
    service.answer(status(grpc.StatusCode.INTERNAL))
    async with AsyncTextToImage(service.target) as client:
        if used:
            with pytest.raises(TextToImageError):
                await client.model()
    for call in (client.model, client.health, lambda: client.generate("cat"), lambda: client.cancel("mine")):
        with pytest.raises(Cancelled, match="this client is closed; make another one"):
            await call()
    for stream in (lambda: client.stream("cat"), lambda: client.attach("mine")):
        with pytest.raises(Cancelled, match="this client is closed; make another one"):
            await anext(stream())


class TestInvalidRequest:
    """The client reports its own violations together with the server's, and nothing is drawn."""

    @pytest.fixture
    def refusing(self, service, status):
        """A server that rejects the request as the real one does, the refusable limit included."""
        from google.rpc.error_details_pb2 import BadRequest

        violations = [
            BadRequest.FieldViolation(field="sampling.steps", description="must be 1 to 150, is 9999"),
            BadRequest.FieldViolation(field="data.prompt", description="is required and must not be blank"),
            BadRequest.FieldViolation(field="output.maxMessageBytes", description="must be 16384 to 67108864, is 1"),
        ]
        service.answer(status(grpc.StatusCode.INVALID_ARGUMENT, "bad", BadRequest(field_violations=violations)))
        return service

    @staticmethod
    def check(error: InvalidRequest, service: Any) -> None:
        assert [each.field for each in error.violations] == ["data.prompt", "parameter.seed", "sampling.steps"]
        assert str(error) == (
            "data.prompt: prompt must be text, is None; "
            "parameter.seed: seed must be a whole number from 0 to 4294967295, is -1; "
            "sampling.steps: must be 1 to 150, is 9999"
        )
        (asked,) = service.requests
        assert asked.output.max_message_bytes == 1, "less than any server accepts"

    @pytest.mark.parametrize("method", ["generate", "stream"])
    def test_all_violations_are_reported_at_once(self, refusing, method):
        with TextToImage(refusing.target) as client, pytest.raises(InvalidRequest) as caught:
            getattr(client, method)(None, seed=-1, steps=9999)
        self.check(caught.value, refusing)

    async def test_async_generate_reports_all_violations_at_once(self, refusing):
        async with AsyncTextToImage(refusing.target) as client:
            with pytest.raises(InvalidRequest) as caught:
                await client.generate(None, seed=-1, steps=9999)  # type: ignore[arg-type]
        self.check(caught.value, refusing)

    async def test_async_stream_reports_all_violations_at_once(self, refusing):
        async with AsyncTextToImage(refusing.target) as client, client.stream(None, seed=-1, steps=9999) as events:  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest) as caught:
                await anext(events)
        self.check(caught.value, refusing)

    def test_a_failed_validation_call_leaves_the_clients_violations(self, service, status):
        service.answer(status(grpc.StatusCode.UNAUTHENTICATED, "no token"))
        with TextToImage(service.target) as client, pytest.raises(InvalidRequest, match="seed must be a whole number"):
            client.generate("cat", seed=-1)


@pytest.mark.parametrize("timeout", ["5", True, [1]])
def test_a_timeout_of_another_type_is_a_type_error(timeout):
    for make in (TextToImage, AsyncTextToImage):
        with pytest.raises(TypeError, match="timeout must be a number of seconds, or None"):
            make("127.0.0.1:1", timeout=timeout)
    with TextToImage("127.0.0.1:1") as client, pytest.raises(TypeError, match="timeout must be a number"):
        client.generate("cat", timeout=timeout)


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 10**400, 1e10, 1e9])
async def test_an_infinite_timeout_is_no_limit(service, timeout):
    service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    with TextToImage(service.target, timeout=timeout) as client:
        assert client.health() is ServingStatus.SERVING
        assert client.health(timeout=timeout) is ServingStatus.SERVING
    async with AsyncTextToImage(service.target) as client:
        assert await client.health(timeout=timeout) is ServingStatus.SERVING


@pytest.mark.parametrize("timeout", [np.float32(60), np.int64(60), Fraction(60)])
def test_a_timeout_may_be_any_real_number_type(service, timeout):
    service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    with TextToImage(service.target, timeout=timeout) as client:
        assert client.health() is ServingStatus.SERVING


@pytest.mark.parametrize("make", [TextToImage, AsyncTextToImage])
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"timeout": math.nan}, ValueError, "timeout must be a number of seconds, or None, not nan"),
        ({"retries": 1.0}, ValueError, "retries must be 0 to 4, not 1.0"),
        ({"retries": True}, ValueError, "retries must be 0 to 4, not True"),
        ({"resubmit": 1.0}, ValueError, "resubmit must be 0 to 1, not 1.0"),
        ({"token": b"secret"}, TypeError, "token must be text, not of type bytes"),
        ({"token": 5}, TypeError, "token must be text, not of type int"),
    ],
)
def test_bad_arguments_have_readable_errors(make, options, kind, words):
    with pytest.raises(kind) as caught:
        make("127.0.0.1:1", **options)
    assert str(caught.value) == words


def test_retries_may_be_any_integer_type(service):
    service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    with TextToImage(service.target, retries=np.int64(2), timeout=60) as client:
        assert client.health() is ServingStatus.SERVING


@pytest.mark.parametrize("make", [TextToImage, AsyncTextToImage])
@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("attach", (5,), "requestId: request_id must be text of at most 128 characters .*, is 5"),
        ("attach", ("a\ud800",), "requestId: request_id must be text .*"),
        ("attach", ("a", -1), "after: after must be a whole number from 0 on, the number of an event, is -1"),
        ("attach", (5, 1.5), "requestId: .*, is 5; after: .*, is 1.5"),
        ("cancel", (5,), "requestId: request_id must be text of at most 128 characters .*, is 5"),
    ],
)
async def test_a_bad_job_name_or_number_is_an_invalid_request(make, method, arguments, words):
    async def call() -> None:
        called = getattr(make("127.0.0.1:1"), method)(*arguments)
        if inspect.isawaitable(called):
            await called

    with pytest.raises(InvalidRequest) as caught:
        await call()
    assert re.fullmatch(words, str(caught.value)), caught.value


@pytest.mark.parametrize("service_name", [5, b"", "\ud800"])
async def test_the_service_of_a_health_check_is_text(service_name):
    with TextToImage("127.0.0.1:1") as client, pytest.raises(TypeError, match="must be the full name of a service"):
        client.health(service_name)
    async with AsyncTextToImage("127.0.0.1:1") as client:
        with pytest.raises(TypeError, match="must be the full name of a service"):
            await client.health(service_name)


@pytest.mark.parametrize("make", [TextToImage, AsyncTextToImage])
def test_a_client_cannot_be_pickled(make):
    with pytest.raises(TypeError, match=f"{make.__name__} cannot be pickled, .*; make one in each"):
        pickle.dumps(make("127.0.0.1:1"))


HELD = pb.StreamGenerateResponse(queued=pb.Queued())


@pytest.mark.parametrize(
    ("close", "words"),
    [
        (lambda client, events: client.close(), "this client is closed; make another one"),
        (lambda client, events: events.close(), "this stream is closed; make another one"),
    ],
    ids=["client", "stream"],
)
def test_a_closed_stream_raises_cancelled_each_time(service, close, words):
    service.answer([HELD, service.hold])
    with TextToImage(service.target, timeout=60) as client:
        events = client.stream("cat")
        next(events)
        close(client, events)
        for _ in range(2):
            with pytest.raises(Cancelled) as caught:
                next(events)
            assert str(caught.value) == words
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    ("close", "words"),
    [
        (lambda client, events: client.aclose(), "this client is closed; make another one"),
        (lambda client, events: events.aclose(), "this stream is closed; make another one"),
    ],
    ids=["client", "stream"],
)
async def test_closing_an_async_stream_cancels_no_task(service, close, words):
    service.answer([HELD, service.hold])
    async with AsyncTextToImage(service.target, timeout=60) as client:
        events = client.stream("cat")
        await anext(events)
        reading = asyncio.create_task(anext(events))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await close(client, events)
        with pytest.raises(Cancelled) as caught:
            await reading
        assert str(caught.value) == words
        with pytest.raises(Cancelled):
            await anext(events)


async def test_closing_the_client_in_another_task_raises_cancelled(service):
    service.answer(service.hold)
    client = AsyncTextToImage(service.target, timeout=60)
    calling = asyncio.create_task(client.generate("cat"))
    while not service.requests:
        await asyncio.sleep(0.01)
    await client.aclose()
    with pytest.raises(Cancelled, match="this client is closed; make another one"):
        await calling


async def test_a_cancelled_task_stays_cancelled_when_its_client_is_closed(service):
    service.answer(service.hold)
    client = AsyncTextToImage(service.target, timeout=60)
    calling = asyncio.create_task(client.generate("cat"))
    while not service.requests:
        await asyncio.sleep(0.01)
    calling.cancel()
    await client.aclose()
    with pytest.raises(asyncio.CancelledError):
        await calling


def test_an_async_client_in_another_loop_is_a_runtime_error(service):
    service.health.set("", health_pb2.HealthCheckResponse.SERVING)
    client = AsyncTextToImage(service.target, timeout=60)
    assert asyncio.run(client.health()) is ServingStatus.SERVING
    with pytest.raises(RuntimeError, match="belongs to the event loop that made its first call; make one in each loop"):
        asyncio.run(client.health())
