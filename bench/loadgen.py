"""Benchmark the service through gRPC, and stock diffusers in the same run, with MLCommons' LoadGen.

The scenarios are MLPerf Inference's. SingleStream sends one request after the other, Offline all at once. Server sends
them at random times, and a limit on latency decides whether their rate is valid. The workload is that of MLPerf's SDXL:
the base alone, 20 Euler steps, guidance scale 8, one negative prompt. The prompts are our own, and only speed is
measured: MLPerf's accuracy needs captions and networks that are not included, so this is no MLPerf result.

Run: make bench-loadgen. It serves the embedded ensemble, or the one of T2I_BASE and the other variables; --target names
a running service.
"""

import argparse
import contextlib
import gc
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import grpc
import mlperf_loadgen as lg

from bench import serving
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

SCENARIOS = ("SingleStream", "Offline", "Server")
WAYS = ("service", "service-fp8", "stock", "stock-compiled")
NEGATIVE = "normal quality, low quality, worst quality, low res, blurry, nsfw, nude"  # MLPerf's
PROMPTS = [
    f"{colour} {thing}"
    for colour in ("a red", "a green", "a blue", "a yellow", "a small", "a large", "an old", "a new")
    for thing in (
        "apple",
        "car",
        "house",
        "umbrella",
        "balloon",
        "flower",
        "book",
        "chair",
        "boat",
        "bird",
        "hat",
        "shoe",
    )
]
SEEDS = {"qsl_rng_seed": 1, "sample_index_rng_seed": 2, "schedule_rng_seed": 3}
PERCENTILES = ("50.00", "90.00", "95.00", "97.00", "99.00")
_SHORTEST = 0.01  # seconds of the shortest sample, from which LoadGen computes how many to generate


@dataclass(frozen=True)
class Work:
    """The parameters of every sample. A `side` of None is the model's default."""

    steps: int
    guidance: float
    side: int | None

    def request(self, index: int) -> pb.GenerateRequest:
        """Return the request of sample `index`."""
        sampling = pb.Sampling(steps=self.steps, guidance_scale=self.guidance, high_noise_frac=1, scheduler="euler")
        if self.side is not None:
            sampling.width = sampling.height = self.side
        return pb.GenerateRequest(
            data=pb.TaskData(prompt=PROMPTS[index]),
            parameter=pb.TaskParameter(seed=index, negative_prompt=NEGATIVE),
            sampling=sampling,
            output=pb.Output(raw=True),
        )


class System(Protocol):
    """A system under test. It completes every sample, also failed ones; `outcomes` counts statuses."""

    outcomes: Counter[str]

    def issue(self, samples: Sequence[Any]) -> None:
        """Start these samples and return."""


def complete(samples: Sequence[Any]) -> None:
    """Report the samples to LoadGen as completed."""
    lg.QuerySamplesComplete([lg.QuerySampleResponse(each.id, 0, 0) for each in samples])


class Service:
    """The service at an address, with one call for each sample."""

    def __init__(self, target: str, work: Work) -> None:
        self.outcomes: Counter[str] = Counter()
        self._work = work
        self._stub = pb_grpc.TextToImageServiceStub(grpc.insecure_channel(target, options=serving.UNLIMITED))
        self.info = self._stub.GetModel(pb.GetModelRequest())

    def issue(self, samples: Sequence[Any]) -> None:
        for sample in [_Sample(each.id, each.index) for each in samples]:
            call = self._stub.Generate.future(self._work.request(sample.index))
            call.add_done_callback(partial(self._ended, sample))

    def _ended(self, sample: "_Sample", call: Any) -> None:
        self.outcomes[call.code().name] += 1
        complete([sample])


@dataclass(frozen=True)
class _Sample:
    """A copy of LoadGen's sample, which is valid only during the call that passes it."""

    id: int
    index: int


