"""Compare the scheduler with first come, first served on two hundred concurrent gRPC requests.

One server per policy runs the embedded ensemble. In each round both get the same requests at the same times, one server
after the other, in the order A B B A. Each request has its own connection and the token of one of twenty callers, of
whom the k-th sends a share proportional to 1 / k. Only the scheduler gets the requests' deadlines; with first come, a
request that ends after its deadline counts as missed. Slowdown is the time that a request took over the time that one
like it takes on an idle server. Run: make bench-trace
"""

import argparse
import asyncio
import hashlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from bench import serving
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

FIRST_COME, SHORTEST = ORDERS = ("first-come", "shortest")
SIDES, STEPS, IMAGES = (64, 96, 128), (4, 8, 16), (1, 2, 4)
CALLERS = [f"caller-{k}" for k in range(1, 21)]
DEADLINE_SHARE = 0.3  # of the requests; a deadline is 2 to 10 times their time alone, plus one second
OPTIONS = [*serving.LOCAL, ("grpc.use_local_subchannel_pool", 1)]


@dataclass(frozen=True)
class Like:
    """The parameters that decide how long a request takes."""

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
    """A request and when it is sent."""

    at: float  # seconds from the start of the round
    like: Like
    caller: str
    alone: float = math.nan  # seconds that it takes on an idle server
    deadline: float = math.inf  # seconds from its arrival


@dataclass(frozen=True)
class Outcome:
    """The end of a request; `took` is its time in seconds, `eta` the first estimate that it got."""

    arrival: Arrival
    code: grpc.StatusCode
    took: float
    eta: float | None

    @property
    def in_time(self) -> bool:
        return self.code is grpc.StatusCode.OK and self.took <= self.arrival.deadline


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200, help="requests per round (default: 200)")
    parser.add_argument("--load", type=float, default=0.9, help="load of the device (default: 0.9)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first round (default: 1)")
    options = parser.parse_args()

    outcomes: dict[str, list[Outcome]] = {order: [] for order in ORDERS}
    with ExitStack() as stack:
        targets = {order: stack.enter_context(server(order)) for order in ORDERS}
        for number in range(options.rounds):
            orders = ORDERS if number % 2 else ORDERS[::-1]
            alone = [
                await measure_alone(targets[order]) for order in orders
            ]  # before each round, because the speed of a machine drifts
            alone_seconds = {like: statistics.mean(each[like] for each in alone) for like in kinds()}
            arrivals = trace(alone_seconds, options.requests, options.load, options.seed + number)
            print(f"round {number + 1}: {len(arrivals)} requests in {arrivals[-1].at:.0f} s", flush=True)
            for order in orders:
                outcomes[order] += await send_all(targets[order], order, arrivals)

            print_table(outcomes)


async def send_all(target: str, order: str, arrivals: list[Arrival]) -> list[Outcome]:
    """Send each request at its time and return the outcomes."""
    began = time.monotonic() + 1
    calls = (call(target, each, order is SHORTEST, number, began) for number, each in enumerate(arrivals))
    return list(await asyncio.gather(*calls))


def trace(alone: dict[Like, float], requests: int, load: float, seed: int) -> list[Arrival]:
    """Make Poisson arrivals of requests of all kinds."""
    choose = random.Random(seed)
    likes = choose.choices(list(alone), k=requests)
    callers = choose.choices(CALLERS, [1 / k for k in range(1, len(CALLERS) + 1)], k=requests)
    pause = sum(alone[like] for like in likes) / requests / load
    arrivals, now = [], 0.0
    for like, caller in zip(likes, callers, strict=True):
        deadline = 1 + alone[like] * choose.uniform(2, 10) if choose.random() < DEADLINE_SHARE else math.inf
        arrivals.append(Arrival(now, like, caller, alone[like], deadline))
        now += choose.expovariate(1 / pause)
    return arrivals


