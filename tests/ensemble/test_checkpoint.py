"""Checkpoints that load, and one sentence and one exit code for each kind of broken checkpoint."""

import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import tiny_ensemble
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import PATIENCE, ROOT, connect

from server import model
from server.domain import Stage, default_request
from server.ensemble import checkpoint, devices
from server.errors import (
    CheckpointError,
    GitLfsPointer,
    MissingPart,
    NoDevice,
    NotEnoughMemory,
    TruncatedFile,
    WrongExpert,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 5135149760\n".format("0" * 64)
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_ensemble.save(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole ensemble, to be broken."""
    return shutil.copytree(whole, tmp_path / "ensemble")


def load(folder: Path) -> model.Ensemble:
    with contextlib.closing(checkpoint.inspect(folder / "base", folder / "refiner")) as experts:
        return model.load(experts, device="cpu")


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        (folder / name).write_text(text)

    return break_it


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])

    return break_it


def swap(folder: Path) -> None:
    (folder / "base").rename(folder / "other")
    (folder / "refiner").rename(folder / "base")
    (folder / "other").rename(folder / "refiner")


def twice_the_base(folder: Path) -> None:
    shutil.rmtree(folder / "refiner")
    shutil.copytree(folder / "base", folder / "refiner")


def weights_of_the_other_expert(folder: Path) -> None:
    shutil.copy(folder / "base" / UNET, folder / "refiner" / UNET)


def dangle(folder: Path) -> None:
    """As when the cache that a folder of links points into was cleared."""
    (folder / "base" / UNET).unlink()
    (folder / "base" / UNET).symlink_to(folder / "gone")


def grow(folder: Path) -> None:
    """A valid file of 4 TB that takes no room on disk: its header is right and the rest is a hole."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    with (folder / "base" / UNET).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * 10**12)


@pytest.mark.parametrize(
    ("break_it", "error", "words"),
    [
        (remove("base/model_index.json"), MissingPart, "has no model_index.json; give the folder that `hf download`"),
        (lambda folder: shutil.rmtree(folder / "base"), MissingPart, "base does not exist; give the folder that `hf"),
        (write("base/model_index.json", "{"), MissingPart, "cannot be read as JSON"),
        (write("base/model_index.json", "[]"), MissingPart, "holds no JSON object"),
        (remove(f"base/{UNET}"), MissingPart, "has no safetensors weights; fetch the checkpoint again"),
        (remove("base/text_encoder/model.safetensors"), MissingPart, "text_encoder has no safetensors weights"),
        (remove("refiner/unet/config.json"), MissingPart, "config.json is missing"),
        (remove("base/tokenizer/tokenizer_config.json"), MissingPart, "tokenizer_config.json is missing"),
        (remove("base/tokenizer_2/tokenizer.json"), MissingPart, "vocab.json is missing"),
        (remove("base/scheduler/scheduler_config.json"), MissingPart, "scheduler_config.json is missing"),
        (write("base/unet/config.json", "{"), MissingPart, "unet/config.json cannot be read as JSON"),
        (write("base/tokenizer/tokenizer.json", "{"), MissingPart, "tokenizer.json cannot be read as JSON"),
        (write("refiner/scheduler/scheduler_config.json", ""), MissingPart, "cannot be read as JSON"),
        (dangle, MissingPart, "cannot be read (No such file or directory)"),
        (weights_of_the_other_expert, MissingPart, "refiner does not fit together ("),
        (
            write("base/defaults.json", '{"scheduler": "heun", "steps": 3}'),
            MissingPart,
            '"scheduler" is no default that it can set, take it out; it can set name, steps, guidance_scale, high_',
        ),
        (
            write("base/defaults.json", '{"steps": "many", "stepz": 3}'),
            MissingPart,
            '; "stepz" is no default that it can set',
        ),
        (write("base/defaults.json", '{"steps": 0}'), MissingPart, '"steps" must be greater than or equal to 1, not 0'),
        (
            write("base/defaults.json", '{"guidance_scale": 51}'),
            MissingPart,
            "must be less than or equal to 50, not 51",
        ),
        (write("base/defaults.json", "[]"), MissingPart, "defaults.json"),
        (
            write(f"base/{UNET}", POINTER),
            GitLfsPointer,
            "is a git-lfs pointer instead of weights; run `git lfs install`",
        ),
        (write("refiner/text_encoder_2/model.safetensors", POINTER), GitLfsPointer, "git lfs pull"),
        (cut(f"base/{UNET}", 0.5), TruncatedFile, "is not whole"),
        (cut(f"refiner/{UNET}", 0.999), TruncatedFile, "is not whole"),
        (cut("base/vae/diffusion_pytorch_model.safetensors", 0), TruncatedFile, "is not whole"),
        (swap, WrongExpert, "holds a refiner where the base belongs; give it to --refiner"),
        (twice_the_base, WrongExpert, "holds a base where the refiner belongs; give it to --base"),
        (grow, NotEnoughMemory, "GiB are free; take a larger device"),
    ],
)
def test_broken_checkpoint_is_reported_in_one_sentence(
    folder: Path, break_it, error: type[CheckpointError], words: str
):
    break_it(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_page_cache_counts_as_free_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 700\nactive_file 300\ninactive_file 2500\n")
    assert devices.free_bytes("cpu") == 5000 - (4000 - 300 - 2500)
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.free_bytes("cpu") > 2**20, "what the machine has free"


def test_file_that_cannot_be_read_is_reported(folder: Path):
    (folder / "base" / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / "base" / "tokenizer" / name).write_text("{}")
    assert checkpoint.inspect(folder / "base", None).fingerprint()
    (folder / "base" / "tokenizer" / "merges.txt").unlink()
    (folder / "base" / "tokenizer" / "merges.txt").symlink_to("/proc/self/mem")  # whose beginning nobody can read
    with pytest.raises(MissingPart, match=r"merges.txt cannot be read \(Input/output error\)"):
        checkpoint.inspect(folder / "base", None).fingerprint()


def test_broken_files_are_reported_before_torch_is_imported(folder: Path):
    (folder / "base" / UNET).write_text(POINTER)
    program = (
        "import sys; from server.runtime import load; from server.settings import Settings\n"
        "try: load(Settings())\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    inspected = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"T2I_BASE": str(folder / "base")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert inspected.stdout == "GitLfsPointer False\n"


def test_out_of_memory_while_loading_is_reported():
    with pytest.raises(NotEnoughMemory, match="ran out of memory"), devices.loading_weights("cpu"):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), devices.loading_weights("cpu"):
        torch.empty(2, 3) @ torch.empty(2, 3)  # anything else stays what it is


def test_absent_device_is_reported_with_the_available_ones(whole: Path):
    absent = next(name for name in ("mps", "cuda") if not devices.AVAILABLE[name]())
    with pytest.raises(NoDevice, match=f"no {absent} device is here, but .*cpu"):
        model.load(checkpoint.inspect(whole / "base", None), device=absent)


@pytest.mark.parametrize(
    ("break_it", "code"), [(swap, 13), (write(f"base/{UNET}", POINTER), 11), (cut(f"base/{UNET}", 0.5), 12), (grow, 14)]
)
def test_server_exits_with_the_sentence_and_the_code(start_server, folder: Path, break_it, code: int):
    break_it(folder)
    server = start_server("--base", str(folder / "base"), "--refiner", str(folder / "refiner"))
    said = []
    once = ("grpc.enable_retries", 0)  # of calls that begin as a server ends, gRPC can lose one that it sends again
    with connect(server, once) as channel, contextlib.suppress(grpc.RpcError):  # the stream ends with the server
        for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE):
            said.append(answer.status)
    if code == NotEnoughMemory.exit_code:  # the others can be reported, and the server gone, before any call
        assert said
    assert set(said) <= {health_pb2.HealthCheckResponse.NOT_SERVING}
    assert server.wait() == code
    assert len([line for line in server.lines if "ERROR" in line]) == 1
    assert "lifecycle: serving" not in server.log
    assert "Traceback" not in server.log


def test_absent_device_exits_with_its_code(start_server, whole: Path):
    absent = next(name for name in ("mps", "cuda") if not devices.AVAILABLE[name]())
    server = start_server("--base", str(whole / "base"), "--device", absent)
    assert server.wait() == NoDevice.exit_code


def test_equal_second_text_encoders_are_loaded_once(folder: Path):
    experts = load(folder)._pipelines.values()
    assert len({id(pipeline.text_encoder_2) for pipeline in experts}) == 1
    assert len({id(pipeline.vae) for pipeline in experts}) == 1


def test_refiner_without_text_encoder_uses_the_bases(folder: Path, whole: Path):
    for part in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.rmtree(folder / "refiner" / part)

    def hidden(folder: Path) -> torch.Tensor:
        ensemble = load(folder)
        return ensemble.encode(default_request(ensemble.info, "a cat", seed=1)).hidden[Stage.REFINER]

    assert torch.equal(hidden(folder), hidden(whole))


def test_refiner_keeps_a_different_text_encoder(folder: Path, tmp_path: Path):
    other = tmp_path / "other"
    tiny_ensemble.save(other, seed=1)
    shutil.copytree(other / "refiner" / "text_encoder_2", folder / "refiner" / "text_encoder_2", dirs_exist_ok=True)
    assert len({id(pipeline.text_encoder_2) for pipeline in load(folder)._pipelines.values()}) == 2


def test_fp16_variant_is_preferred(folder: Path):
    tiny_ensemble.save(folder, variant="fp16")
    files = checkpoint.inspect(folder / "base", None).base
    assert files.variant == "fp16"
    assert all(".fp16." in file.name for part in files.weights.values() for file in part)
    (folder / "base" / UNET).write_text(POINTER)  # what is not served need not be there
    assert load(folder).info.precision == "fp32"


def test_variant_of_only_some_parts_is_not_used(folder: Path):
    tiny_ensemble.save(folder, variant="fp16")
    (folder / "base" / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert checkpoint.inspect(folder / "base", None).base.variant is None
    (folder / "base" / UNET).unlink()
    with pytest.raises(MissingPart, match="in fp16 only"):
        load(folder)


def test_shards_are_loaded_and_a_missing_shard_is_reported(tmp_path: Path):
    base, refiner = tiny_ensemble.save(tmp_path, max_shard_size="500KB", variant="fp16")
    shards = sorted((base / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    sharded = model.load(checkpoint.inspect(base, refiner), device="cpu")
    assert sharded.info.has_refiner
    shards[0].unlink()
    with pytest.raises(MissingPart, match=rf"has {len(shards) - 1} of {len(shards)} weights files"):
        model.load(checkpoint.inspect(base, refiner), device="cpu")


def test_files_of_other_frameworks_are_ignored(folder: Path):
    for name in ("unet/model.onnx", "unet/flax_model.msgpack", "unet/openvino_model.xml", "sd_xl_base_1.0.safetensors"):
        (folder / "base" / name).write_text(POINTER)
    (folder / "base" / "vae_1_0").mkdir()
    (folder / "base" / "vae_1_0" / "diffusion_pytorch_model.safetensors").write_text(POINTER)
    assert load(folder).info.has_refiner


def test_fingerprint_covers_exactly_the_served_files(folder: Path, whole: Path):
    before = load(whole).info.fingerprint
    (folder / "base" / "README.md").write_text("words")
    assert load(folder).info.fingerprint == before
    config = folder / "refiner" / "unet" / "config.json"
    config.write_text(config.read_text() + " ")
    assert load(folder).info.fingerprint != before


def test_defaults_json_sets_name_and_defaults(folder: Path):
    assert load(folder).info.name == "base"
    (folder / "base" / "defaults.json").write_text('{"name": "mini", "steps": 7, "guidance_scale": 3}')
    info = load(folder).info
    assert (info.name, info.default_steps, info.default_guidance_scale, info.default_high_noise_frac) == (
        "mini",
        7,
        3.0,
        0.8,
    )
    assert model.load(checkpoint.inspect(folder / "base", None), device="cpu", name="given").info.name == "given"


class TestVerify:
    """`python -m server.verify`, for a step before the server starts."""

    @staticmethod
    def verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        experts = {"T2I_BASE": str(folder / "base"), "T2I_REFINER": str(folder / "refiner")}
        return subprocess.run(
            [sys.executable, "-m", "server.verify", *arguments],
            cwd=ROOT,
            env=os.environ | experts,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def test_it_prints_the_servers_fingerprint(self, whole: Path):
        verified = self.verify(whole)
        assert (verified.returncode, verified.stdout) == (0, f"{load(whole).info.fingerprint}\n")
        assert self.verify(whole, "--fingerprint", verified.stdout.strip()).returncode == 0

    def test_flags_override_the_environment(self, whole: Path, folder: Path):
        (folder / "base" / UNET).write_text(POINTER)
        verified = self.verify(folder, "--base", str(whole / "base"), "--refiner", str(whole / "refiner"))
        assert (verified.returncode, verified.stdout) == (0, self.verify(whole).stdout)

    def test_other_fingerprint_exits_with_16(self, whole: Path):
        verified = self.verify(whole, "--fingerprint", "0" * 64)
        assert verified.returncode == 16
        assert re.fullmatch(
            r"python -m server\.verify: these weights have the fingerprint [0-9a-f]{64}, not 0{64}\n", verified.stderr
        )

    def test_broken_weights_exit_like_the_server(self, folder: Path):
        (folder / "base" / UNET).write_text(POINTER)
        verified = self.verify(folder)
        assert verified.returncode == GitLfsPointer.exit_code
        assert "run `git lfs install`" in verified.stderr
        assert "Traceback" not in verified.stderr
