"""Measure several replicas: Ray's overhead, throughput, calls lost with killed replicas, and a simulated thousand.

Run: make bench-scale. The first part starts `python -m server` and Ray Serve with deploy/ray/cpu.yaml on this machine,
both with T2I_BASE and T2I_REFINER, or the embedded ensemble. Every process has one thread (OMP_NUM_THREADS=1). The
second part simulates replicas with one scheduling core each, behind routers of several policies.
"""

import argparse
import asyncio
import heapq
import math
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from ray_serving import RayServe, configuration
from serving import PATIENCE, ServerProcess

from bench.scheduling import UNBOUNDED
from bench.serving import LOCAL
from server.domain import Stage
from server.engine.call_times import CallKind, CallTimes
from server.engine.scheduling import Schedule
from server.engine.task import ImageTask
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

# Seconds of one call at 1024 x 1024 with guidance on an H200, --compile blocks (docs/benchmarks/gpu.md). The first is
# the rest of an image's time.
SECONDS = {Stage.ENCODE: 0.011, Stage.BASE: 0.027, Stage.REFINER: 0.0289, Stage.DECODE: 0.0209}
CALLS = {Stage.ENCODE: 1, Stage.BASE: 32, Stage.REFINER: 8, Stage.DECODE: 1}
REPLICAS = (1, 2, 4, 8, 16, 64, 256, 1000)
WARM_UP = 0.2  # the share of jobs that are not counted, while queues fill


# Measured on this machine.


@contextmanager
def on_ray(variables: dict[str, str]) -> Iterator[RayServe]:
    """Run one replica under Ray Serve."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    ray = RayServe(folder, lambda ports: replicas(ports, variables, 1))
    try:
        ray.wait_for_log("replica: serving")
        yield ray
    finally:
        ray.stop()
        shutil.rmtree(folder, ignore_errors=True)


def replicas(ports: tuple[int, int], variables: dict[str, str], count: int) -> dict[str, Any]:
    return configuration(ports, variables, autoscaling_config=None, num_replicas=count)


async def overhead(bare: Any, ray: Any, pairs: int, calls: int) -> None:
    """Print the times of a call, a stream and an event with and without Ray, in the order A B B A ..."""
    for stub in (bare, ray):  # a finished job of many events, to attach to
        await _events(
            stub.StreamGenerate(_request(1, steps=100, request_id="finished", on_disconnect=pb.ON_DISCONNECT_DETACH))
        )
    took: dict[str, dict[str, list[float]]] = {}
    for pair in range(-1, pairs):  # the first warms up
        ways = [("bare", bare), ("ray", ray)]
        for way, stub in ways if pair % 2 else reversed(ways):
            for name, seconds in [("call", await _calls(stub, calls)), *(await _streams(stub)).items()]:
                if pair >= 0:
                    took.setdefault(name, {}).setdefault(way, []).append(seconds)
    names = {
        "call": f"GetModel, median of {calls} one after the other",
        "first": "the first event of a stream",
        "event": "each event of a finished job's stream",
        "ran": "the engine's time for a job of one image",
        "beyond": "its stream in addition to that",
    }
    print(f"| medians of {pairs} rounds | bare server | Ray | more |\n| --- | --- | --- | --- |")
    for name, words in names.items():
        one, other = (1000 * statistics.median(took[name][way]) for way in ("bare", "ray"))
        print(f"| {words} | {one:.2f} ms | {other:.2f} ms | {other - one:+.2f} ms |", flush=True)


async def _calls(stub: Any, calls: int) -> float:
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        await stub.GetModel(pb.GetModelRequest())
        took.append(time.perf_counter() - began)
    return statistics.median(took)


async def _events(stream: Any) -> tuple[list[float], pb.StreamGenerateResponse]:
    """Return the arrival time of each event, and the last event."""
    began = time.perf_counter()
    times = []
    async for each in stream:
        times.append(time.perf_counter() - began)
        event = each
    return times, event


async def _streams(stub: Any) -> dict[str, float]:
    again, _ = await _events(stub.Attach(pb.AttachRequest(request_id="finished")))
    times, last = await _events(stub.StreamGenerate(_request(1)))
    metadata = last.done.metadata
    engine = metadata.waited.ToTimedelta().total_seconds() + metadata.ran.ToTimedelta().total_seconds()
    return {
        "event": (again[-1] - again[0]) / (len(again) - 1),
        "first": times[0],
        "ran": engine,
        "beyond": times[-1] - engine,
    }


def _request(seed: int, steps: int | None = None, **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        data=pb.TaskData(prompt="cat napping"),
        parameter=pb.TaskParameter(seed=seed),
        sampling=pb.Sampling(steps=steps),
        **fields,
    )


@dataclass
class Load:
    """`callers` callers with one call at a time each, until `stopping`. `took` has the seconds of successful calls."""

    stub: Any
    callers: int
    outcomes: Counter[str] = field(default_factory=Counter)
    took: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    stopping: bool = False

    async def run(self) -> None:
        await asyncio.gather(*(self._call(caller) for caller in range(self.callers)))

    async def _call(self, caller: int) -> None:
        seed = 1000 * caller
        while not self.stopping:
            seed += 1
            began = time.perf_counter()
            try:
                await self.stub.Generate(_request(seed))
            except grpc.aio.AioRpcError as error:
                self.outcomes[error.code().name] += 1
                await asyncio.sleep(0.1)  # like a client that retries
            else:
                self.outcomes["OK"] += 1
                self.took.append(time.perf_counter() - began)

    async def under(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` under load."""
        running = asyncio.create_task(self.run())
        await work()
        self.stopping = True
        await running


