"""Compiled calls make the images of eager ones but for rounding; other shapes and other threads stay eager."""

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
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
from server.acceleration import layers
from server.acceleration.kernels import cpu, cpu_library
from server.domain import Environment, ImageRequest, OutOfMemory, default_request
from server.engine.events import Failed, Finished
from server.engine.interface import Submission
from server.ensemble import checkpoint, optimization
from server.ensemble.trajectory import Trajectory
from server.errors import CompileError
from server.observability.metrics import Metrics
from server.runtime import Runtime
from server.settings import Settings
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # a C++ compiler on a busy machine

SIDE = 64


def drawn(ensemble: model.Ensemble, side: int = SIDE, **changes) -> np.ndarray:
    return finished(ensemble, begun(ensemble, side, **changes))


def begun(ensemble: model.Ensemble, side: int = SIDE, **changes) -> Trajectory:
    request = replace(default_request(ensemble.info, "cat", seed=1), steps=5, width=side, height=side, **changes)
    trajectory = ensemble.plan(request, ensemble.encode(request), 1)
    ensemble.step([trajectory])
    return trajectory


def finished(ensemble: model.Ensemble, trajectory: Trajectory) -> np.ndarray:
    for _ in trajectory.stages[trajectory.position :]:
        ensemble.step([trajectory])
    return ensemble.decode(trajectory)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ensemble.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(folders) -> model.Ensemble:
    return model.load(checkpoint.inspect(*folders), device="cpu")