class Stock:
    """diffusers' pipeline on the same weights, with up to `batch` samples in a call.

    All of it runs on one thread, as CUDA graphs of compiled networks require (pytorch/pytorch#123177).
    """

    _worker = ThreadPoolExecutor(1, thread_name_prefix="stock")

    def __init__(self, settings: Settings, work: Work, batch: int, compiled: bool) -> None:
        self.outcomes: Counter[str] = Counter()
        self._work, self._batch = work, batch
        self._worker.submit(self._load, settings, compiled).result()

    def issue(self, samples: Sequence[Any]) -> None:
        own = [_Sample(each.id, each.index) for each in samples]
        for first in range(0, len(own), self._batch):
            self._worker.submit(self._complete, own[first : first + self._batch])

    def close(self) -> None:
        """Free the memory and the compiled networks, which are specialized to the batch size."""
        self._worker.submit(self._unload).result()

    def _load(self, settings: Settings, compiled: bool) -> None:
        import torch
        from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        from server.ensemble import devices

        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        cuda = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if cuda else "cpu"
        folder, _ = settings.experts
        base = StableDiffusionXLPipeline.from_pretrained(
            folder,
            variant="fp16" if any(folder.rglob("*.fp16*.safetensors")) else None,
            dtype=devices.PRECISIONS["bf16"] if cuda else torch.float32,
            add_watermarker=False,
        )
        base.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config)
        base.set_progress_bar_config(disable=True)
        self._pipeline = base.to("cuda" if cuda else "cpu")
        if compiled:
            base.unet.to(memory_format=torch.channels_last)
            base.unet = torch.compile(base.unet, mode="reduce-overhead", fullgraph=True)
            base.vae.decode = torch.compile(base.vae.decode, mode="reduce-overhead", fullgraph=True)
        for _ in range(2):
            self._draw([_Sample(0, 0)] * self._batch)  # warm up, as the service does, and record graphs

    def _unload(self) -> None:
        import torch

        del self._pipeline
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    def _complete(self, samples: list[_Sample]) -> None:
        try:
            self._draw(samples)
            self.outcomes["OK"] += len(samples)
        except Exception as error:  # noqa: BLE001  # LoadGen waits for every sample
            self.outcomes[type(error).__name__] += len(samples)
        complete(samples)

    def _draw(self, samples: list[_Sample]) -> None:
        import torch

        side = {} if self._work.side is None else {"width": self._work.side, "height": self._work.side}
        with torch.inference_mode():
            self._pipeline(
                prompt=[PROMPTS[each.index] for each in samples],
                negative_prompt=[NEGATIVE] * len(samples),
                num_inference_steps=self._work.steps,
                guidance_scale=self._work.guidance,
                generator=[torch.Generator().manual_seed(each.index) for each in samples],
                **side,
            )


@dataclass
class Result:
    """The result of one test. Latencies in seconds, by percentile; `invalid` is LoadGen's reason to reject the run."""

    way: str
    scenario: str
    invalid: str
    samples_per_second: float
    mean_latency: float
    latencies: dict[str, float]
    outcomes: dict[str, int] = field(default_factory=dict)