async def throughput(ray: RayServe, stub: Any, count: int, callers: int, jobs: int) -> None:
    """Print a row: `jobs` jobs from `callers` callers, with `count` replicas."""
    before = len(ray.lines)
    load = Load(stub, callers)

    async def enough() -> None:
        while sum(load.outcomes.values()) < jobs:
            await asyncio.sleep(0.01)

    await load.under(enough)
    elapsed = time.perf_counter() - load.began
    shares = Counter(re.findall(r"pid=(\d+).*finished after", "\n".join(ray.lines[before:])))
    imbalance = max(shares.values()) / (sum(shares.values()) / count)
    cells = [f"{np.percentile(load.took, p):.2f}" for p in (50, 95, 99)]
    print(
        f"| {count} | {len(load.took) / elapsed:.2f} | " + " | ".join(cells) + f" | {imbalance:.2f} "
        f"| {_summary(load.outcomes)} |",
        flush=True,
    )


def _summary(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))


def rescale(ray: RayServe, variables: dict[str, str], was: int, count: int) -> None:
    """Change the number of replicas, and wait until the new ones serve or the processes of the others have ended."""
    before = len(ray.lines)
    ray.deploy(replicas(ray.ports, variables, count))
    if count > was:
        ray.wait_for_log(rf"(replica: serving[^\0]*){{{count - was}}}", before)
    until = time.monotonic() + PATIENCE
    while len(ray.processes("ServeReplica")) > count:
        if time.monotonic() > until:
            raise TimeoutError(f"more than {count} replicas are left after {PATIENCE} s")
        time.sleep(0.05)


async def rescaled(ray: RayServe, stub: Any, variables: dict[str, str], callers: int) -> None:
    """Print the outcomes of calls while the number of replicas changes from one to two and back."""
    for was, count in ((1, 2), (2, 1)):
        load = Load(stub, callers)
        await load.under(partial(asyncio.to_thread, rescale, ray, variables, was, count))
        print(f"| to {count} | {time.perf_counter() - load.began:.0f} s | {_summary(load.outcomes)} |", flush=True)


async def killed(ray: RayServe, stub: Any, what: str, callers: int) -> None:
    """Print the outcomes of calls while the processes of the title `what` are killed one after the other."""
    load = Load(stub, callers)

    async def kill() -> None:
        for process in ray.processes(what):
            before = len(ray.lines)
            enough = sum(load.outcomes.values()) + 2 * callers
            process.kill()
            again = "replica: serving" if what == "ServeReplica" else "Proxy starting"
            await asyncio.to_thread(ray.wait_for_log, again, before)
            while sum(load.outcomes.values()) < enough or not load.took:
                await asyncio.sleep(0.05)

    await load.under(kill)
    print(f"| {what} | {time.perf_counter() - load.began:.0f} s | {_summary(load.outcomes)} |", flush=True)


async def measured(options: argparse.Namespace) -> None:
    variables = {name: value for name, value in os.environ.items() if name.startswith("T2I_")}
    server = ServerProcess(OMP_NUM_THREADS="1").wait_until_ready()
    try:
        with on_ray(variables) as ray:
            async with (
                grpc.aio.insecure_channel(server.target, LOCAL) as straight,
                grpc.aio.insecure_channel(ray.target, [*LOCAL, ("grpc.enable_retries", 0)]) as through,
            ):
                bare, stub = (pb_grpc.TextToImageServiceStub(channel) for channel in (straight, through))
                info = await stub.GetModel(pb.GetModelRequest())  # type: ignore[misc]
                print(f"{info.name} on {info.device}, {os.cpu_count()} cores, one thread in each process.\n")
                await overhead(bare, stub, options.pairs, options.calls)
                server.stop()
                print(f"\n{options.callers} callers with one call at a time each:\n")
                print("| replicas | images/s | p50 s | p95 | p99 | busiest over mean | outcomes |")
                print("|" + " --- |" * 7)
                await throughput(ray, stub, 1, options.callers, options.jobs)
                for was, count in ((1, 2), (2, 4)):
                    rescale(ray, variables, was, count)
                    await throughput(ray, stub, count, options.callers, options.jobs)
                rescale(ray, variables, 4, 2)
                print("\n| killed under load, no retries | in | outcomes |\n| --- | --- | --- |")
                await killed(ray, stub, "ServeReplica", options.callers)
                await killed(ray, stub, "ProxyActor", options.callers)
                rescale(ray, variables, 2, 1)
                print("\n| scaled under load | in | outcomes |\n| --- | --- | --- |")
                await rescaled(ray, stub, variables, options.callers)
    finally:
        server.stop()


