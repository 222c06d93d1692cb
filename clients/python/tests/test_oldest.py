"""The client at the other end of its range: the oldest gRPC and protobuf that pyproject.toml allows, real server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CLIENT = Path(__file__).parent.parent
OLDEST = ("grpcio==1.72.2", "grpcio-status==1.72.2", "grpcio-health-checking==1.72.2", "protobuf==6.30.2")


@pytest.mark.slow
def test_the_oldest_grpc_and_protobuf_draw_too(server_target: str, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "pip", "install", "--quiet", *OLDEST, CLIENT], check=True)
    versions = subprocess.run([binaries / "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    installed = {each["name"]: each["version"] for each in json.loads(versions.stdout)}
    assert (installed["protobuf"], installed["grpcio"]) == ("6.30.2", "1.72.2")

    image = tmp_path / "cat.png"
    drawn = subprocess.run(
        [binaries / "t2i", "--target", server_target, "generate", "a cat", "--steps", "2", "-o", image, "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(drawn.stdout)["images"][0]["steps"] == 2
    assert image.read_bytes().startswith(b"\x89PNG")
