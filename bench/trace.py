"""Two hundred callers at once through gRPC: the schedule against first come, first served, for real.

For each order a server of its own runs on the embedded ensemble and gets the same requests at the same times, each from
a connection of its own. A request's slowdown is what it took over what its like takes alone on the same server.
Run: python -m bench.trace
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import numpy as np

from text_to_image_client._service import local_launch, running
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

ORDERS = ("first-come", "shortest")
SIDES, STEPS, IMAGES = (64, 128, 192), (4, 8, 16), (1, 2, 4)
WITH_DEADLINE = 0.3  # share of the requests; of 2 to 10 times what they take alone, and one second
_READY_SECONDS = 300.0
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class Like:
    """What decides how long a request takes."""

    side: int
    steps: int
    images: int

    def request(self, seed: int) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            data=pb.TaskData(prompt="cat napping"),
            parameter=pb.TaskParameter(n=self.images, seed=seed),
            sampling=pb.Sampling(steps=self.steps, width=self.side, height=self.side),
            output=pb.Output(raw=True),
        )


@dataclass(frozen=True)
class Arrival:
    """A request that is to be made."""

    at: float  # seconds from the beginning
    like: Like
    alone: float  # seconds
    deadline: float | None  # seconds from its arrival


@dataclass(frozen=True)
class Outcome:
    """How a request ended, after so many seconds; `eta` is what it was told first."""

    arrival: Arrival
    code: grpc.StatusCode
    took: float
    eta: float | None


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--load", type=float, default=0.9, help="of the device, were the requests evenly spread")
    options = parser.parse_args()

    with server("first-come") as target:
        alone = await measured_alone(target)
    arrivals = trace(alone, options.requests, options.load, seed=1)
    deadlines = sum(each.deadline is not None for each in arrivals)
    print(f"{len(arrivals)} requests in {arrivals[-1].at:.0f} s, {deadlines} of them with a deadline\n")
    columns = "order, mean slowdown, p50, p95, mean time, p95, p99, longest, deadlines missed, refused, ETA error"
    print(f"| {columns.replace(', ', ' | ')} |\n|{' --- |' * 11}")
    for order in ORDERS:
        with server(order) as target:
            await measured_alone(target, repeats=1)  # so that each order knows what calls cost
            began = time.monotonic() + 1
            outcomes = await asyncio.gather(
                *(call(target, each, number, began) for number, each in enumerate(arrivals))
            )
        print(row(order, outcomes))


def trace(alone: dict[Like, float], requests: int, load: float, seed: int) -> list[Arrival]:
    """Poisson arrivals of requests of all kinds."""
    choose = random.Random(seed)
    likes = choose.choices(list(alone), k=requests)
    pause = sum(alone[like] for like in likes) / requests / load
    arrivals, now = [], 0.0
    for like in likes:
        deadline = 1 + alone[like] * choose.uniform(2, 10) if choose.random() < WITH_DEADLINE else None
        arrivals.append(Arrival(now, like, alone[like], deadline))
        now += choose.expovariate(1 / pause)
    return arrivals


async def measured_alone(target: str, repeats: int = 3) -> dict[Like, float]:
    """Seconds that each kind of request takes when it has the service to itself."""
    took: dict[Like, list[float]] = {}
    for number, like in enumerate(kinds() * repeats):
        outcome = await call(target, Arrival(0.0, like, 0.0, None), number, time.monotonic())
        assert outcome.code is grpc.StatusCode.OK
        took.setdefault(like, []).append(outcome.took)
    return {like: statistics.median(seconds) for like, seconds in took.items()}


def kinds() -> list[Like]:
    return [Like(side, steps, images) for side in SIDES for steps in STEPS for images in IMAGES]


async def call(target: str, arrival: Arrival, seed: int, began: float) -> Outcome:
    """Make one request when its time has come, on a connection of its own."""
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        await channel.channel_ready()
        await asyncio.sleep(max(0.0, began + arrival.at - time.monotonic()))
        sent, eta, code = time.monotonic(), None, grpc.StatusCode.OK
        try:
            stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(
                arrival.like.request(seed), timeout=arrival.deadline
            )
            async for event in stream:
                if eta is None and event.HasField("queued"):
                    eta = event.queued.eta.ToTimedelta().total_seconds()
        except grpc.aio.AioRpcError as error:
            code = error.code()
        return Outcome(arrival, code, time.monotonic() - sent, eta)


def row(order: str, outcomes: list[Outcome]) -> str:
    done = [each for each in outcomes if each.code is grpc.StatusCode.OK]
    slowdowns = np.array([each.took / each.arrival.alone for each in done])
    took = np.array([each.took for each in done])
    errors = [abs(each.eta - each.took) / each.took for each in done if each.eta is not None]
    missed, refused = (
        sum(each.code is code for each in outcomes)
        for code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
    )
    assert len(done) + missed + refused == len(outcomes), {each.code for each in outcomes}
    told = [
        order,
        f"{slowdowns.mean():.2f}",
        *(f"{value:.2f}" for value in np.percentile(slowdowns, (50, 95))),
        f"{took.mean():.2f} s",
        *(f"{value:.2f} s" for value in np.percentile(took, (95, 99))),
        f"{took.max():.2f} s",
        f"{missed}",
        f"{refused}",
        f"{100 * statistics.median(errors):.0f} %",
    ]
    return f"| {' | '.join(told)} |"


@contextmanager
def server(order: str) -> Iterator[str]:
    """A server process of that order; its address, once it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        launch = local_launch(Path(folder), gpu=False)
        flags = ("--schedule", order, "--max-queue", "1000", "--log-level", "warning")
        with running(replace(launch, command=(*launch.command, *flags)), Path(folder)) as service:
            yield service.wait_until_serving(_READY_SECONDS)


if __name__ == "__main__":
    asyncio.run(main())
