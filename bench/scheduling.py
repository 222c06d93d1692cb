"""Compare the scheduler with first come, first served and round robin: a simulation of a million jobs.

The simulation drives the server's own scheduling class on simulated time. The class learns the costs of calls as it
does in the server. Every policy gets the same jobs. The costs are those of full-size SDXL on an H200; only their ratios
affect the result. Run: python -m bench.scheduling
"""

import argparse
import json
import math
import random
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.domain import Stage
from server.engine.call_times import CallKind, CallTimes
from server.engine.scheduling import Order, QueueLimits, Schedule
from server.engine.task import ImageTask

LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)
SHOWN = ("first come", "round robin", "shortest")  # in figures, in the order of the tables
PANELS = (
    ("slowdown", "Mean slowdown", "latency / own time"),
    ("missed", "Missed deadlines", "% of jobs with a deadline"),
    ("longest jobs", "Longest 1 % of jobs", "p99 of latency, s"),
)
# Seconds of one call at 1024 x 1024 on an H200, with guidance; a shape's share of it goes by pixels.
SECONDS = {Stage.ENCODE: 0.012, Stage.BASE: 0.030, Stage.REFINER: 0.033, Stage.DECODE: 0.035}
BATCH = 8
SIDES = (512, 768, 1024)
DEADLINE_SHARE = 0.2  # of jobs
UNBOUNDED = QueueLimits(jobs=sys.maxsize)

Floats = NDArray[np.float64]


@dataclass
class Trace:
    """Jobs in the order of arrival. Each call of a job costs `pace` times the usual cost of its kind."""

    arrivals: list[float] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)
    calls: list[list[tuple[CallKind, int]]] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    deadlines: list[float] = field(default_factory=list)

    def task(self, number: int) -> ImageTask:
        return ImageTask(self.callers[number], self.calls[number].copy(), self.deadlines[number])


def usual(kind: CallKind) -> float:
    return SECONDS[kind.stage] * kind.width * kind.height / 1024**2


def make_trace(jobs: int, load: float, bursty: bool, seed: int, callers: int = 20) -> Trace:
    """Make Poisson arrivals of single jobs or of bursts of 1 to 8; the k-th caller's share is proportional to 1 / k."""
    rng = random.Random(seed)
    trace = Trace()
    names, weights = [f"caller {k}" for k in range(1, callers + 1)], [1 / k for k in range(1, callers + 1)]
    for _ in range(jobs):
        side, images, steps = rng.choice(SIDES), rng.randint(1, 4), rng.randint(8, 50)
        encode, base, refiner, decode = (CallKind(stage, side, side, 2) for stage in SECONDS)
        image = [(base, round(0.8 * steps)), (refiner, steps - round(0.8 * steps)), (decode, 1)]
        trace.calls.append([(encode, 1), *(image * images)])
        trace.paces.append(math.exp(rng.gauss(0, 0.03)))
        trace.sizes.append(trace.paces[-1] * sum(count * usual(kind) for kind, count in trace.calls[-1]))
        trace.callers.append(rng.choices(names, weights)[0])
    rate = load / (sum(trace.sizes) / jobs)
    now = 0.0
    while len(trace.arrivals) < jobs:
        burst = rng.randint(1, 8) if bursty else 1
        now += rng.expovariate(rate / (4.5 if bursty else 1))
        trace.arrivals += [now] * min(burst, jobs - len(trace.arrivals))
    for arrival, size in zip(trace.arrivals, trace.sizes, strict=True):
        trace.deadlines.append(arrival + 1 + size * rng.uniform(2, 10) if rng.random() < DEADLINE_SHARE else math.inf)
    return trace


@dataclass
class Outcome:
    """The end of each job, NaN if it was rejected, and the errors of forecasts, relative to the time that was left."""

    finishes: Floats
    first_errors: Floats
    later_errors: Floats


def run_schedule(trace: Trace, order: Order, reject: bool = False, sample: int = 50) -> Outcome:
    """Run the scheduler. Consecutive calls of one job are made in one go where the choice cannot change between them.

    At one in `sample` arrivals the forecasts of all jobs are recorded, of the new job and of the others apart.
    """
    rng = random.Random(0)
    times = CallTimes()
    schedule = Schedule(UNBOUNDED, times, order)
    numbers: dict[ImageTask, int] = {}
    finishes = np.full(len(trace.arrivals), math.nan)
    forecasts_of: dict[bool, list[tuple[int, float, float]]] = {True: [], False: []}
    arriving = iter(enumerate(trace.arrivals))
    number, arrival = next(arriving)
    now = 0.0
    while True:
        while arrival <= now:
            task = trace.task(number)
            if not (reject and schedule.rejection(task, arrival)):
                schedule.add(task, arrival)
                numbers[task] = number
                if rng.random() < 1 / sample:
                    for forecast in schedule.forecasts(arrival):
                        forecasts_of[forecast.task is task].append((numbers[forecast.task], arrival, forecast.eta))
            number, arrival = next(arriving, (0, math.inf))
        batch = schedule.choose(now)
        if not batch:
            if arrival == math.inf:
                break
            now = arrival
            continue
        (task,) = batch
        kind, count = task.calls[0]
        cost = usual(kind) * trace.paces[numbers[task]]
        until = min(arrival, schedule.holds_until(now))
        calls = count if until == math.inf else min(count, max(1, math.ceil((until - now) / cost)))
        now += calls * cost
        schedule.record_call(batch, calls * cost, calls)
        if not task.calls:
            schedule.remove(task, now)
            finishes[numbers.pop(task)] = now
    return Outcome(finishes, *(_errors(forecasts_of[new], finishes) for new in (True, False)))


