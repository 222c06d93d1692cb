"""Compiled networks draw what the others draw; what is not compiled is drawn as if nothing were."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_ensemble
from serving import ROOT

from server import model
from server.checkpoint import CannotCompile
from server.domain import default_request
from server.telemetry import Metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # a C++ compiler on a busy machine

SIDE = 64


def drawn(ensemble: model.Ensemble, side: int = SIDE, **changes) -> np.ndarray:
    request = replace(default_request(ensemble.card, "cat", seed=1), steps=5, width=side, height=side, **changes)
    trajectory = ensemble.plan(request, ensemble.encode(request), 1)
    for _ in trajectory.stages:
        ensemble.step([trajectory])
    return ensemble.decode(trajectory)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ensemble.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folders) -> model.Ensemble:
    return model.load(*folders, device="cpu")


@pytest.fixture(scope="module", params=["blocks", "full"])
def compiled(folders, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> model.Ensemble:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which loading sets, for this process: it is put back
        patch.setenv("TRITON_CACHE_DIR", "")
        loaded = model.load(*folders, device="cpu", compile=request.param, compile_cache=cache, warm_up=[(SIDE, SIDE)])
        assert any(cache.rglob("*.so")), "what is compiled is kept"
    return loaded


def test_a_compiled_ensemble_draws_the_same_but_for_rounding_and_always_the_same_bytes(plain, compiled):
    image = drawn(compiled)
    assert np.abs(image.astype(int) - drawn(plain)).max() <= 2
    assert np.array_equal(image, drawn(compiled))


def test_sizes_that_were_not_warmed_up_have_the_bytes_of_an_ensemble_that_is_not_compiled(plain, compiled):
    assert np.array_equal(drawn(compiled, 2 * SIDE), drawn(plain, 2 * SIDE))


def test_without_guidance_the_steps_are_not_compiled_but_the_decoding_is(plain, compiled):
    image = drawn(compiled, guidance_scale=1.0)
    assert np.abs(image.astype(int) - drawn(plain, guidance_scale=1.0)).max() <= 2


def test_the_environment_tells_what_is_compiled(plain, compiled):
    assert plain.card.environment.compiled == "off"
    assert compiled.card.environment.compiled in ("blocks for 64x64", "full for 64x64")
    assert plain.card.environment.fingerprint != compiled.card.environment.fingerprint


def test_what_was_compiled_is_counted_and_timed(plain, compiled):
    assert (plain.card.compiled_calls, plain.card.compile_seconds) == (0, 0)
    assert compiled.card.compiled_calls == 3, "the base, the refiner and the decoder, for one size"
    metrics = Metrics(max_queue=1)
    metrics.serves(compiled.card)
    assert metrics.registry.get_sample_value("t2i_compiled_calls") == 3
    assert metrics.registry.get_sample_value("t2i_compile_seconds") == compiled.card.compile_seconds > 0


def test_sides_that_no_image_can_have_are_told_before_anything_is_compiled(folders):
    with pytest.raises(CannotCompile, match="multiples of 2: --warm-up cannot have 33x64"):
        model.load(*folders, device="cpu", compile="blocks", warm_up=[(33, 64), (64, 64)])


def test_a_machine_without_a_compiler_is_told_in_one_sentence(folders, tmp_path: Path):
    base, refiner = folders
    server = subprocess.run(
        [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--device", "cpu", "--base", base, "--refiner",
         refiner, "--compile", "blocks", "--compile-cache", tmp_path],
        cwd=ROOT, env={"PATH": str(tmp_path), "CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert server.returncode == CannotCompile.exit_code, server.stderr
    assert "the networks cannot be compiled here" in server.stderr
    assert "Traceback" not in server.stderr
