"""Measure how soon a service is ready and how fast its images are, by what it compiles and when.

Every way starts twice: with an empty --compile-cache, and with the one that the first start has filled. Then images are
requested one after the other until one is compiled, with --compile-while-serving, and three more. On a GPU the
service's metrics give the peak memory of its tensors.

Run: make bench-ready. The embedded ensemble is served, or what T2I_BASE and so on say.
"""

import argparse
import re
import statistics
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field

import grpc
from prometheus_client.parser import text_string_to_metric_families

from bench import serving
from text_to_image_client.launcher import ChildServer
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

WHILE_SERVING = "-while-serving"
_MEMORY = "t2i_device_memory_bytes"
_METRICS_SECONDS = 60.0
WAYS = ["blocks" + when for when in ("", WHILE_SERVING)]


@dataclass
class Start:
    """Seconds until health is SERVING, of each image from then on, and until one was compiled; bytes of the device."""

    ready: float
    images: list[float] = field(default_factory=list)  # that are not compiled
    compiled_after: float | None = None
    compiled: list[float] = field(default_factory=list)
    memory: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=["off", *WAYS], default=["off", "blocks"])
    parser.add_argument("--seconds", type=float, default=900, help="limit for compiling while serving (default: 900)")
    parser.add_argument("--images", type=int, default=3, help="that count, of each start (default: 3)")
    options = parser.parse_args()

    print("| way | cache | ready | image | longest | compiled after | image, compiled | memory |")
    print("|" + " --- |" * 8, flush=True)
    device = ""
    for way in options.ways:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled") if way != "off" else ("",):
                begun, device = start(way, cache, options.seconds, options.images)
                print(row(way, state, begun), flush=True)
    print(f"\nOn {device}, seconds and GiB")


def start(way: str, cache: str, seconds: float, images: int) -> tuple[Start, str]:
    """Start the service once and request images; returns its times and its device."""
    mode = way.removesuffix(WHILE_SERVING)
    flags = ["--compile", mode, "--metrics-listen", "127.0.0.1:0", "--log-level", "info"]
    flags += ["--compile-cache", cache] if mode != "off" else []
    flags += ["--compile-while-serving"] if way.endswith(WHILE_SERVING) else []
    began = time.perf_counter()
    with (
        serving.served(*flags) as (address, service),
        grpc.insecure_channel(address, options=serving.UNLIMITED) as channel,
    ):
        stub = pb_grpc.TextToImageServiceStub(channel)
        begun = Start(time.perf_counter() - began)
        counted = begun.images if way == "off" else begun.compiled
        while len(counted) < images:
            asked = time.perf_counter()
            if asked - began > seconds:
                break
            request = pb.GenerateRequest(data=pb.TaskData(prompt="cat napping"), output=pb.Output(raw=True))
            request.parameter.seed = len(begun.images)
            made_by = stub.Generate(request).metadata.environment.compiled
            took = time.perf_counter() - asked
            if made_by == "off":
                begun.images.append(took)
            else:
                begun.compiled_after = begun.compiled_after or asked - began
                begun.compiled.append(took)
        begun.memory = memory(service)
        return begun, stub.GetModel(pb.GetModelRequest()).device


def memory(service: ChildServer) -> float | None:
    """Bytes that tensors took of a GPU at most."""
    found = re.search(r"metrics on (http://\S+)", service.log())
    assert found is not None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has another loopback
    with opener.open(found[1], timeout=_METRICS_SECONDS) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = {
        each.labels.get("kind"): each.value for family in families if family.name == _MEMORY for each in family.samples
    }
    return samples.get("allocated_peak")


def row(way: str, cache: str, begun: Start) -> str:
    def median(images: list[float]) -> str:
        return f"{statistics.median(images):.3g}" if images else ""

    count = f" of {len(begun.images)}" if begun.images else ""
    longest = f"{max(begun.images):.3g}" if begun.images else ""
    after = f"{begun.compiled_after:.3g}" if begun.compiled_after else ""
    cells = [way, cache, f"{begun.ready:.3g}", median(begun.images) + count, longest, after, median(begun.compiled)]
    cells.append(f"{begun.memory / 2**30:.1f}" if begun.memory else "")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