# Simulated.


class Replica:
    """A device with its scheduling core, on simulated time that `advance` moves."""

    def __init__(self) -> None:
        self.times = CallTimes()
        self.schedule = Schedule(UNBOUNDED, self.times)
        self.now = 0.0
        self.busy = 0.0
        self.jobs: dict[ImageTask, int] = {}
        self.ended: list[float] = []  # heap of the ends after the last call of `length`

    def advance(self, until: float, finishes: "np.ndarray[Any, Any]", paces: list[float]) -> None:
        """Simulate calls until this time. The last one may end after it."""
        while self.now < until:
            batch = self.schedule.choose(self.now)
            if not batch:
                self.now = until
                break
            (task,) = batch
            kind, count = task.calls[0]
            cost = SECONDS[kind.stage] * paces[self.jobs[task]]
            horizon = min(until, self.schedule.holds_until(self.now))
            calls = count if horizon == math.inf else min(count, max(1, math.ceil((horizon - self.now) / cost)))
            self.now += calls * cost
            self.busy += calls * cost
            self.schedule.record_call(batch, calls * cost, calls)
            if not task.calls:
                self.schedule.remove(task, self.now)
                finishes[self.jobs.pop(task)] = self.now
                heapq.heappush(self.ended, self.now)

    def length(self, now: float) -> int:
        """Return the number of jobs at this time, the running one included."""
        while self.ended and self.ended[0] <= now:
            heapq.heappop(self.ended)
        return len(self.schedule) + len(self.ended)


def simulate(count: int, router: str, load: float, jobs: int, seed: int) -> dict[str, float]:
    """Simulate Poisson arrivals of jobs of one to four images of 1024 x 1024 and 32 + 8 steps, for `count` replicas.

    "round robin" is one client with all calls. Many clients with round robin each are nearly "random".
    """
    rng = random.Random(seed)
    fleet = [Replica() for _ in range(count)]
    encode, base, refiner, decode = (CallKind(stage, 1024, 1024, 2) for stage in SECONDS)
    image = sum(SECONDS[stage] * CALLS[stage] for stage in SECONDS if stage is not Stage.ENCODE)
    rate = load * count / (SECONDS[Stage.ENCODE] + 2.5 * image)
    images = [rng.randint(1, 4) for _ in range(jobs)]
    paces = [math.exp(rng.gauss(0, 0.03)) for _ in range(jobs)]
    arrivals = np.cumsum([rng.expovariate(rate) for _ in range(jobs)])
    finishes = np.full(jobs, math.nan)
    for number, now in enumerate(arrivals):
        if router == "round robin":
            chosen = fleet[number % count]
        else:
            chosen = rng.choice(fleet)
            if router == "two choices" and count > 1:
                candidates = rng.sample(fleet, 2)
                for each in candidates:
                    each.advance(now, finishes, paces)
                chosen = min(candidates, key=lambda each: each.length(now))
        chosen.advance(now, finishes, paces)
        per_image = [(base, CALLS[Stage.BASE]), (refiner, CALLS[Stage.REFINER]), (decode, 1)]
        task = ImageTask(f"caller {number % 20}", [(encode, 1), *(per_image * images[number])])
        chosen.schedule.add(task, now)
        chosen.jobs[task] = number
    for each in fleet:
        each.advance(math.inf, finishes, paces)
    counted = slice(round(WARM_UP * jobs), None)
    took = (finishes - arrivals)[counted]
    span = arrivals[-1] - arrivals[counted.start]
    busy = [each.busy for each in fleet]
    return {
        "images": sum(images[counted]) / span,
        **{f"p{p}": float(np.percentile(took, p)) for p in (50, 95, 99)},
        "imbalance": max(busy) / statistics.mean(busy),
    }


def simulated(options: argparse.Namespace) -> None:
    print(f"\nSimulated H200s, load {options.load:g}, {options.simulated} jobs a replica, at least 20000 in all:\n")
    print("| replicas | router | images/s | p50 s | p95 | p99 | busiest over mean |\n|" + " --- |" * 7)
    for count in REPLICAS:
        for router in ("two choices", "round robin", "random"):
            row = simulate(count, router, options.load, max(20_000, options.simulated * count), options.seed)
            cells = " | ".join(f"{value:.3g}" for value in row.values())
            print(f"| {count} | {router} | {cells} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("measured", "simulated"), help="run one part (default: both)")
    parser.add_argument("--pairs", type=int, default=5, help="rounds with and without Ray (default: 5)")
    parser.add_argument("--calls", type=int, default=100, help="calls in a round (default: 100)")
    parser.add_argument("--callers", type=int, default=6, help="concurrent callers (default: 6)")
    parser.add_argument("--jobs", type=int, default=60, help="calls for each number of replicas (default: 60)")
    parser.add_argument("--load", type=float, default=0.8, help="utilization of the simulated devices (default: 0.8)")
    parser.add_argument("--simulated", type=int, default=100, help="jobs for each simulated replica (default: 100)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.only != "simulated":
        asyncio.run(measured(options))
    if options.only != "measured":
        simulated(options)


if __name__ == "__main__":
    main()
