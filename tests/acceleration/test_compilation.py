"""Compiled networks draw what the others draw; what is not compiled is drawn as if nothing were, meanwhile too."""

import gc
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_ensemble
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scraping import scrape
from serving import PATIENCE, ROOT, ServerProcess, connect, digests, request
from torch import nn
from torch._inductor.runtime import cache_dir_utils
from torch._inductor.utils import clear_caches

from server import model
from server.acceleration import cpu_kernels, cpu_library, layers
from server.domain import OutOfMemory, default_request
from server.ensemble import checkpoint
from server.ensemble.checkpoint import CannotCompile
from server.model import Ensemble
from server.observability.metrics import Metrics
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # a C++ compiler on a busy machine

SIDE = 64


def drawn(ensemble: model.Ensemble, side: int = SIDE, **changes) -> np.ndarray:
    return finished(ensemble, begun(ensemble, side, **changes))


def begun(ensemble: model.Ensemble, side: int = SIDE, **changes) -> model.Trajectory:
    request = replace(default_request(ensemble.info, "cat", seed=1), steps=5, width=side, height=side, **changes)
    trajectory = ensemble.plan(request, ensemble.encode(request), 1)
    ensemble.step([trajectory])
    return trajectory


def finished(ensemble: model.Ensemble, trajectory: model.Trajectory) -> np.ndarray:
    for _ in trajectory.stages[trajectory.position :]:
        ensemble.step([trajectory])
    return ensemble.decode(trajectory)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ensemble.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folders) -> model.Ensemble:
    return model.load(checkpoint.inspect(*folders), device="cpu")


@pytest.fixture(scope="module", params=["blocks", "blocks where no kernels suit", "full"])
def compiled(folders, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> model.Ensemble:
    cache = tmp_path_factory.mktemp("cache")
    mode, _, without_kernels = request.param.partition(" ")
    if without_kernels and not cpu_kernels.suit():
        pytest.skip("no kernels suit this CPU, so this is how blocks are compiled in any case")
    # Each begins as a process of its own would: what inductor holds in memory is not written into another cache.
    torch._dynamo.reset()
    clear_caches()
    cpu_library._load.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "_folder", None)
        patch.setattr(cpu_library, "_PREBUILT", cache / "nothing")
        if without_kernels:
            patch.setattr(cpu_kernels, "suit", lambda: False)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which loading sets, for this process: it is put back
        patch.setenv("TRITON_CACHE_DIR", "")
        experts = checkpoint.inspect(*folders)
        loaded = model.load(experts, device="cpu", compile=mode, compile_cache=cache, warm_up=[(SIDE, SIDE)])
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
    assert plain.info.environment.compiled == "off"
    assert compiled.info.environment.compiled in ("blocks for 64x64", "full for 64x64")
    assert plain.info.environment.fingerprint != compiled.info.environment.fingerprint


def test_what_was_compiled_is_counted_and_timed(plain, compiled):
    assert (plain.info.compiled_calls, plain.info.compile_seconds) == (0, 0)
    assert compiled.info.compiled_calls == 3, "the base, the refiner and the decoder, for one size"
    metrics = Metrics(max_queue=1)
    metrics.set_model(compiled.info)
    assert metrics.registry.get_sample_value("t2i_compiled_calls") == 3
    assert metrics.registry.get_sample_value("t2i_compile_seconds") == compiled.info.compile_seconds > 0


NO_COMPILER = "no-such-compiler"
NEEDS_KERNELS = pytest.mark.skipif(not cpu_kernels.suit(), reason="the C++ kernels are not for this CPU")


def patch_cache(patch: pytest.MonkeyPatch) -> None:
    """Have put back what loading with a cache sets for this process; and inductor begin as in a new one."""
    torch._dynamo.reset()
    clear_caches()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        patch.setenv(variable, "")
    patch.setattr(cpu_kernels, "_folder", None)


@pytest.fixture
def nothing_prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_library, "_PREBUILT", tmp_path / "nothing")
    monkeypatch.setattr(cpu_kernels, "_folder", None)
    cpu_library._load.cache_clear()
    yield
    cpu_library._load.cache_clear()


