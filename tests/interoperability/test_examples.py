"""Each program in examples/ draws the image that the Python client draws."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nbclient
import nbformat
import pytest
from serving import PATIENCE, ROOT, ServerProcess

from text_to_image_client import TextToImage

EXAMPLES = ROOT / "examples"
PROMPT = "a red apple"
MODEL = "examples"


@pytest.fixture(scope="module")
def kserve() -> Iterator[ServerProcess]:
    server = ServerProcess("--kserve", "--model-name", MODEL).wait_until_ready()
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture(scope="module")
def expected(kserve: ServerProcess) -> bytes:
    with TextToImage(kserve.target) as client:
        return client.generate(PROMPT, seed=7).images[0].data


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def environment(folder: Path, *packages: str) -> Path:
    """Make an environment with these packages; its Python."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin" / "python"


def test_python(kserve: ServerProcess, expected: bytes, tmp_path: Path):
    output = run(sys.executable, EXAMPLES / "python" / "draw.py", kserve.target, PROMPT, tmp_path / "image.jpg")
    assert (tmp_path / "image.jpg").read_bytes() == expected
    assert "base 16 of 16\n" in output


def test_python_says_why_a_call_failed(kserve: ServerProcess, tmp_path: Path):
    command = [sys.executable, EXAMPLES / "python" / "draw.py", kserve.target, " ", tmp_path / "image.jpg"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("INVALID_ARGUMENT: data.prompt: ")


def test_asyncio(kserve: ServerProcess, tmp_path: Path):
    run(sys.executable, EXAMPLES / "python" / "draw_async.py", kserve.target, tmp_path, PROMPT, "a blue heart")
    with TextToImage(kserve.target) as client:
        same = [client.generate(prompt, seed=7, format="png").images[0].data for prompt in (PROMPT, "a blue heart")]
    assert [(tmp_path / f"{number}.png").read_bytes() for number in range(2)] == same


def test_notebook(kserve: ServerProcess, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("T2I_TARGET", kserve.target)
    notebook = nbformat.read(EXAMPLES / "python" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is stored without its outputs"
    nbclient.NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output for output in outputs if "image/jpeg" in output.get("data", ())]
    assert len(pictures) == 4
    assert pictures[0].data["image/jpeg"] != pictures[-1].data["image/jpeg"]


@pytest.mark.slow
def test_node(kserve: ServerProcess, expected: bytes, tmp_path: Path, needs: Callable[[str, str], None]):
    needs("node", "nodejs")
    needs("npm", "npm")
    for file in (EXAMPLES / "node").glob("*.js*"):
        shutil.copy(file, tmp_path)
    run("npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error", cwd=tmp_path)
    output = run("node", "draw.js", kserve.target, PROMPT, tmp_path / "image.jpg", cwd=tmp_path)
    assert (tmp_path / "image.jpg").read_bytes() == expected
    assert "STAGE_BASE 16 of 16\n" in output


@pytest.mark.slow
def test_go(kserve: ServerProcess, expected: bytes, tmp_path: Path, needs: Callable[[str, str], None]):
    needs("go", "golang-go")
    gopath = os.environ.get("GOPATH", "/usr/share/gocode")  # the folder of Debian's packages
    if not any(Path(each, "src", "google.golang.org", "grpc").is_dir() for each in gopath.split(os.pathsep)):
        pytest.skip("apt-get install golang-google-grpc-dev")
    variables = {"GO111MODULE": "off", "GOPATH": gopath, "GOCACHE": str(tmp_path / "cache")}
    program = EXAMPLES / "go" / "draw.go"
    build = ["go", "build", "-o", tmp_path / "draw", program]
    subprocess.run(build, env=os.environ | variables, check=True, timeout=PATIENCE)
    output = run(tmp_path / "draw", kserve.target, PROMPT, tmp_path / "image.jpg")
    assert (tmp_path / "image.jpg").read_bytes() == expected
    assert "step 16 of 16\n" in output


@pytest.mark.slow
@pytest.mark.parametrize(("name", "package"), [("triton", "tritonclient[grpc]==2.73.0"), ("kserve", "kserve==0.21.0")])
def test_open_inference_protocol(name: str, package: str, kserve: ServerProcess, expected: bytes, tmp_path: Path):
    python = environment(tmp_path / "environment", package)
    output = run(python, EXAMPLES / name / "draw.py", kserve.target, MODEL, PROMPT, tmp_path / "image.jpg")
    assert (tmp_path / "image.jpg").read_bytes() == expected
    assert output.endswith(", success\n")


@pytest.fixture
def needs() -> Callable[[str, str], None]:
    def skip_without(command: str, package: str) -> None:
        if shutil.which(command) is None:
            pytest.skip(f"apt-get install {package}")

    return skip_without