@pytest.fixture(scope="module", params=["blocks", "blocks where no kernels suit"])
def compiled(folders, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> model.Ensemble:
    cache = tmp_path_factory.mktemp("cache")
    without_kernels = request.param != "blocks"
    if not without_kernels and not cpu.is_supported():
        pytest.skip("no kernels suit this CPU")
    if without_kernels and not cpu.is_supported():
        pytest.skip("no kernels suit this CPU, so this is how blocks are compiled in any case")
    # Each begins as a process of its own would: what inductor holds in memory is not written into another cache.
    torch._dynamo.reset()
    clear_caches()
    cpu_library._load.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_cache", None)
        patch.setattr(cpu_library, "_PREBUILT", cache / "nothing")
        if without_kernels:
            patch.setattr(cpu, "is_supported", lambda: False)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which loading sets, for this process: it is put back
        patch.setenv("TRITON_CACHE_DIR", "")
        experts = checkpoint.inspect(*folders)
        loaded = model.load(experts, device="cpu", compile="blocks", compile_cache=cache, compile_sizes=[(SIDE, SIDE)])
        assert any(cache.rglob("*.so")), "what is compiled is kept"
    return loaded


def test_compiled_images_differ_by_rounding_and_repeat_exactly(plain, compiled):
    image = drawn(compiled)
    assert np.abs(image.astype(int) - drawn(plain)).max() <= 2
    assert np.array_equal(image, drawn(compiled))


def test_other_sizes_run_the_cpu_kernels_or_equal_compile_off(plain, compiled):
    image, expected = drawn(compiled, 2 * SIDE), drawn(plain, 2 * SIDE)
    if compiled.info.environment.compiled == "blocks for all sizes":
        assert 0 < (begun(compiled, 2 * SIDE).latents - begun(plain, 2 * SIDE).latents).abs().max() < 1e-4
        assert np.abs(image.astype(int) - expected).max() <= 2
    else:
        assert np.array_equal(image, expected)


def test_unguided_images_differ_by_rounding(plain, compiled):
    image = drawn(compiled, guidance_scale=1.0)
    assert np.abs(image.astype(int) - drawn(plain, guidance_scale=1.0)).max() <= 2


def test_environment_says_what_is_compiled(plain, compiled):
    assert plain.info.environment.compiled == "off"
    assert compiled.info.environment.compiled in ("blocks for all sizes", "blocks for 64x64")
    assert plain.info.environment.fingerprint != compiled.info.environment.fingerprint


def test_compiled_calls_are_counted_and_timed(plain, compiled):
    assert (plain.info.compiled_calls, plain.info.compile_seconds) == (0, 0)
    assert compiled.info.compiled_calls == 3, "the base, the refiner and the decoder, for one size"
    metrics = Metrics(max_queue=1)
    metrics.set_model(compiled.info)
    assert metrics.registry.get_sample_value("t2i_compiled_calls") == 3
    assert metrics.registry.get_sample_value("t2i_compile_seconds") == compiled.info.compile_seconds > 0


NO_COMPILER = "no-such-compiler"
NEEDS_KERNELS = pytest.mark.skipif(not cpu.is_supported(), reason="the C++ kernels are not for this CPU")


def patch_cache(patch: pytest.MonkeyPatch) -> None:
    """Have put back what loading with a cache sets for this process; and inductor begin as in a new one."""
    torch._dynamo.reset()
    clear_caches()
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        patch.setenv(variable, "")
    patch.setattr(cpu, "_cache", None)


@pytest.fixture
def nothing_prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_library, "_PREBUILT", tmp_path / "nothing")
    monkeypatch.setattr(cpu, "_cache", None)
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
    ("suit", "compiler", "compiled"),
    [
        (True, None, "blocks for all sizes"),
        (False, None, "off"),
        (True, NO_COMPILER, "off"),
        (True, "false", "off"),  # a program that is there, and fails
    ],
)
@pytest.mark.usefixtures("nothing_prebuilt")
def test_auto_builds_the_cpu_kernels_where_it_can(
    folders, suit: bool, compiler: str | None, compiled: str, monkeypatch, caplog
):
    if suit and not cpu.is_supported():
        pytest.skip("no kernels suit this CPU")
    monkeypatch.setattr(cpu, "is_supported", lambda: suit)
    if compiler is not None:
        monkeypatch.setenv("CXX", compiler)
    caplog.set_level("INFO", "server.model")
    ensemble = model.load(checkpoint.inspect(*folders), device="cpu", compile="auto")
    assert ensemble.info.environment.compiled == compiled
    assert drawn(ensemble).shape == (SIDE, SIDE, 3)
    without = "images are made without the C++ kernels"
    why = {
        None: f"{without}: they are for x86-64 CPUs with AVX2 and FMA, which torch may use",
        NO_COMPILER: f"{without}, more slowly: {NO_COMPILER}: No such file or directory; install a C++ compiler",
        "false": f"{without}, more slowly: false: exit 1; set CXX to a C++ compiler that works",
    }
    assert caplog.messages == ([] if compiled != "off" else [why[compiler]])


@NEEDS_KERNELS
@pytest.mark.usefixtures("nothing_prebuilt")
def test_unusable_cache_is_a_warning_for_auto_and_an_error_for_blocks(folders, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    patch_cache(monkeypatch)
    experts = checkpoint.inspect(*folders)
    ensemble = model.load(experts, device="cpu", compile="auto", compile_cache=cache)
    assert ensemble.info.environment.compiled == "blocks for all sizes"
    assert caplog.messages == [
        f"nothing can be written to {cache}: Not a directory; let --compile-cache name a folder that can be written "
        "to, has room, and is not mounted noexec; the kernels are not cached"
    ]
    cpu_library._load.cache_clear()
    with pytest.raises(CompileError, match=f"nothing can be written to {cache}: Not a directory.; let --compile-cache"):
        model.load(experts, device="cpu", compile="blocks", compile_cache=cache)


@pytest.mark.parametrize("cached", [True, False])
def test_folder_that_inductor_cannot_use_is_named_with_the_reason(folders, cached: bool, tmp_path, monkeypatch):
    """No kernels suit, and only some of what inductor writes comes out as an error of torch's."""
    folder = tmp_path / "file"
    folder.touch()
    patch_cache(monkeypatch)
    monkeypatch.setattr(cpu, "is_supported", lambda: False)
    message, cache = f"nothing can be written to {folder}: File exists; let --compile-cache name another folder", folder
    if not cached:
        message, cache = f"{folder}/inductor: Not a directory.; let --compile-cache, or TMPDIR without one, name", None
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
        monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(folder / "inductor"))
    with pytest.raises(CompileError, match=message):
        model.load(checkpoint.inspect(*folders), device="cpu", compile="blocks", compile_cache=cache)


