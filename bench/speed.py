"""Compare the ensemble's speed on a GPU with its floor, and with stock diffusers in the same run.

The floor is the operations of the networks over the measured rate of bf16 matrix products on this device. The table has
the times of a base step with guidance, a refiner step, a decoding, a whole image, and an image of 8 base steps without
guidance, like few-step checkpoints make it. The ways are diffusers' own layers (off), fused ones (blocks), both in bf16
or fp8, and stock diffusers. Each way's first step, final latents and image are compared with those of the first way.

Run: python -m bench.full_size FOLDER, then
python -m bench.speed --base FOLDER/base --refiner FOLDER/refiner --ways off blocks blocks-fp8 stock stock-compiled
"""

import argparse
import gc
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from bench.cpu import decibels
from bench.stock import Stock
from server import model
from server.acceleration.compilation import Mode
from server.domain import ImageRequest, Stage, default_request
from server.ensemble import checkpoint, devices
from server.ensemble.trajectory import Trajectory

WAYS = ("off", "blocks", "blocks-fp8", "offload", "offload-fp8", "stock", "stock-compiled")
FEW = 8  # steps of a checkpoint that needs no more


@dataclass
class Figures:
    """Seconds; relative errors of a step and of the final latents, the image's in dB; bytes of memory at most."""

    ready: float
    base: float
    refiner: float
    decode: float
    image: float
    few: float
    memory: int
    error: float = math.nan
    latents: float = math.nan
    psnr: float = math.nan


