"""A short run of the benchmark with MLCommons' LoadGen."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from serving import PATIENCE, ROOT

WORK = ["--samples", "3", "--seconds", "0", "--steps", "1", "--side", "64", "--qps", "5"]


def loadgen(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "bench.loadgen", *WORK, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.slow
def test_every_scenario_is_run_with_the_service_and_with_stock_diffusers(server_target: str, tmp_path: Path):
    recorded, figure = tmp_path / "results.json", tmp_path / "figure.png"
    ended = loadgen(
        "--target", server_target, "--ways", "service", "stock", "--json", str(recorded), "--plot", str(figure)
    )
    assert ended.returncode == 0, ended.stderr
    results = json.loads(recorded.read_text("utf-8"))["results"]
    assert [(each["way"], each["scenario"]) for each in results] == list(
        product(("service", "stock"), ("SingleStream", "Offline", "Server"))
    )
    for each in results:
        assert each["outcomes"]["OK"] >= 3
        assert each["samples_per_second"] > 0
        assert 0 < each["latencies"]["50.00"] <= each["latencies"]["99.00"]
        assert f"| {each['way']} | {each['scenario']} |" in ended.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_failed_calls_are_counted_and_exit_with_1(server_target: str):
    ended = loadgen("--target", server_target, "--steps", "1000", "--scenarios", "SingleStream")
    assert ended.returncode == 1
    assert "3 INVALID_ARGUMENT" in ended.stdout
    assert "had calls that failed" in ended.stderr
