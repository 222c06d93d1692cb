"""Compare the speed of the ensemble on a CPU with stock diffusers on the same weights, image by image.

Every way has a process of its own, so the service's process settings do not affect stock diffusers. In each round every
way makes the same image, and every second round reverses the order, so that a machine whose speed drifts does not
decide the ratio. The table has the median over the rounds of the first way's time over each way's, with its quartiles,
and the distance of the images from those of the first way.

On a machine with other work, GNU OpenMP's default makes stock diffusers' threads spin for most of an image. Set
GOMP_SPINCOUNT=4000 in the environment, like the service does for itself, to give all ways the same.

Run: make bench-cpu; ARGS="--ways stock off" leaves others out.
"""

import argparse
import math
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WAYS = ("stock", "stock-compiled", "off", "blocks")
WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPT = "cat napping"  # and the seed, for a text that was just encoded is not encoded again

Draw = Callable[[int], NDArray[np.uint8]]  # the picture of a seed


class Way:
    """A process that draws."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.pictures: list[NDArray[np.uint8]] = []
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        began = time.perf_counter()
        self._process = context.Process(target=work, args=(name, options, theirs), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is the connection's
        self.threads = self._connection.recv()
        self.ready = time.perf_counter() - began

    def draw(self, seed: int) -> None:
        self._connection.send(seed)
        seconds, picture = self._connection.recv()
        self.seconds.append(seconds)
        self.pictures.append(picture)

    def stop(self) -> int:
        """End the process; returns its page faults per image."""
        self._connection.send(None)
        faults: int = self._connection.recv()
        self._process.join()
        return faults


def work(name: str, options: argparse.Namespace, connection: Connection) -> None:
    """Run the process of a way: make one image, report it, and then make the images of the requested seeds."""
    draw = stock(options, name == "stock-compiled") if name.startswith("stock") else ours(options, name)
    draw(0)
    import torch

    connection.send(torch.get_num_threads())
    faults: list[int] = []
    while (seed := connection.recv()) is not None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began = time.perf_counter()
        picture = draw(seed)
        seconds = time.perf_counter() - began
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        connection.send((seconds, picture))
    connection.send(round(statistics.median(faults)))


def stock(options: argparse.Namespace, compiled: bool) -> Draw:
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from bench.stock import Stock

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    pipelines = Stock(options.base, options.refiner, "cpu", torch.float32, compiled)
    return lambda seed: np.asarray(
        pipelines.image(f"{PROMPT} {seed}", options.steps, seed, guidance_scale=options.guidance)
    )


def ours(options: argparse.Namespace, mode: Any) -> Draw:
    from dataclasses import replace

    from server import model
    from server.domain import default_request
    from server.ensemble import checkpoint

    experts = checkpoint.inspect(options.base, options.refiner)
    ensemble = model.load(experts, "cpu", compile=mode, compile_cache=None if mode == "off" else options.cache)

    def draw(seed: int) -> NDArray[np.uint8]:
        plain = default_request(ensemble.info, f"{PROMPT} {seed}", seed)
        request = replace(plain, steps=options.steps, guidance_scale=options.guidance, high_noise_frac=0.8)
        trajectory = ensemble.plan(request, ensemble.encode(request), seed)
        for _ in trajectory.stages:
            ensemble.step([trajectory])
        return ensemble.decode(trajectory)

    return draw


def decibels(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    squared = float(np.square(one.astype(float) - other).mean())
    return 10 * math.log10(255**2 / squared) if squared else math.inf


def largest(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return int(np.abs(one.astype(int) - other).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=WEIGHTS / "base")
    parser.add_argument("--refiner", type=Path, default=WEIGHTS / "refiner")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="compared with the first")
    parser.add_argument("--rounds", type=int, default=20, help="images of each way (default: 20)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5)
    parser.add_argument("--cache", type=Path, help="folder that keeps what is compiled")
    options = parser.parse_args()

    ways = [Way(name, options) for name in options.ways]
    load = os.getloadavg()[0]
    for round_ in range(options.rounds):
        for way in ways if round_ % 2 else ways[::-1]:
            way.draw(seed=round_)
    print(f"{platform.machine()}, {ways[0].threads} threads, {options.rounds} rounds, load {load:.1f} before them\n")
    columns = ("way", "ready", "image", "times as fast", "quartiles", "picture", "largest difference", "page faults")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    first = ways[0]
    for way in ways:
        ratios = [by_first / by_it for by_first, by_it in zip(first.seconds, way.seconds, strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        pairs = list(zip(way.pictures, first.pictures, strict=True))
        print(
            f"| {way.name} | {way.ready:.0f} s | {statistics.median(way.seconds):.3f} s | {ratio:.2f} "
            f"| {low:.2f} to {high:.2f} | {min(decibels(*pair) for pair in pairs):.1f} dB "
            f"| {max(largest(*pair) for pair in pairs)} | {way.stop()} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