@dataclass
class Drawn:
    """What one request came to: how the first step moved the latents, the final ones, and the image, if finite."""

    moved: torch.Tensor
    latents: torch.Tensor
    pixels: NDArray[np.uint8] | None

    def compare(self, figures: Figures, first: "Drawn") -> None:
        figures.error = float((self.moved - first.moved).norm() / first.moved.norm())
        figures.latents = float((self.latents - first.latents).norm() / first.latents.norm())
        if self.pixels is not None and first.pixels is not None:
            figures.psnr = decibels(self.pixels, first.pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--refiner", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["off", "blocks", "blocks-fp8", "stock"])
    parser.add_argument("--precision", default="bf16", help="bf16 or fp16 (default: bf16)")
    parser.add_argument("--steps", type=int, default=40, help="a fifth of them the refiner's (default: 40)")
    parser.add_argument("--images", type=int, default=3, help="images timed for each way (default: 3)")
    parser.add_argument("--cache", type=Path, help="folder that keeps what is compiled")
    parser.add_argument("--json", type=Path, help="file to write the figures to as well")
    options = parser.parse_args()
    if options.ways[0] != "off":
        parser.error("--ways has to begin with off, whose operations are counted and whose image is compared with")

    rate = _matrix_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s of bf16 products")
    operations: dict[str, float] = {}
    first: Drawn | None = None
    figures: dict[str, Figures] = {}
    for way in options.ways:
        if way.startswith("stock"):
            figures[way] = _stock(options, compiled=way == "stock-compiled")
        else:
            figures[way], drawn = _ours(options, way, operations)
            first = first or drawn
            drawn.compare(figures[way], first)
        print(way, figures[way], flush=True)
        gc.collect()
        torch.cuda.empty_cache()

    refined = options.steps // 5
    floors = {part: count / rate for part, count in operations.items()}
    floors["image"] = (options.steps - refined) * floors["base"] + refined * floors["refiner"] + floors["decode"]
    floors["few"] = FEW * floors["base"] / 2 + floors["decode"]
    print("| way | ready | " + " | ".join(floors) + " | error of a step | of latents | image | device memory |")
    print("|" + " --- |" * (len(floors) + 6))
    print("| floor | | " + " | ".join(f"{1e3 * floor:.1f} ms" for floor in floors.values()) + " | | | | |")
    for way, of_it in figures.items():
        times = asdict(of_it)
        parts = " | ".join(f"{1e3 * times[part]:.1f} ms, {times[part] / floors[part]:.2f} x" for part in floors)
        errors = f"{of_it.error:.2%} | {of_it.latents:.2%} | {of_it.psnr:.1f} dB"
        print(f"| {way} | {of_it.ready:.1f} s | {parts} | {errors} | {of_it.memory / 2**30:.1f} GiB |")
    if options.json:
        by_way = {way: asdict(of_it) for way, of_it in figures.items()}
        options.json.write_text(json.dumps({"rate": rate, "floors": floors, "ways": by_way}, indent=2) + "\n")


def _ours(options: argparse.Namespace, way: str, operations: dict[str, float]) -> tuple[Figures, Drawn]:
    """Measure a way of the ensemble; returns its figures and the results of one request."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    mode, _, precision = way.partition("-")
    offload = mode == "offload"
    ensemble = model.load(
        checkpoint.inspect(options.base, options.refiner),
        "cuda",
        precision or options.precision,
        compile="off" if offload else cast(Mode, mode),
        compile_cache=options.cache,
        offload=offload,
    )
    ready = time.perf_counter() - began
    request = replace(default_request(ensemble.info, "cat napping", seed=0), steps=options.steps, high_noise_frac=0.8)

    trajectory = _planned(ensemble, request)
    before = trajectory.latents
    ensemble.step([trajectory])
    moved = trajectory.latents.cpu() - before
    _finish(ensemble, trajectory)
    try:
        pixels = ensemble.decode(trajectory)
    except model.NonFiniteImage:  # as random weights may make
        pixels = None
    drawn = Drawn(moved, trajectory.latents.cpu(), pixels)

    times: dict[str, list[float]] = {"base": [], "refiner": [], "decode": []}
    seconds = []
    for image in range(options.images):
        another = replace(request, prompt=f"cat napping {image}")  # for a text that was just encoded is not encoded
        with _timed() as whole:
            trajectory = _planned(ensemble, another)
            for stage, took in zip(trajectory.stages, _finish(ensemble, trajectory), strict=True):
                times["base" if stage is Stage.BASE else "refiner"].append(took)
            with _timed() as decoding:
                _decoded(ensemble, trajectory)
            times["decode"].append(decoding())
        seconds.append(whole())
    memory = torch.cuda.max_memory_allocated()
    few = _few_steps(ensemble, options.images)
    if not operations:
        operations |= _operations(ensemble, request)
    medians = {part: statistics.median(some) for part, some in times.items()}
    return Figures(ready, **medians, image=statistics.median(seconds), few=few, memory=memory), drawn


def _few_steps(ensemble: model.Ensemble, images: int) -> float:
    """Seconds of an image that the base makes alone in a few steps without guidance."""
    plain = default_request(ensemble.info, "cat napping", seed=0)
    request = replace(plain, steps=FEW, guidance_scale=1.0, high_noise_frac=1.0)
    if ensemble.compiles:
        ensemble.use_compiled(ensemble.compile_calls([request]))
    seconds = []
    for image in range(images):
        another = replace(request, prompt=f"cat napping {image}")
        with _timed() as took:
            trajectory = _planned(ensemble, another)
            _finish(ensemble, trajectory)
            _decoded(ensemble, trajectory)
        seconds.append(took())
    return statistics.median(seconds)


def _planned(ensemble: model.Ensemble, request: ImageRequest) -> Trajectory:
    return ensemble.plan(request, ensemble.encode(request), request.seeds[0])


def _finish(ensemble: model.Ensemble, trajectory: Trajectory) -> list[float]:
    """Make all remaining steps; returns the seconds of each, from the end of the step before.

    A device that looks ahead is in the next step when one has ended. Waiting for that would make it idle.
    """
    ends = [time.perf_counter()]
    while trajectory.position < len(trajectory.stages):
        ensemble.step([trajectory])
        ends.append(time.perf_counter())
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _decoded(ensemble: model.Ensemble, trajectory: Trajectory) -> None:
    """Decode noise in place of what random weights make, which need not be finite."""
    trajectory.latents = torch.randn(trajectory.latents.shape, generator=torch.Generator().manual_seed(0)).cuda()
    ensemble.decode(trajectory)


def _operations(ensemble: model.Ensemble, request: ImageRequest) -> dict[str, float]:
    """Floating-point operations of each call, from the shapes that it multiplies."""
    counted = {}
    trajectory = _planned(ensemble, request)
    for name, stage in (("base", Stage.BASE), ("refiner", Stage.REFINER)):
        trajectory.position = trajectory.stages.index(stage)
        counted[name] = _counted(partial(ensemble.step, [trajectory]))
    return counted | {"decode": _counted(partial(_decoded, ensemble, trajectory))}


def _counted(call: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _stock(options: argparse.Namespace, compiled: bool) -> Figures:
    """Measure the two pipelines of diffusers, run and optionally compiled like its documentation does."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    pipelines = Stock(options.base, options.refiner, "cuda", devices.PRECISIONS[options.precision], compiled)

    def image() -> None:
        pipelines.image("cat napping", options.steps, seed=0)

    image()
    ready = time.perf_counter() - began
    seconds = []
    for _ in range(options.images):
        with _timed() as took:
            image()
        seconds.append(took())
    memory = torch.cuda.max_memory_allocated()
    return Figures(ready, math.nan, math.nan, math.nan, statistics.median(seconds), math.nan, memory)


def _matrix_rate(side: int = 8192, runs: int = 30) -> float:
    """Operations a second of bf16 products of random square matrices, the median."""
    one, other = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    taken = []
    for _ in range(runs):
        with _timed() as took:
            one @ other
        taken.append(took())
    return float(2 * side**3 / statistics.median(taken[5:]))


@contextmanager
def _timed() -> Iterator[Callable[[], float]]:
    """Yield a function that returns the seconds of the device and the host inside, after the end."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    ended = began
    yield lambda: ended - began
    torch.cuda.synchronize()
    ended = time.perf_counter()


if __name__ == "__main__":
    main()
