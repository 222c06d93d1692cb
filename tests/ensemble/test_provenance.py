"""The environment: facts about this process, and a reference image that shows other differences."""

import platform
from importlib.metadata import version

import pytest
import torch
from serving import connect

from server import __version__
from server.acceleration.kernels import cpu
from server.domain import CODING_VERSION
from server.ensemble import provenance
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is of x86 processors")
CORES = pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread is all that there is")


def environment_of(server) -> pb.Environment:
    with connect(server) as channel:
        return pb_grpc.TextToImageServiceStub(channel).GetModel(pb.GetModelRequest(), timeout=9).environment


def test_versions_are_those_of_the_installed_packages():
    versions = provenance.environment("cpu", "fp32", 1).versions
    assert versions["server"] == __version__
    assert versions["torch"] == torch.__version__
    for package in ("diffusers", "transformers", "tokenizers", "pillow"):
        assert versions[package] == version(package)
    assert "libjpeg_turbo" in versions or "zlib" in versions
    assert versions["coding"] == CODING_VERSION


def test_tf32_changes_the_environment():
    assert provenance.environment("cpu", "fp32", 1).fp32_math == "matmul ieee, convolution ieee"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert provenance.environment("cpu", "fp32", 1).fp32_math == "matmul bf16, convolution ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "value", "differing"),
    [
        pytest.param("OMP_NUM_THREADS", "1", {"threads"}, marks=CORES),
        # The C++ kernels are not for a CPU that torch does not take for one with AVX2.
        pytest.param(
            "ATEN_CPU_CAPABILITY", "default", {"hardware"} | ({"compiled"} if cpu.is_supported() else set()), marks=X86
        ),
        pytest.param("MKL_CBWR", "COMPATIBLE", set(), marks=X86),
    ],
    ids=["threads", "torch's instruction set", "MKL's instruction set, which only the reference shows"],
)
def test_every_change_of_arithmetic_changes_the_fingerprint(
    server, start_server, variable: str, value: str, differing: set[str]
):
    here = environment_of(server)
    there = environment_of(start_server(**{variable: value}).wait_until_ready())
    names = {field.name for field in pb.Environment.DESCRIPTOR.fields}
    changed = {name for name in names if getattr(here, name) != getattr(there, name)}
    # What another number of threads makes of the picture of reference depends on the CPU: it can be the same.
    assert changed | {"reference"} == {"fingerprint", "reference", *differing}
    assert "reference" in changed or differing == {"threads"}
