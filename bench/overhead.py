"""Measure the overhead of the service: one image through gRPC, and the bare loop over the same model calls.

Both run in this process on the same ensemble and the same thread, in the order A B B A ..., so that neither drifting
machine speed nor a second pool of OpenMP threads changes the ratio. Both decode and encode the image. On CUDA,
`--trace` also reports how long the device is idle between two steps of a call through gRPC.
Run: python -m bench.overhead. T2I_BASE, T2I_COMPILE and the other variables configure it as they configure the server.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
from torch.profiler import ProfilerActivity, profile

from bench.serving import LOCAL
from server import runtime
from server.api import images
from server.api.frontend import Frontend
from server.domain import ImageRequest, default_request
from server.engine.engine import Engine
from server.engine.interface import LaunchedStep, Submission
from server.engine.scheduling import Order
from server.servicer import TextToImageServicer
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

_KERNELS = 500  # minimum of a U-Net's CUDA graph; those of text encoders and decoders have fewer


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20, help="pairs, after two that warm up (default: 20)")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of a call to this file, on CUDA")
    options = parser.parse_args()
    runs = options.runs

    settings = Settings()
    engine = Engine(settings.queue, Order(settings.scheduling_policy))
    thread = Bare()
    info = (await asyncio.wrap_future(engine.start(lambda: thread.load(settings)))).info
    frontend = Frontend(engine, settings)
    frontend.open(info)
    servicer = TextToImageServicer(frontend, settings.slow_reader_seconds)
    server = grpc.aio.server()
    pb_grpc.add_TextToImageServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    bare: list[float] = []
    served: list[float] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", LOCAL) as channel:
        stub = pb_grpc.TextToImageServiceStub(channel)
        request = pb.GenerateRequest(parameter=pb.TaskParameter(seed=1), output=pb.Output(raw=True))
        for run in range(-2, runs):
            took = {}
            for way in ("bare", "served") if run % 2 else ("served", "bare"):
                # The warm-up compares the bytes of one prompt. Later prompts differ, so that each is encoded.
                prompt = "cat napping" if run < 0 else f"cat napping {way} {run}"
                request.data.prompt = prompt
                began = time.perf_counter()
                if way == "bare":
                    alone, took[way] = await thread.bare_loop(engine, prompt)
                else:
                    async for event in stub.StreamGenerate(request):  # type: ignore[attr-defined]
                        if event.HasField("choice"):
                            through_grpc = event.choice.choice.raw
                    took[way] = time.perf_counter() - began
            if run < 0:
                assert alone == through_grpc, "the service and the bare loop must give equal bytes"
            else:
                bare.append(took["bare"])
                served.append(took["served"])
        if options.trace:
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
                async for _ in stub.StreamGenerate(request):  # type: ignore[attr-defined]
                    pass
            profiler.export_chrome_trace(str(options.trace))
    await server.stop(None)
    engine.stop()
    engine.join(10)

    print(f"{info.name} on {info.device} in {info.precision}, {info.default_steps} steps, {runs} pairs")
    _report(bare, served, len(through_grpc))
    if options.trace:
        gaps = _idle(json.loads(options.trace.read_text())["traceEvents"])
        print(f"idle between steps, seconds: median {statistics.median(gaps):.6f}, largest {max(gaps):.6f}")


def _report(bare: list[float], served: list[float], size: int) -> None:
    """Print the seconds of both loops and their ratio, for an image of `size` bytes."""
    ratios = [b / a for a, b in zip(bare, served, strict=True)]
    print(f"image of {size / 1e6:.2f} MB")
    for name, seconds in (("bare loop", bare), ("through gRPC", served)):
        print(f"{name:14} median {statistics.median(seconds):.3f} s   min {min(seconds):.3f}   max {max(seconds):.3f}")
    print(
        f"overhead       median {100 * (statistics.median(ratios) - 1):+.2f} %, of medians "
        f"{100 * (statistics.median(served) / statistics.median(bare) - 1):+.2f} %"
    )


def _idle(events: list[dict[str, Any]]) -> list[float]:
    """Return the seconds for which the device was idle between one U-Net call, which is a graph, and the next."""
    done = [each for each in events if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    launched = Counter(each["args"]["correlation"] for each in done)
    calls = {correlation for correlation, kernels in launched.items() if kernels >= _KERNELS}
    gaps, gap, before, ended = [], 0.0, None, 0.0
    for each in sorted(done, key=lambda each: float(each["ts"])):
        of = each["args"]["correlation"] if each["args"]["correlation"] in calls else None
        if before is None or of != before:
            gap += max(0.0, each["ts"] - ended)
        if of is not None and of != before:
            gaps.append(gap / 1e6)
            gap = 0.0
        before, ended = of, max(ended, each["ts"] + each["dur"])
    return gaps[1:]  # the first call comes after the prompt


class Bare:
    """The engine's model, which draws the whole image of the bare loop's request in its first call.

    It loads on the device thread, as in the service: a second thread with its own OpenMP threads, even idle ones, makes
    those of the first stop spinning.
    """

    max_batch = 1
    overlaps = False
    _request: ImageRequest | None = None

    def load(self, settings: Settings) -> "Bare":
        self._ensemble = runtime.load(settings)
        self.info = self._ensemble.info
        return self

    async def bare_loop(self, engine: Engine, prompt: str) -> tuple[bytes, float]:
        """Return the image's bytes, and the seconds of the loop on the device thread."""
        self._request = default_request(self.info, prompt, seed=1)
        self._result: Future[tuple[bytes, float]] = Future()
        engine.submit(Submission("bare loop", self._request), lambda event: None)
        return await asyncio.wrap_future(self._result)

    def encode(self, request: ImageRequest) -> Any:
        if request is not self._request:
            return self._ensemble.encode(request)
        began = time.perf_counter()
        trajectory = self._ensemble.plan(request, self._ensemble.encode(request), 1)
        for _ in trajectory.stages:
            self._ensemble.launch([trajectory]).wait()
        pixels = self._ensemble.decode(trajectory)
        coded = images.code(pixels, images.JPEG, 95).data
        self._result.set_result((coded, time.perf_counter() - began))
        environment = self.info.environment
        return SimpleNamespace(pixels=pixels, warnings=(), environment=environment, stages=())  # already drawn

    def limit_batch(self, images: int) -> None:
        """Do nothing: a call of one image cannot be smaller."""

    def preview(self, trajectory: Any) -> Any:
        return self._ensemble.preview(trajectory)

    def plan(self, request: ImageRequest, conditioning: Any, seed: int) -> Any:
        if isinstance(conditioning, SimpleNamespace):  # of a bare loop
            return conditioning
        return self._ensemble.plan(request, conditioning, seed)

    def launch(self, trajectories: Any) -> LaunchedStep:
        return self._ensemble.launch(trajectories)

    def decode(self, trajectory: Any) -> Any:
        return trajectory.pixels if trajectory.stages == () else self._ensemble.decode(trajectory)


if __name__ == "__main__":
    asyncio.run(main())
