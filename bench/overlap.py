"""Measure the gain from encoding prompts and decoding images during the steps of other jobs.

Jobs with their own prompts are submitted to the engine at once, with and without overlap, in the order A B B A ..., so
that a drift of the device's speed affects both. The report has the seconds until the last image, the shares of that
time without a call of the model and without a step, the images per step, and the gaps between steps. The benchmark
fails unless every image has the same bytes with and without overlap.

Run: python -m bench.overlap. The model is the embedded ensemble, or the one of --base and --refiner. On a CPU, where
the service does not overlap calls, the ratio shows why.
"""

import argparse
import queue
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from server import model
from server.domain import ImageRequest, ModelInfo, default_request
from server.engine.engine import Engine
from server.engine.events import Event, Failed, Finished, ImageReady
from server.engine.interface import LaunchedStep, Submission
from server.engine.scheduling import QueueLimits
from server.ensemble import checkpoint

_EMBEDDED = Path(__file__).resolve().parent.parent / "weights"
_LOADING_SECONDS = 600.0
Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8, help="jobs submitted at once (default: 8)")
    parser.add_argument("--images", type=int, default=2, help="images per job (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after one warm-up round (default: 3)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--side", type=int, help="width and height in pixels (default: the model's native size)")
    parser.add_argument("--max-batch", type=int, default=1, help="images that share a network call (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16, fp16 or fp8 (default: auto)")
    parser.add_argument("--compile", default="off", help="off or blocks (default: off)")
    parser.add_argument("--compile-cache", type=Path, help="folder for compiled code")
    parser.add_argument("--base", type=Path, help="folder of the base (default: embedded)")
    parser.add_argument("--refiner", type=Path, help="folder of the refiner (default: embedded, or none with --base)")
    options = parser.parse_args()

    folders = (options.base, options.refiner) if options.base else (_EMBEDDED / "base", _EMBEDDED / "refiner")
    experts = checkpoint.inspect(*folders)
    ensemble = model.load(
        experts,
        options.device,
        options.precision,
        max_batch=options.max_batch,
        overlap=True,
        compile=options.compile,
        compile_cache=options.compile_cache,
        compile_sizes=[(options.side, options.side)] if options.side else (),
    )
    info = ensemble.info
    request = default_request(info, "cat napping")
    request = replace(request, steps=options.steps or request.steps)
    if options.side is not None:
        request = replace(request, width=options.side, height=options.side)
    requests = [
        replace(request, prompt=f"cat napping {job}", seeds=tuple(range(100 * job, 100 * job + options.images)))
        for job in range(options.jobs)
    ]

    runs: dict[bool, list[Run]] = {False: [], True: []}
    expected: list[NDArray[np.uint8]] | None = None
    for round_number in range(-1, options.rounds):
        for overlaps in (False, True) if round_number % 2 else (True, False):
            result = run(ensemble, requests, overlaps)
            expected = result.images if expected is None else expected
            assert len(result.images) == len(expected) == options.jobs * options.images
            assert all(map(np.array_equal, result.images, expected)), "overlap must not change an image's bytes"
            if round_number >= 0:
                runs[overlaps].append(result)

    print_report(info, request, options, runs)


def print_report(
    info: ModelInfo, request: ImageRequest, options: argparse.Namespace, runs: dict[bool, list["Run"]]
) -> None:
    """Print the medians over all rounds, and how much faster overlap is."""
    print(
        f"{info.name} on {info.device} in {info.precision}, compiled: {info.environment.compiled}, "
        f"{request.width} x {request.height}, {request.steps} steps, {options.jobs} jobs of {options.images} images, "
        f"{options.max_batch} to a call, median of {options.rounds} rounds; all {options.jobs * options.images} images "
        "equal with and without overlap"
    )
    print(
        f"{'':12}{'seconds':>10}{'images/s':>10}{'no call':>10}{'no step':>10}{'per step':>10}"
        f"{'encode':>12}{'decode':>12}{'median gap':>12}{'longest gap':>12}"
    )
    for overlaps, results in runs.items():
        figures = [statistics.median(getattr(each, name) for each in results) for name in Run.FIGURES]
        seconds, no_call, no_step, shared, *times = figures
        print(
            f"{'overlapping' if overlaps else 'sequential':12}{seconds:10.3f}"
            f"{options.jobs * options.images / seconds:10.3f}{no_call:10.1%}{no_step:10.1%}{shared:10.2f}"
            + "".join(f"{1e3 * each:9.2f} ms" for each in times)
        )
    ratios = [a.seconds / b.seconds for a, b in zip(runs[False], runs[True], strict=True)]
    by_round = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"overlap is {statistics.median(ratios):.3f} x as fast (by round: {by_round})")