@NEEDS_KERNELS
def test_cached_code_for_another_instruction_set_is_compiled_again(tmp_path):
    """A cache can be that of machines with other CPUs."""
    code = (
        "import torch; from server.acceleration import compilation; values = torch.linspace(0, 1, 1000)\n"
        "call = torch.compile(lambda values: (values.cos() * 2).sum() + values)\n"
        "with compilation.capturing_shapes(): made = call(values)\n"
        "assert torch.allclose(made, (values.cos() * 2).sum() + values)"
    )
    for capability in ("avx2", "default", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=600)


@pytest.mark.parametrize("changes", [{"precision": "fp8"}, {"offload": True}])
def test_auto_builds_nothing_for_fp8_and_offload(folders, changes: dict):
    assert not model.load(checkpoint.inspect(*folders), device="cpu", compile="auto", **changes).compiles


def test_impossible_compile_sizes_are_reported_before_compiling(folders):
    with pytest.raises(CompileError, match="multiples of 2: --compile-sizes cannot have 33x64"):
        model.load(checkpoint.inspect(*folders), device="cpu", compile="blocks", compile_sizes=[(33, 64), (64, 64)])


def test_missing_compiler_is_reported_in_one_sentence(folders, as_installed, tmp_path: Path):
    base, refiner = folders
    server = subprocess.run(
        [
            sys.executable,
            "-m",
            "server",
            "--listen",
            "127.0.0.1:0",
            "--device",
            "cpu",
            "--base",
            base,
            "--refiner",
            refiner,
            "--compile",
            "blocks",
            "--compile-cache",
            tmp_path,
        ],
        cwd=as_installed,
        env={"PATH": str(tmp_path), "CXX": NO_COMPILER},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert server.returncode == CompileError.exit_code, server.stderr
    assert "the networks cannot be compiled here" in server.stderr
    assert "Traceback" not in server.stderr


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_compile_while_serving_is_refused_on_a_device_other_than_cuda(folders, device: str):
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("auto is CUDA here")
    with pytest.raises(CompileError, match="--compile-while-serving is for CUDA"):
        model.load(checkpoint.inspect(*folders), device=device, compile="blocks", compile_while_serving=True)


@pytest.fixture
def load_with_copies(folders, monkeypatch: pytest.MonkeyPatch) -> Callable[..., model.Ensemble]:
    """Load an ensemble that compiles shared-weight copies while it serves, on a CPU instead of CUDA."""
    if not cpu.is_supported():
        pytest.skip("no kernels suit this CPU")

    def load(**options) -> model.Ensemble:
        choose = optimization.choose

        def choose_with_copies(options: optimization.Options, target: optimization.Target):
            plan = choose(replace(options, compile_while_serving=False), target)
            return replace(plan, shared_weight_copies=True)

        monkeypatch.setattr(model, "choose", choose_with_copies)
        return model.load(
            checkpoint.inspect(*folders), device="cpu", compile="blocks", compile_while_serving=True, **options
        )

    return load


def test_eager_networks_serve_until_copies_are_compiled(folders, load_with_copies, monkeypatch):
    eager = drawn(model.load(checkpoint.inspect(*folders), device="cpu", max_batch=2))
    fused: list[nn.Module] = []
    fuse = layers.fuse_layers
    monkeypatch.setattr(layers, "fuse_layers", lambda network, device: fused.append(network) or fuse(network, device))
    usual = sys.getswitchinterval()
    ensemble = load_with_copies(max_batch=2)
    assert not fused
    assert np.array_equal(drawn(ensemble), eager), "nothing is compiled at first"
    begun_before = begun(ensemble)
    with ThreadPoolExecutor(1) as thread:
        compiling = thread.submit(ensemble.compile, default_request(ensemble.info, "a photo of a cat"))
        while not compiling.done():
            assert np.array_equal(drawn(ensemble), eager)
    assert sys.getswitchinterval() == usual
    ensemble.use_compiled(compiling.result()[0])
    assert len({id(each) for each in fused}) == 3, "the base, the refiner and the decoder"
    begun_after = begun(ensemble)
    assert begun_before.batch_key != begun_after.batch_key
    assert np.array_equal(finished(ensemble, begun_before), eager)
    assert (begun_before.conditioning.compiled, begun_after.conditioning.compiled) == (False, True)
    compiled = drawn(ensemble)
    assert np.abs(compiled.astype(int) - eager).max() <= 2
    assert np.array_equal(compiled, drawn(ensemble))


def test_failed_compilation_releases_memory_and_eager_networks_go_on(load_with_copies, monkeypatch):
    copies: list[weakref.ref[nn.Module]] = []
    share_weights, fuse_layers = layers.share_weights, layers.fuse_layers

    def share(network: nn.Module) -> nn.Module:
        made = share_weights(network)
        copies.append(weakref.ref(made))
        return made

    def fuse_the_first(network: nn.Module, device: str) -> None:
        if network is not copies[0]():
            raise torch.OutOfMemoryError("no room for another")
        fuse_layers(network, device)

    monkeypatch.setattr(layers, "share_weights", share)
    monkeypatch.setattr(layers, "fuse_layers", fuse_the_first)
    ensemble = load_with_copies(max_batch=2)
    expected = drawn(ensemble)
    with pytest.raises(OutOfMemory):
        ensemble.compile(default_request(ensemble.info, "a photo of a cat"))
    gc.collect()
    assert len(copies) == 3, "the base, the refiner and the autoencoder"
    assert [each() for each in copies] == [None] * 3
    assert np.array_equal(drawn(ensemble), expected)


class TestService:
    """A service that compiles while it serves, in this process: on a CPU instead of CUDA."""

    @pytest.fixture
    async def opened(self, load_with_copies) -> AsyncIterator[Runtime]:
        settings = Settings(compile="blocks", compile_while_serving=True)
        service = Runtime(settings, load_with_copies)
        await service.open()
        yield service
        service.engine.stop()
        assert await service.close()

    async def test_it_compiles_while_it_serves_and_reports_it(self, opened: Runtime, caplog):
        caplog.set_level("INFO", "server.runtime")
        eager = await environment_of_an_image(opened)
        assert eager.compiled in ("off", "blocks for all sizes")  # it may have compiled by now
        await until(lambda: state(opened, "compiled") == 1)
        compiled = await environment_of_an_image(opened)
        assert compiled.compiled == "blocks for all sizes"
        assert opened.metrics.registry.get_sample_value("t2i_compiled_calls") == 3
        assert opened.metrics.registry.get_sample_value("t2i_compile_seconds") > 0
        assert any(each.startswith("compiled 3 calls in ") for each in caplog.messages)

    @pytest.mark.usefixtures("nothing_prebuilt")
    async def test_it_serves_eager_networks_if_it_cannot_compile_and_says_what_to_do(
        self, load_with_copies, monkeypatch, caplog
    ):
        monkeypatch.setenv("CXX", NO_COMPILER)
        service = Runtime(Settings(compile="blocks", compile_while_serving=True), load_with_copies)
        await service.open()
        await until(lambda: state(service, "failed") == 1)
        (message,) = [each for each in caplog.messages if "cannot be compiled here" in each]
        assert "install a C++ compiler, or leave --compile off; eager networks keep serving" in message
        assert not any(record.exc_info for record in caplog.records)
        assert (await environment_of_an_image(service)).compiled == "off"
        service.engine.stop()
        assert await service.close()


def state(service: Runtime, name: str) -> float | None:
    return service.metrics.registry.get_sample_value("t2i_compilation", {"t2i_compilation": name})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


async def environment_of_an_image(service: Runtime) -> Environment:
    ended: asyncio.Queue[Finished | Failed] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(event: object) -> None:
        if isinstance(event, Finished | Failed):
            loop.call_soon_threadsafe(ended.put_nowait, event)

    request = ImageRequest("cat", "", (1,), 5, 5.0, 0.8, "euler", 32, 32)
    service.engine.submit(Submission("one", request), deliver)
    event = await ended.get()
    assert isinstance(event, Finished)
    return event.environment


@pytest.fixture
def start(start_server, folders, as_installed) -> Callable[..., ServerProcess]:
    """Start a server from a folder in which nothing is built."""

    def start(*flags: object, **environment: str) -> ServerProcess:
        base, refiner = folders
        given = ("--device", "cpu", "--base", base, "--refiner", refiner, *flags)
        return start_server(*map(str, given), cwd=as_installed, **environment)

    return start


def test_server_builds_the_cpu_kernels_but_needs_no_compiler(start, tmp_path):
    server = start(CXX=NO_COMPILER).wait_until_ready()
    assert drawn_by(server).metadata.environment.compiled == "off"
    server = start("--compile-cache", tmp_path).wait_until_ready()
    built = cpu.is_supported() and shutil.which("g++") is not None
    assert drawn_by(server).metadata.environment.compiled == ("blocks for all sizes" if built else "off")
    assert any(tmp_path.rglob("*.so")) == built


@NEEDS_KERNELS
def test_noexec_folder_is_a_warning_for_auto_and_an_error_for_blocks(start, mounted):
    folder = mounted("noexec")
    server = start(TMPDIR=str(folder)).wait_until_ready()
    message = (
        f"{folder}/\\S+ is on a file system that is mounted noexec; let TMPDIR name a folder that can be written to"
    )
    assert len(re.findall(message, server.log)) == 1
    assert drawn_by(server).metadata.environment.compiled == "off"
    assert server.stop() == 0
    assert "Traceback" not in server.log
    server = start("--compile", "blocks", TMPDIR=str(folder))
    assert server.wait() == CompileError.exit_code
    assert re.search(f"cannot be compiled here .{message}".replace("noexec;", "noexec.;"), server.log)
    assert "Traceback" not in server.log
    assert "install a C" not in server.log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="--compile-while-serving is for CUDA")
