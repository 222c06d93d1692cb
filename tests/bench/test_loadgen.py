"""The benchmark with MLCommons' LoadGen, as far as it can be told wrong in a minute."""

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
def test_every_scenario_is_run_through_the_service_and_stock_diffusers_and_told(server_target: str, tmp_path: Path):
    told, figure = tmp_path / "told.json", tmp_path / "figure.png"
    ended = loadgen("--target", server_target, "--ways", "service", "stock", "--json", str(told), "--plot", str(figure))
    assert ended.returncode == 0, ended.stderr
    results = json.loads(told.read_text("utf-8"))["results"]
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
def test_calls_that_fail_are_counted_and_end_it_with_1(server_target: str):
    ended = loadgen("--target", server_target, "--steps", "1000", "--scenarios", "SingleStream")
    assert ended.returncode == 1
    assert "3 INVALID_ARGUMENT" in ended.stdout
    assert "had calls that failed" in ended.stderr