@pytest.fixture(scope="module")
def as_installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the server as pip installs it: nothing is prebuilt."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(ROOT / "server", folder / "server", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.mark.parametrize(
    ("suit", "compiler", "told"),
    [
        (True, None, "blocks for 32x32"),
        (False, None, "off"),
        (True, NO_COMPILER, "off"),
        (True, "false", "off"),  # a program that is there, and fails
    ],
)
@pytest.mark.usefixtures("nothing_prebuilt")
def test_what_is_quickly_built_is_built_unless_another_way_is_asked_for(
    folders, suit: bool, compiler: str | None, told: str, monkeypatch, caplog
):
    if suit and not cpu_kernels.suit():
        pytest.skip("no kernels suit this CPU")
    monkeypatch.setattr(cpu_kernels, "suit", lambda: suit)
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    caplog.set_level("INFO", "server.model")
    ensemble = model.load(checkpoint.inspect(*folders), device="cpu", compile="auto")
    assert ensemble.info.environment.compiled == told
    assert drawn(ensemble).shape == (SIDE, SIDE, 3)
    without = "images are made without the C++ kernels"
    why = {
        None: f"{without}: they are for x86-64 CPUs with AVX2 and FMA, which torch may use",
        NO_COMPILER: f"{without}, more slowly: {NO_COMPILER}: No such file or directory; install a C++ compiler",
        "false": f"{without}, more slowly: false: exit 1; set CXX to a C++ compiler that works",
    }
    assert caplog.messages == ([] if told != "off" else [why[compiler]])


@NEEDS_KERNELS
@pytest.mark.usefixtures("nothing_prebuilt")
def test_a_cache_that_cannot_be_used_costs_auto_a_warning_and_blocks_the_start(folders, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    patch_cache(monkeypatch)
    experts = checkpoint.inspect(*folders)
    ensemble = model.load(experts, device="cpu", compile="auto", compile_cache=cache)
    assert ensemble.info.environment.compiled == "blocks for 32x32"
    assert caplog.messages == [
        f"nothing can be written to {cache}: Not a directory; let --compile-cache name a folder that can be written "
        "to, has room, and is not mounted noexec; what is built is not kept"
    ]
    cpu_library._load.cache_clear()
    with pytest.raises(
        CannotCompile, match=f"nothing can be written to {cache}: Not a directory.; let --compile-cache"
    ):
        model.load(experts, device="cpu", compile="blocks", compile_cache=cache)
    with pytest.raises(CannotCompile, match=f"nothing can be written to {cache}: Not a directory; let --compile-cache"):
        model.load(experts, device="cpu", compile="full", compile_cache=cache)


@pytest.mark.parametrize("cached", [True, False])
def test_a_folder_that_inductor_cannot_use_is_named_with_the_true_reason(folders, cached: bool, tmp_path, monkeypatch):
    """No kernels suit, and only some of what inductor writes comes out as an error of torch's."""
    folder = tmp_path / "file"
    folder.touch()
    patch_cache(monkeypatch)
    monkeypatch.setattr(cpu_kernels, "suit", lambda: False)
    told, cache = f"nothing can be written to {folder}: File exists; let --compile-cache name another folder", folder
    if not cached:
        told, cache = f"{folder}/inductor: Not a directory.; let --compile-cache, or TMPDIR without one, name", None
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(folder / "inductor"))
    with pytest.raises(CannotCompile, match=told):
        model.load(checkpoint.inspect(*folders), device="cpu", compile="blocks", compile_cache=cache)


@NEEDS_KERNELS
def test_what_was_compiled_for_other_instructions_is_compiled_again(tmp_path):
    """A cache can be that of machines with other CPUs."""
    code = (
        "import torch; from server.acceleration import compilation; values = torch.linspace(0, 1, 1000)\n"
        "with compilation.warming(): made = torch.compile(lambda values: (values.cos() * 2).sum() + values)(values)\n"
        "assert torch.allclose(made, (values.cos() * 2).sum() + values)"
    )
    for capability in ("avx2", "default", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=600)


@pytest.mark.parametrize("changes", [{"precision": "fp8"}, {"offload": True}])
def test_what_goes_without_compiled_networks_is_not_built(folders, changes: dict):
    assert not model.load(checkpoint.inspect(*folders), device="cpu", compile="auto", **changes).compiles


def test_sides_that_no_image_can_have_are_told_before_anything_is_compiled(folders):
    with pytest.raises(CannotCompile, match="multiples of 2: --compile-sizes cannot have 33x64"):
        model.load(checkpoint.inspect(*folders), device="cpu", compile="blocks", warm_up=[(33, 64), (64, 64)])


