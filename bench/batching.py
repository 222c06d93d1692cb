"""Measure what sharing network calls gains and costs.

For every batch size: images per second when every call is full, and the seconds of one image alone in its calls, which
take as long as full ones. Decoding, one image at a time, is included. The sizes alternate, so that a machine whose
speed drifts slows all of them. It also checks that an image has the same bytes in both cases.

Run: python -m bench.batching. T2I_BASE, T2I_REFINER, T2I_DEVICE and T2I_PRECISION name the model, by default the
embedded ensemble.
"""

import argparse
import statistics
import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from server import model
from server.domain import ImageRequest, default_request
from server.ensemble import checkpoint
from server.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="images to a call (default: 1 2 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one that does not (default: 5)")
    parser.add_argument("--side", type=int, help="width and height in pixels (default: what the model was trained on)")
    options = parser.parse_args()

    settings = Settings()
    largest = max(options.batches)
    ensemble = model.load(checkpoint.inspect(*settings.experts), settings.device, settings.precision, max_batch=largest)
    request = default_request(ensemble.info, "cat napping", seed=7)
    if options.side is not None:
        request = replace(request, width=options.side, height=options.side)

    full: dict[int, list[float]] = {size: [] for size in options.batches}
    alone: dict[int, list[float]] = {size: [] for size in options.batches}
    for round_number in range(-1, options.rounds):
        for size in options.batches:
            ensemble.limit_batch(size)
            together, seconds = images(ensemble, request, [*range(1, size), 7])
            (single,), seconds_alone = images(ensemble, request, [7])
            assert np.array_equal(single, together[-1]), "an image must have the same bytes in any company"
            if round_number >= 0:
                full[size].append(size / seconds)
                alone[size].append(seconds_alone)

    info = ensemble.info
    print(
        f"{info.name} on {info.device} in {info.precision}, {request.width} x {request.height}, {request.steps} steps, "
        f"guidance {request.guidance_scale:g}, median of {options.rounds} rounds; same bytes alone and in company"
    )
    first = statistics.median(full[options.batches[0]])
    for size in options.batches:
        rate = statistics.median(full[size])
        print(
            f"{size} to a call: {rate:.3f} images/s ({rate / first:.2f} x) when full, "
            f"one image alone {statistics.median(alone[size]):.3f} s"
        )


def images(ensemble: model.Ensemble, request: ImageRequest, seeds: list[int]) -> tuple[list[NDArray[np.uint8]], float]:
    """Make the images of these seeds together; returns them and the seconds from the first step on."""
    conditioning = ensemble.encode(request)
    trajectories = [ensemble.plan(request, conditioning, seed) for seed in seeds]
    began = time.perf_counter()
    for _ in trajectories[0].stages:
        ensemble.step(trajectories)
    decoded = [ensemble.decode(trajectory) for trajectory in trajectories]
    return decoded, time.perf_counter() - began


if __name__ == "__main__":
    main()