def run(way: str, scenario: str, system: System, options: argparse.Namespace, qps: float, folder: Path) -> Result:
    """Run one test until both `--samples` and `--seconds` have passed. Offline ends with its samples."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_query_count = options.samples
    settings.min_duration_ms = 0 if scenario == "Offline" else round(1000 * options.seconds)
    settings.server_target_qps = qps
    settings.server_target_latency_ns = round(1e9 * options.latency)
    settings.single_stream_expected_latency_ns = round(1e9 * _SHORTEST)
    for name, seed in SEEDS.items():
        setattr(settings, name, seed)
    logs = lg.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = False
    samples = lg.ConstructQSL(len(PROMPTS), len(PROMPTS), lambda _: None, lambda _: None)
    tested = lg.ConstructSUT(system.issue, lambda: None)
    system.outcomes.clear()
    began = time.perf_counter()
    lg.StartTestWithLogSettings(tested, samples, settings, logs)
    elapsed = time.perf_counter() - began
    lg.DestroySUT(tested)
    lg.DestroyQSL(samples)
    log = dict(_logged(folder / "mlperf_log_detail.txt"))
    return Result(
        way,
        scenario,
        "" if log["result_validity"] == "VALID" else log.get("result_invalid_reason", "INVALID"),
        sum(system.outcomes.values()) / elapsed,
        log["result_mean_latency_ns"] / 1e9,
        {each: log[f"result_{each}_percentile_latency_ns"] / 1e9 for each in PERCENTILES},
        dict(system.outcomes),
    )


def _logged(path: Path) -> Iterator[tuple[str, Any]]:
    for line in path.read_text("utf-8").splitlines():
        if line.startswith(":::MLLOG "):
            entry = json.loads(line.removeprefix(":::MLLOG "))
            yield entry["key"], entry["value"]


def row(result: Result) -> str:
    cells = [result.way, result.scenario, f"{result.samples_per_second:.3g}", f"{result.mean_latency:.3g}"]
    cells += [f"{result.latencies[each]:.3g}" for each in PERCENTILES]
    outcomes = ", ".join(f"{count} {name}" for name, count in sorted(result.outcomes.items()))
    return f"| {' | '.join([*cells, result.invalid or 'yes', outcomes])} |"


def plot(recorded: dict[str, Any], path: Path) -> None:
    """Draw a panel for each scenario: images per second of Offline, else latencies by percentile."""
    from bench import plotting  # which needs matplotlib, an extra of development

    looks = {
        "service-fp8": ("service, fp8", plotting.GREEN),
        "service": ("service", plotting.BLUE),
        "stock-compiled": ("diffusers, compiled", plotting.ORANGE),
        "stock": ("diffusers", plotting.VERMILION),
    }
    results = {(each["way"], each["scenario"]): Result(**each) for each in recorded["results"]}
    scenarios = [each for each in SCENARIOS if any(scenario == each for _, scenario in results)]
    titles = {"SingleStream": "one after the other", "Offline": "all at once", "Server": "at random times"}
    places = [-math.log10(1 - float(each) / 100) for each in PERCENTILES]  # each factor of ten in rarity has one width
    figure, panels = plotting.panels(len(scenarios))
    for axes, scenario in zip(panels, scenarios, strict=True):
        title = f"{scenario}: {titles[scenario]}"
        for way, (label, color) in looks.items():
            if (result := results.get((way, scenario))) is None:
                continue
            if scenario == "Offline":
                bars = axes.bar(label.replace(", ", ",\n"), result.samples_per_second, color=color)
                axes.bar_label(bars, fmt="%.2f", fontsize=9)
            else:
                latencies = list(result.latencies.values())
                axes.plot(places, latencies, color=color, marker="o", markersize=4, label=label)
        if scenario == "Offline":
            plotting.style(axes, title, y="images per second")
            axes.margins(y=0.1)
        else:
            plotting.style(axes, title, "percentile, scaled by rarity", "latency, s (logarithmic)")
            axes.set_xticks(places, [f"{float(each):g}" for each in PERCENTILES])
            plotting.logarithmic(axes)
    curves = next((axes for axes, each in zip(panels, scenarios, strict=True) if each != "Offline"), None)
    if curves is not None:
        plotting.legend(figure, curves)
    figure.suptitle(f"{recorded['device']}, {recorded['date']}, one run", fontsize=11)
    plotting.save(figure, path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["service"])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--target", help="HOST:PORT of a running service (default: start one)")
    parser.add_argument("--samples", type=int, default=64, help="minimum for each scenario (default: 64)")
    parser.add_argument(
        "--seconds", type=float, default=60, help="minimum for each scenario but Offline (default: 60; MLPerf: 600)"
    )
    parser.add_argument(
        "--qps", type=float, help="requests per second in Server (default: 0.7 of the result of the previous scenario)"
    )
    parser.add_argument(
        "--latency",
        type=float,
        default=20,
        help="limit of the 99th percentile in Server, seconds (default: 20, as MLPerf)",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=8)
    parser.add_argument("--side", type=int, help="pixels (default: the model's own)")
    parser.add_argument(
        "--batch", type=int, default=1, help="images in a call in Offline (default: 1, as in the other scenarios)"
    )
    parser.add_argument("--json", type=Path, help="write the results into this file")
    parser.add_argument("--plot", type=Path, help="write a figure into this file")
    parser.add_argument("--of", type=Path, metavar="JSON", help="plot the results in this file, and run nothing")
    options = parser.parse_args()
    if options.of and not options.plot:
        parser.error("--of needs --plot, which names the figure's file")
    if options.target and options.batch > 1:
        parser.error("--batch needs a service that is started here; that of --target has its own --max-batch")
    return options


def main() -> None:
    options = parse_arguments()
    if options.of:
        plot(json.loads(options.of.read_text("utf-8")), options.plot)
        return
    work = Work(options.steps, options.guidance, options.side)
    results: list[Result] = []
    print("| way | scenario | images/s | mean s | " + " | ".join(f"p{float(p):g}" for p in PERCENTILES), end="")
    print(" | valid | outcomes |\n|" + " --- |" * (6 + len(PERCENTILES)), flush=True)
    for way, (batch, scenarios) in product(options.ways, by_batch(options)):
        with systems(way, options, work, batch) as (system, device):
            for scenario in scenarios:
                before = next((each.samples_per_second for each in results[::-1] if each.way == way), 1.0)
                with tempfile.TemporaryDirectory() as folder:
                    results.append(run(way, scenario, system, options, options.qps or 0.7 * before, Path(folder)))
                print(row(results[-1]), flush=True)
    print(f"\nOn {device}, base alone, {work.steps} steps, guidance {work.guidance:g}, {options.batch} at once")
    recorded = {
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "loadgen": version("mlcommons-loadgen"),
        "work": asdict(work) | {"offline_batch": options.batch},
        "results": [asdict(each) for each in results],
    }
    if options.json:
        options.json.write_text(json.dumps(recorded, indent=2) + "\n")
    if options.plot:
        plot(recorded, options.plot)
    if failed := [each for each in results if set(each.outcomes) != {"OK"}]:
        raise SystemExit(f"{len(failed)} of {len(results)} runs had calls that failed: see the column of outcomes")


def by_batch(options: argparse.Namespace) -> list[tuple[int, list[str]]]:
    """Return the batch sizes, with the scenarios that a system of each size runs."""
    if options.batch == 1:
        return [(1, options.scenarios)]
    groups = (options.batch, {"Offline"}), (1, {"SingleStream", "Server"})
    return [(batch, some) for batch, of in groups if (some := [each for each in options.scenarios if each in of])]


@contextmanager
def systems(way: str, options: argparse.Namespace, work: Work, batch: int) -> Iterator[tuple[System, str]]:
    """Start a system under test, and yield it with the name of its device."""
    if way.startswith("service"):
        with contextlib.ExitStack() as started:
            target = options.target
            if target is None:
                flags = ["--max-queue", "10000"]
                flags += ["--precision", "fp8"] if way == "service-fp8" else []
                flags += ["--max-batch", str(batch)] if batch > 1 else []
                target, _ = started.enter_context(serving.served(*flags))
            service = Service(target, work)
            yield service, service.info.device
    else:
        stock = Stock(Settings(), work, batch, compiled=way == "stock-compiled")
        with contextlib.closing(stock):
            yield stock, stock.device


if __name__ == "__main__":
    main()
