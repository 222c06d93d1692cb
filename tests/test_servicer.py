"""The servicer, over the real engine and a broken model: unexpected exceptions stay internal."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from serving import request

from server.api.frontend import Frontend
from server.domain import Environment, ImageRequest, ModelInfo, Stage, Warning
from server.engine.engine import Engine
from server.engine.interface import LaunchedStep
from server.engine.scheduling import QueueLimits
from server.servicer import TextToImageServicer
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

ENVIRONMENT = Environment({}, "none", "fp32", "none", 1, 1, "off")


@dataclass
class Nothing:
    """Conditioning and trajectory at once, of a single call."""

    warnings: tuple[Warning, ...] = ()
    environment: Environment = ENVIRONMENT
    stages: tuple[Stage, ...] = (Stage.BASE,)
    batch_key: str = ""


class WrongPixels:
    """A model whose pixels are no pixels, which is only noticed when they are coded."""

    max_batch = 1
    overlaps = False
    info = ModelInfo("wrong", "", False, "cpu", "fp32", ("euler",), 8, 8, 1, 1.0, 1.0, "euler", ENVIRONMENT)

    def encode(self, request: ImageRequest) -> Nothing:
        return Nothing()

    def plan(self, request: ImageRequest, conditioning: Nothing, seed: int) -> Nothing:
        return conditioning

    def launch(self, trajectories: Sequence[Nothing]) -> LaunchedStep:
        return LaunchedStep(lambda: None)

    def decode(self, trajectory: Nothing) -> np.ndarray:
        return np.zeros((8, 8, 7), np.complex64)


async def _read(stream) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_an_unexpected_exception_is_internal_and_its_cause_is_only_logged(
    method: str, caplog: pytest.LogCaptureFixture
):
    engine = Engine(QueueLimits(jobs=1))
    frontend = Frontend(engine, Settings())
    frontend.open((await asyncio.wrap_future(engine.start(WrongPixels))).info)
    server = grpc.aio.server()
    pb_grpc.add_TextToImageServiceServicer_to_server(TextToImageServicer(frontend, 30), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        call = getattr(stub, method)(request(), timeout=60)
        with pytest.raises(grpc.RpcError) as caught:
            await (call if method == "Generate" else _read(call))
    assert caught.value.code() == grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error; the server's log has the cause"
    assert "Traceback" in caplog.text
    await server.stop(None)
    await frontend.wait_until_idle()
    engine.stop()
    assert await asyncio.to_thread(engine.join, 60)