class TestWhileServing:
    """--compile-while-serving, on CUDA with the embedded ensemble."""

    FLAGS = ("--compile", "blocks", "--compile-while-serving", "--metrics-listen", "127.0.0.1:0")

    @pytest.fixture
    def start(self, start_server) -> Callable[..., ServerProcess]:
        return lambda *flags: start_server(*map(str, ("--device", "cuda", *flags)))

    def test_it_serves_eagerly_then_compiled_and_each_response_says_which(self, start, tmp_path):
        server = start(*self.FLAGS, "--compile-cache", tmp_path).wait_until_ready()
        with connect(server) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        early = drawn_by(server)
        if early.metadata.environment.compiled == "off":
            before = start("--compile", "off").wait_until_ready()
            assert same(early, drawn_by(before)), "as a server that compiles nothing makes it"

        server.patience = 1200
        server.wait_for_log(r"compiled \d+ calls in \d")
        late = drawn_by(server)
        assert late.metadata.environment.compiled == "blocks for 256x256"
        assert model_of(server).environment == late.metadata.environment
        assert scrape(server)("t2i_compilation", t2i_compilation="compiled") == 1
        assert scrape(server)("t2i_compile_seconds") > 0
        before = start("--compile", "blocks", "--compile-cache", tmp_path).wait_until_ready()
        assert same(late, drawn_by(before)), "as a server that compiles before it serves makes it"

    def test_signal_ends_it_while_it_compiles(self, start, tmp_path):
        server = start(*self.FLAGS, "--compile-cache", tmp_path)
        server.wait_for_log("compiling; eager")
        assert server.stop() == 0
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