@dataclass
class Run:
    """One run of all requests: the images in order, the begin and end of each call, and the images per step."""

    FIGURES = ("seconds", "no_call", "no_step", "images_per_step", "encode", "decode", "median_gap", "longest_gap")

    images: list[NDArray[np.uint8]]
    seconds: float
    calls: dict[str, list[tuple[float, float]]]
    images_per_step: float

    @property
    def no_call(self) -> float:
        return 1 - _covered([each for calls in self.calls.values() for each in calls]) / self.seconds

    @property
    def no_step(self) -> float:
        return 1 - _covered(self.calls["step"]) / self.seconds

    @property
    def encode(self) -> float:
        return statistics.median(end - begin for begin, end in self.calls["encode"])

    @property
    def decode(self) -> float:
        return statistics.median(end - begin for begin, end in self.calls["decode"])

    @property
    def median_gap(self) -> float:
        return statistics.median(self._gaps())

    @property
    def longest_gap(self) -> float:
        return max(self._gaps())

    def _gaps(self) -> list[float]:
        """Return the seconds from the end of each step to the beginning of the next."""
        return [begin - end for (_, end), (begin, _) in pairwise(self.calls["step"])]


def _covered(calls: list[tuple[float, float]]) -> float:
    """Return the seconds in which at least one of the calls was in flight."""
    covered, until = 0.0, 0.0
    for begin, end in sorted(calls):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def run(ensemble: model.Ensemble, requests: Sequence[ImageRequest], overlaps: bool) -> Run:
    timed = Timed(ensemble, overlaps)
    engine = Engine(QueueLimits(jobs=len(requests)))
    engine.start(lambda: timed).result(timeout=_LOADING_SECONDS)
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    began = time.perf_counter()
    for job, request in enumerate(requests):

        def put(event: Event, job: int = job) -> None:
            events.put((job, event))

        engine.submit(Submission(f"job {job}", request), put)
    images: dict[tuple[int, int], NDArray[np.uint8]] = {}
    ended = 0
    while ended < len(requests):
        job, event = events.get()
        if isinstance(event, ImageReady):
            images[job, event.index] = event.pixels
        elif isinstance(event, Failed):
            raise event.error
        ended += isinstance(event, Finished)
    seconds = time.perf_counter() - began
    engine.stop()
    engine.join(60)
    return Run(
        [images[place] for place in sorted(images)], seconds, timed.calls, timed.images / len(timed.calls["step"])
    )


@dataclass
class Timed:
    """The ensemble with a record of when its calls began and ended; `overlaps` decides whether they overlap."""

    ensemble: model.Ensemble
    overlaps: bool
    images: int = 0  # summed over all steps
    calls: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {"encode": [], "step": [], "decode": []}
    )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ensemble, name)

    def encode(self, request: ImageRequest) -> Any:
        return self._time("encode", self.ensemble.encode, request)

    def launch(self, trajectories: Sequence[Any]) -> LaunchedStep:
        self.images += len(trajectories)
        began = time.perf_counter()
        launched = self.ensemble.launch(trajectories)

        def wait() -> None:
            launched.wait()
            self.calls["step"].append((began, time.perf_counter()))

        return LaunchedStep(wait)

    def decode(self, trajectory: Any) -> NDArray[np.uint8]:
        return self._time("decode", self.ensemble.decode, trajectory)

    def _time(self, kind: str, call: Callable[[Any], Result], argument: Any) -> Result:
        began = time.perf_counter()
        result = call(argument)
        self.calls[kind].append((began, time.perf_counter()))
        return result


if __name__ == "__main__":
    main()