def test_a_machine_without_a_compiler_is_told_in_one_sentence(folders, as_installed, tmp_path: Path):
    base, refiner = folders
    server = subprocess.run(
        [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--device", "cpu", "--base", base, "--refiner",
         refiner, "--compile", "blocks", "--compile-cache", tmp_path],
        cwd=as_installed, env={"PATH": str(tmp_path), "CXX": NO_COMPILER}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert server.returncode == CannotCompile.exit_code, server.stderr
    assert "the networks cannot be compiled here" in server.stderr
    assert "Traceback" not in server.stderr


def test_what_is_begun_while_another_thread_compiles_is_drawn_to_its_end_as_if_nothing_were(plain, folders, tmp_path):
    usual = sys.getswitchinterval()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        patch.setenv("TRITON_CACHE_DIR", "")
        experts = checkpoint.inspect(*folders)
        ensemble = model.load(experts, device="cpu", compile="full", compile_cache=tmp_path, compile_while_serving=True)
        compile_beside(ensemble, drawn(plain))
    assert sys.getswitchinterval() == usual


@pytest.fixture
def load_with_twins(folders, monkeypatch: pytest.MonkeyPatch) -> Callable[..., model.Ensemble]:
    """Loads what compiles others of the same weights while it serves, which it does on a GPU alone."""

    def load(**options) -> model.Ensemble:
        monkeypatch.setattr(model, "Ensemble", lambda *given: Ensemble(*given[:-1], True))
        return model.load(checkpoint.inspect(*folders), device="cpu", compile_while_serving=True, **options)

    return load


def test_where_others_of_the_same_weights_are_compiled_the_networks_serve_as_they_are_until_then(
    folders, load_with_twins, monkeypatch
):
    """As on a GPU, with networks that are made over to be compiled, and images that share calls."""
    made_over, fuse = [], layers.fuse

    def fuse_twins(network: nn.Module, device: str) -> None:
        made_over.append(network)
        if len(made_over) <= 3:  # the base's, the refiner's and the autoencoder's own
            raise layers.CannotFuse("for now it is left as it is")
        fuse(network, device)

    monkeypatch.setattr(layers, "fuse", fuse_twins)
    as_they_are = drawn(model.load(checkpoint.inspect(*folders), device="cpu", max_batch=2))
    made_over.clear()
    ensemble = load_with_twins(compile="blocks", max_batch=2)
    assert len(made_over) == 3
    compile_beside(ensemble, as_they_are)
    assert len({id(each) for each in made_over}) == 6
    compiled = drawn(ensemble)
    assert np.abs(compiled.astype(int) - as_they_are).max() <= 2
    assert np.array_equal(compiled, drawn(ensemble))


def compile_beside(ensemble: model.Ensemble, expected: np.ndarray) -> None:
    """Compile in another thread, while what is drawn, and what was begun before, comes out as expected."""
    assert np.array_equal(drawn(ensemble), expected), "nothing is compiled at first"
    begun_before = begun(ensemble)
    with ThreadPoolExecutor(1) as thread:
        compiling = thread.submit(ensemble.compile, default_request(ensemble.info, "a photo of a cat"))
        while not compiling.done():
            assert np.array_equal(drawn(ensemble), expected)
    ensemble.info, _ = compiling.result()
    begun_after = begun(ensemble)
    assert begun_before.batch_key != begun_after.batch_key
    assert np.array_equal(finished(ensemble, begun_before), expected)
    assert (begun_before.conditioning.compiled, begun_after.conditioning.compiled) == (False, True)


def test_what_fails_to_compile_is_forgotten_and_gives_its_memory_back(load_with_twins, monkeypatch):
    ensemble = load_with_twins(compile="full")
    expected = drawn(ensemble)
    twins: list[weakref.ref[nn.Module]] = []
    twin = layers.twin

    def twin_or_nothing(network: nn.Module) -> nn.Module:
        if len(twins) == 1:
            raise torch.OutOfMemoryError("no room for another")
        made = twin(network)
        twins.append(weakref.ref(made))
        return made

    monkeypatch.setattr(layers, "twin", twin_or_nothing)
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    with pytest.raises(OutOfMemory):
        ensemble.compile(default_request(ensemble.info, "a photo of a cat"))
    gc.collect()
    assert [each() for each in twins] == [None]
    assert np.array_equal(drawn(ensemble), expected)


class TestWhileServing:
    """--compile-while-serving, on a tiny ensemble."""

    FLAGS = ("--compile", "blocks", "--compile-while-serving", "--metrics-listen", "127.0.0.1:0")

    @pytest.fixture
    def start(self, start_server, folders, as_installed):
        def start(*flags: object, **environment: str) -> ServerProcess:
            base, refiner = folders
            given = ("--device", "cpu", "--base", base, "--refiner", refiner, *flags)
            return start_server(*map(str, given), cwd=as_installed, **environment)

        return start

    def test_it_serves_at_once_and_compiled_later_and_each_answer_tells_how_it_was_made(self, start, tmp_path):
        server = start(*self.FLAGS, "--compile-cache", tmp_path).wait_until_ready()
        with connect(server) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        early = drawn_by(server)
        assert model_of(server).environment == early.metadata.environment, "it still compiles"
        assert scrape(server)("t2i_compilation", t2i_compilation="compiling") == 1
        assert same(early, drawn_by(start("--compile", "off").wait_until_ready())), (
            "as a server that compiles nothing makes it"
        )

        server.patience = 1200
        server.wait_for_log(r"compiled 3 calls in \d")
        late = drawn_by(server)
        assert late.metadata.environment.compiled == "blocks for 32x32"
        assert model_of(server).environment == late.metadata.environment
        assert scrape(server)("t2i_compilation", t2i_compilation="compiled") == 1
        assert scrape(server)("t2i_compiled_calls") == 3
        assert scrape(server)("t2i_compile_seconds") > 0
        before = start("--compile", "blocks", "--compile-cache", tmp_path).wait_until_ready()
        assert same(late, drawn_by(before)), "as a server that compiles before it serves makes it"

    def test_where_it_cannot_compile_it_goes_on_without_and_says_what_to_do(self, start, tmp_path):
        server = start(*self.FLAGS, "--compile-cache", tmp_path, PATH=str(tmp_path), CXX="no-such-compiler")
        told = server.wait_for_log(r"the networks cannot be compiled here .*")[0]
        assert "install a C++ compiler, or leave --compile off; images are still made by calls" in told
        assert drawn_by(server).metadata.environment.compiled == "off"
        assert scrape(server)("t2i_compilation", t2i_compilation="failed") == 1
        assert server.stop() == 0
        assert "Traceback" not in server.log

    def test_a_server_that_is_told_nothing_builds_what_it_can_and_needs_no_compiler(self, start, tmp_path):
        server = start(CXX=NO_COMPILER).wait_until_ready()
        assert drawn_by(server).metadata.environment.compiled == "off"
        server = start("--compile-cache", tmp_path).wait_until_ready()
        built = cpu_kernels.suit() and shutil.which("g++") is not None
        assert drawn_by(server).metadata.environment.compiled == ("blocks for 32x32" if built else "off")
        assert any(tmp_path.rglob("*.so")) == built

    @NEEDS_KERNELS
    def test_where_nothing_that_was_built_can_be_loaded_it_warns_and_serves_or_says_why_it_does_not(
        self, start, mounted
    ):
        folder = mounted("noexec")
        server = start(TMPDIR=str(folder)).wait_until_ready()
        told = (
            f"{folder}/\\S+ is on a file system that is mounted noexec; let TMPDIR name a folder that can be written to"
        )
        assert len(re.findall(told, server.log)) == 1
        assert drawn_by(server).metadata.environment.compiled == "off"
        assert server.stop() == 0
        assert "Traceback" not in server.log
        server = start("--compile", "blocks", TMPDIR=str(folder))
        assert server.wait() == CannotCompile.exit_code
        assert re.search(f"cannot be compiled here .{told}".replace("noexec;", "noexec.;"), server.log)
        assert "Traceback" not in server.log
        assert "install a C" not in server.log

    def test_a_signal_ends_it_in_the_middle(self, start, tmp_path):
        server = start(*self.FLAGS, "--compile-cache", tmp_path)
        server.wait_for_log("compiling; meanwhile")
        assert server.stop() == 0
        assert "compiled 3 calls" not in server.log
        assert "Traceback" not in server.log


def drawn_by(server: ServerProcess) -> pb.GenerateResponse:
    with connect(server) as channel:
        asked = request(parameter={"seed": 1}, sampling={"steps": 5})
        return pb_grpc.TextToImageServiceStub(channel).Generate(asked, timeout=PATIENCE)


def model_of(server: ServerProcess) -> pb.GetModelResponse:
    with connect(server) as channel:
        return pb_grpc.TextToImageServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=PATIENCE)


def same(one: pb.GenerateResponse, other: pb.GenerateResponse) -> bool:
    """Whether two answers have the same bytes and say that they were made by the same."""
    images = [digests(list(each.data.choices)) for each in (one, other)]
    return images[0] == images[1] and one.metadata.environment == other.metadata.environment
