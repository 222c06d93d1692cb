"""Fixtures: a real gRPC server with scripted answers, for failures that a healthy service never shows.

tests/ and test_end_to_end.py test the answers of the real service.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2_grpc
from grpc_status import rpc_status

from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc


class ScriptedService(pb_grpc.TextToImageServiceServicer):
    """Answers each call with the next element of `script`: a message, a list of events, a status, or a function.

    A pair of code and message ends the call without the service's details, as a proxy or a broken connection does.
    `hold` waits until the caller is gone; `gone` is set then. `pause` waits a short time; `ended` then has "cancelled"
    if the caller left, "complete" otherwise.
    """

    hold, pause = object(), object()

    def __init__(self) -> None:
        self.target = ""
        self.script: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.requests: list[Any] = []
        self.gone = threading.Event()
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.health = health.HealthServicer()

    def answer(self, *answers: Any) -> None:
        for each in answers:
            self.script.put(each)

    def Generate(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.requests.append(request)
        context.add_callback(self.gone.set)
        answer = self.script.get_nowait()
        if answer is self.hold:
            self.gone.wait()
        if isinstance(answer, tuple):
            context.abort(*answer)
        if callable(answer):
            answer(context)
        if isinstance(answer, status_pb2.Status):
            context.abort_with_status(rpc_status.to_status(answer))
        return answer

    def StreamGenerate(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        self.requests.append(request)
        context.add_callback(self.gone.set)
        answer = self.script.get_nowait()
        for event in answer if isinstance(answer, list) else [answer]:
            if event is self.hold:
                self.gone.wait()
            elif event is self.pause:
                self.ended.put("cancelled" if self.gone.wait(0.3) else "complete")
            elif isinstance(event, tuple):
                context.abort(*event)
            elif isinstance(event, status_pb2.Status):
                context.abort_with_status(rpc_status.to_status(event))
            else:
                yield event

    def Attach(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        return self.StreamGenerate(request, context)

    def Cancel(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self.Generate(request, context)

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return self.Generate(request, context)


@contextlib.contextmanager
def serving() -> Iterator[ScriptedService]:
    scripted = ScriptedService()
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_TextToImageServiceServicer_to_server(scripted, server)
    health_pb2_grpc.add_HealthServicer_to_server(scripted.health, server)
    scripted.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield scripted
    server.stop(None).wait()


@pytest.fixture
def service() -> Iterator[ScriptedService]:
    with serving() as scripted:
        yield scripted


@pytest.fixture
def services() -> Iterator[list[ScriptedService]]:
    """Two servers, as replicas."""
    with serving() as one, serving() as other:
        yield [one, other]


@pytest.fixture
def status() -> Callable[..., status_pb2.Status]:
    """Returns a function that makes a google.rpc.Status from a code, a message and details."""

    def make(code: grpc.StatusCode, message: str = "", *details: Any) -> status_pb2.Status:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            status.details.add().Pack(detail)
        return status

    return make


@pytest.fixture
def image_metadata() -> pb.ImageMetadata:
    return pb.ImageMetadata(
        seed=7,
        width=128,
        height=96,
        steps=20,
        guidance_scale=4.5,
        high_noise_frac=0.8,
        scheduler="euler",
        base_calls=16,
        refiner_calls=4,
        media_type="image/jpeg",
    )