def _errors(forecasts_of: list[tuple[int, float, float]], finishes: Floats) -> Floats:
    numbers, moments, etas = (np.array(each) for each in zip(*forecasts_of, strict=True))
    truths = finishes[numbers.astype(int)] - moments
    errors: Floats = np.abs(etas - truths) / truths
    return errors


def round_robin(trace: Trace) -> Outcome:
    """Run one call of each job in turn."""
    finishes = np.empty(len(trace.arrivals))
    ring: deque[tuple[int, int, float]] = deque()
    arriving = iter(enumerate(trace.arrivals))
    number, arrival = next(arriving)
    now = 0.0
    while True:
        while arrival <= now:
            calls = sum(count for _, count in trace.calls[number])
            ring.append((number, calls, trace.sizes[number] / calls))
            number, arrival = next(arriving, (0, math.inf))
        if not ring:
            if arrival == math.inf:
                return Outcome(finishes, np.empty(0), np.empty(0))
            now = arrival
            continue
        job, calls, cost = ring.popleft()
        now += cost
        if calls > 1:
            ring.append((job, calls - 1, cost))
        else:
            finishes[job] = now


def summary(trace: Trace, outcome: Outcome) -> dict[str, float]:
    """Summarize latencies in seconds. Slowdown is latency over device time; a rejected job misses its deadline."""
    arrivals, sizes, deadlines = (np.array(each) for each in (trace.arrivals, trace.sizes, trace.deadlines))
    latency = outcome.finishes - arrivals
    slowdown = latency / sizes
    longest = sizes >= np.quantile(sizes, 0.99)
    bound = deadlines < math.inf
    return {
        "latency": float(np.nanmean(latency)),
        **{f"latency p{p}": float(np.nanpercentile(latency, p)) for p in (50, 95, 99)},
        "slowdown": float(np.nanmean(slowdown)),
        **{f"slowdown p{p}": float(np.nanpercentile(slowdown, p)) for p in (50, 95, 99)},
        "missed": float(np.mean(~(outcome.finishes[bound] <= deadlines[bound]))),
        "longest wait": float(np.nanmax(latency)),
        "longest jobs": float(np.nanpercentile(latency[longest], 99)),
        "first error": float(np.median(outcome.first_errors)) if len(outcome.first_errors) else math.nan,
        "later error": float(np.median(outcome.later_errors)) if len(outcome.later_errors) else math.nan,
    }


POLICIES: dict[str, Callable[[Trace], Outcome]] = {
    "first come": lambda trace: run_schedule(trace, Order.FIRST_COME),
    "round robin": round_robin,
    "shortest": lambda trace: run_schedule(trace, Order.SHORTEST),
    "shortest, rejecting": lambda trace: run_schedule(trace, Order.SHORTEST, reject=True),
}


def simulate(jobs: int, bursty: bool, seed: int, callers: int) -> dict[float, dict[str, dict[str, float]]]:
    """Print a table, a row for each policy at each load."""
    print(
        "| load | policy | latency mean | p50 | p95 | p99 | slowdown mean | p50 | p95 | p99 | deadlines missed "
        "| longest wait | p99 of the longest 1 % | ETA off, new | waiting |"
    )
    print("|" + " --- |" * 15)
    results: dict[float, dict[str, dict[str, float]]] = {}
    for load in LOADS:
        trace = make_trace(jobs, load, bursty, seed, callers)
        rows = results[load] = {name: summary(trace, policy(trace)) for name, policy in POLICIES.items()}
        for name, row in rows.items():
            cells = [f"{row[key]:.3g}" for key in row if key.startswith(("latency", "slowdown"))]
            errors = [f"{row[key]:.1%}" if row[key] == row[key] else "" for key in ("first error", "later error")]
            cells += [f"{row['missed']:.2%}", f"{row['longest wait']:.3g}", f"{row['longest jobs']:.3g}", *errors]
            print(f"| {load} | {name} | " + " | ".join(cells) + " |", flush=True)
    return results


def comparison(rows: dict[str, dict[str, float]]) -> str:
    """Describe the scheduler's result against first come, first served."""
    ours, theirs = rows["shortest"], rows["first come"]
    return (
        f"mean slowdown {theirs['slowdown'] / ours['slowdown']:.2f} x lower, deadlines missed "
        f"{theirs['missed'] / ours['missed']:.1f} x fewer, p99 of the longest jobs "
        f"{ours['longest jobs'] / theirs['longest jobs']:.2f} x as long"
    )


