"""A pause of the process (SIGSTOP, a frozen container) counts neither as a hung device nor as a slow reader."""

import asyncio
import signal
import time

import grpc
from serving import PATIENCE, ServerProcess, connect, first_step, request
from stepped_model import Clock

from server.api.frontend import Frontend
from server.engine.engine import Engine
from server.engine.scheduling import QueueLimits
from server.runtime import CallAge
from server.servicer import TextToImageServicer
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc


class TestCallAge:
    """The watchdog looks every second; the call begins at `began`."""

    def looks(self, *times: float, began: float = 0.0) -> list[float]:
        clock = Clock()
        age = CallAge(1.0, clock)
        seen = []
        for now in times:
            clock.now = now
            seen.append(age.update(max(0.0, now - began)))
        return seen

    def test_equals_the_time_of_the_call_in_flight(self):
        assert self.looks(1, 2, 3, 4) == [1, 2, 3, 4]

    def test_grows_on_a_busy_machine_too(self):
        assert self.looks(1.9, 3.8, 5.7) == [1.9, 3.8, 5.7]

    def test_excludes_pauses_of_the_process(self):
        assert self.looks(1, 2, 3602, 3603, 3604) == [1, 2, 4, 5, 6]

    def test_restarts_with_every_call(self):
        clock = Clock()
        age = CallAge(1.0, clock)
        for now, busy, expected in ((1, 1, 1), (2, 2, 2), (3, 0.5, 0.5), (4, 1.5, 1.5), (5, 0, 0), (6, 0.2, 0.2)):
            clock.now = now
            assert age.update(busy) == expected

    def test_reaches_any_timeout_despite_pauses(self):
        times = [7.0 * look for look in range(1, 21)]
        assert self.looks(*times)[-1] == 40


def test_server_continues_after_sigstop_and_sigcont(start_server):
    server: ServerProcess = start_server(
        "--device-timeout-seconds", "6", program=("tests/support/steady_server.py",), cold=True, STEADY_SECONDS="0.5"
    ).wait_until_ready()
    with connect(server) as channel:
        stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(request(), timeout=PATIENCE)
        first_step(stream)  # the next call has begun
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(7)  # the pause, longer than the device timeout
        server.process.send_signal(signal.SIGCONT)
        assert [event.WhichOneof("event") for event in stream][-1] == "done"
    assert server.stop() == 0


def test_hung_device_ends_the_server(start_server):
    server: ServerProcess = start_server(
        "--device-timeout-seconds", "1", program=("tests/support/steady_server.py",), cold=True
    ).wait_until_ready()
    with connect(server) as channel:
        call = pb_grpc.TextToImageServiceStub(channel).Generate.future(request("hang"), timeout=PATIENCE)
        assert server.wait() == 6
        assert call.code() != grpc.StatusCode.OK


async def test_pause_during_a_message_is_not_taken_for_a_slow_reader(monkeypatch):
    """The clock of the event loop jumps by an hour, as after a pause; the message is written a moment later."""
    loop = asyncio.get_running_loop()
    servicer = TextToImageServicer(Frontend(Engine(QueueLimits(jobs=1)), Settings()), slow_reader_seconds=30)
    real, paused = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: real() + paused)

    class Reader:
        async def write(self, message: pb.StreamGenerateResponse) -> None:
            nonlocal paused
            paused = 3600.0
            for _ in range(20):  # turns of the loop, in which earlier timers expire
                await asyncio.sleep(0)

    assert await servicer._write(pb.StreamGenerateResponse(), Reader()) is None