async def measure_alone(target: str) -> dict[Like, float]:
    """Measure the seconds that each kind of request takes on an idle server."""
    took = {}
    for number, like in enumerate(kinds()):
        outcome = await call(target, Arrival(0.0, like, CALLERS[0]), False, number, time.monotonic())
        assert outcome.code is grpc.StatusCode.OK
        took[like] = outcome.took
    return took


def kinds() -> list[Like]:
    return [Like(side, steps, images) for side in SIDES for steps in STEPS for images in IMAGES]


async def call(target: str, arrival: Arrival, with_deadline: bool, seed: int, began: float) -> Outcome:
    """Send one request at its time, with or without its deadline."""
    async with grpc.aio.insecure_channel(target, options=OPTIONS) as channel:
        await channel.channel_ready()
        await asyncio.sleep(max(0.0, began + arrival.at - time.monotonic()))
        sent, eta, code = time.monotonic(), None, grpc.StatusCode.OK
        try:
            stream = pb_grpc.TextToImageServiceStub(channel).StreamGenerate(
                arrival.like.request(seed),
                timeout=arrival.deadline if with_deadline and arrival.deadline < math.inf else None,
                metadata=(("authorization", f"Bearer {arrival.caller}"),),
            )
            async for event in stream:  # type: ignore[attr-defined]
                if eta is None and event.HasField("queued"):
                    eta = event.queued.eta.ToTimedelta().total_seconds()
        except grpc.aio.AioRpcError as error:
            code = error.code()
        return Outcome(arrival, code, time.monotonic() - sent, eta)


def print_table(outcomes: dict[str, list[Outcome]]) -> None:
    """Print a table of all outcomes so far."""
    deadlines = sum(each.arrival.deadline < math.inf for each in outcomes[SHORTEST])
    both = [ours.code is theirs.code is grpc.StatusCode.OK for ours, theirs in zip(*outcomes.values(), strict=True)]
    print(f"\n{len(both)} requests, {deadlines} with a deadline; times of the {sum(both)} that both orders finished:\n")
    columns = "order, mean slowdown, p50, p95, mean time, p95, p99, longest, deadlines missed, rejected, ETA error"
    print(f"| {columns.replace(', ', ' | ')} |\n|{' --- |' * 11}")
    for order in ORDERS:
        print(row(order, outcomes[order], both), flush=True)


def row(order: str, outcomes: list[Outcome], counted: list[bool]) -> str:
    done = [each for each, counts in zip(outcomes, counted, strict=True) if counts]
    slowdowns = np.array([each.took / each.arrival.alone for each in done])
    took = np.array([each.took for each in done])
    errors = [abs(each.eta - each.took) / each.took for each in done if each.eta is not None]
    rejected = sum(each.code is grpc.StatusCode.RESOURCE_EXHAUSTED for each in outcomes)
    missed = sum(each.code is grpc.StatusCode.DEADLINE_EXCEEDED for each in outcomes)
    assert sum(each.code is grpc.StatusCode.OK for each in outcomes) + missed + rejected == len(outcomes)
    cells = [
        order,
        f"{slowdowns.mean():.2f}",
        *(f"{value:.2f}" for value in np.percentile(slowdowns, (50, 95))),
        f"{took.mean():.2f} s",
        *(f"{value:.2f} s" for value in np.percentile(took, (95, 99))),
        f"{took.max():.2f} s",
        f"{sum(each.arrival.deadline < math.inf and not each.in_time for each in outcomes)}",
        f"{rejected}",
        f"{100 * statistics.median(errors):.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


@contextmanager
def server(order: str) -> Iterator[str]:
    """Run a server with a scheduling policy and yield its address once it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens")
        tokens.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in CALLERS))
        flags = ("--scheduling-policy", order, "--max-queue", "1000", "--tokens", str(tokens))
        with serving.served(*flags) as (target, _):
            yield target


if __name__ == "__main__":
    asyncio.run(main())