def print_costs(waiting: int) -> None:
    """Print the cost of each operation with a number of jobs waiting, half of them with deadlines."""
    trace = make_trace(2 * waiting, 1.0, False, seed=0)
    trace.deadlines = [math.inf if number % 2 else 10 * sum(trace.sizes) + number for number in range(2 * waiting)]
    times = CallTimes()
    for kind in {kind for calls in trace.calls for kind, _ in calls}:
        times.record(kind, usual(kind))
    took: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = work(*arguments)
        took.setdefault(name, []).append(1e6 * (time.perf_counter() - began))
        return result

    for urgency in ("", ", with an urgent deadline"):
        tracemalloc.start()
        schedule = Schedule(UNBOUNDED, times)
        tasks = [trace.task(number) for number in range(waiting)]
        for task in tasks:
            schedule.add(task, 0.0)
        held = tracemalloc.get_traced_memory()[0] / waiting
        tracemalloc.stop()
        if urgency:
            tight = ImageTask("", [(trace.calls[0][1][0], 10**6)])
            schedule.add(tight, 0.0)
            schedule.remove(tight, 0.0)
            tight.deadline = 1.02 * tight.remaining
            schedule.add(tight, 0.0)
        for number, task in enumerate(tasks):
            arriving = trace.task(waiting + number)
            timed("rejection", schedule.rejection, arriving, 0.0)
            timed("add", schedule.add, arriving, 0.0)
            batch = timed("choose" + urgency, schedule.choose, 0.0)
            timed(f"choose up to {BATCH}" + urgency, schedule.choose, 0.0, BATCH)
            timed("forecast of the running job", schedule.forecast, batch[0], 0.0)
            timed("record_call" + urgency, schedule.record_call, batch, usual(batch[0].kind))
            timed("remove", schedule.remove, task, 0.0)
    timed("forecasts of all", lambda: list(schedule.forecasts(0.0)))
    print(f"With {waiting} jobs waiting, half of them with deadlines; {held:.0f} bytes a job.\n")
    print("| operation | median, microseconds | p99 |\n| --- | --- | --- |")
    for name, each in took.items():
        print(f"| {name} | {np.median(each):.1f} | {np.percentile(each, 99):.1f} |")


def plot(results: dict[float, dict[str, dict[str, float]]], path: Path) -> None:
    """Draw slowdown, missed deadlines and the latency of the longest jobs over load, for Poisson arrivals."""
    from bench import plotting  # which needs matplotlib, an extra of development

    figure, panels = plotting.panels(3)
    for axes, (key, title, unit) in zip(panels, PANELS, strict=True):
        colours = (plotting.VERMILION, plotting.ORANGE, plotting.BLUE)
        for name, color, marker in zip(SHOWN, colours, "s^o", strict=True):
            values = [rows[name][key] * (100 if key == "missed" else 1) for rows in results.values()]
            axes.plot(list(results), values, color=color, marker=marker, markersize=5, linewidth=1.8, label=name)
        plotting.style(axes, title, "load", unit)
        axes.set_xticks(list(results), [f"{load:g}" for load in results])
        axes.set_ylim(bottom=0)
    plotting.legend(figure, panels[0])
    plotting.save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs at each of the ten loads (default: 100000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--callers", type=int, default=20, help="the k-th sends 1 / k as many as the first (default: 20)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="more seeds for Poisson at load 0.9 (default: 2)")
    parser.add_argument("--waiting", type=int, default=10_000, help="jobs waiting when operations are timed")
    parser.add_argument("--plot", type=Path, help="write a figure of the Poisson results into this file")
    parser.add_argument("--json", type=Path, help="write what the figure shows into this file")
    parser.add_argument("--of", type=Path, metavar="JSON", help="draw what an earlier run wrote, and run nothing")
    options = parser.parse_args()
    if options.of:
        if not options.plot:
            parser.error("--of needs --plot, which names the figure's file")
        plot({float(load): rows for load, rows in json.loads(options.of.read_text("utf-8")).items()}, options.plot)
        return

    began = time.perf_counter()
    print_costs(options.waiting)
    for bursty in (False, True):
        print(f"\n{'Bursts of 1 to 8 jobs' if bursty else 'Poisson'}, {options.jobs} jobs at each load:\n")
        results = simulate(options.jobs, bursty, options.seed, options.callers)
        print(f"\nAt load 0.9: {comparison(results[0.9])}.", flush=True)
        if options.plot and not bursty:
            plot(results, options.plot)
        if options.json and not bursty:
            keys = [key for key, _, _ in PANELS]
            shown = {
                load: {name: {key: rows[name][key] for key in keys} for name in SHOWN} for load, rows in results.items()
            }
            options.json.write_text(json.dumps(shown, indent=2) + "\n", "utf-8")
    for seed in range(options.seed + 1, options.seed + 1 + options.again):
        trace = make_trace(options.jobs, 0.9, False, seed, options.callers)
        rows = {name: summary(trace, POLICIES[name](trace)) for name in ("first come", "shortest")}
        print(f"\nPoisson at load 0.9, seed {seed}: {comparison(rows)}.", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all.")


if __name__ == "__main__":
    main()
