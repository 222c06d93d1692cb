"""The steps before the imports: garbage collection pauses and resumes, and torch's libraries load ahead of torch."""

import subprocess
import sys

import pytest
from serving import ROOT


def run(code: str) -> str:
    """Run code in a new process and return its output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_garbage_collection_resumes_after_the_imports_without_their_objects():
    code = (
        "import gc; from server import before_imports; frozen = gc.get_freeze_count()\n"  # some by Python 3.12 itself
        "before_imports.resume_garbage_collection(); print(gc.get_freeze_count() - frozen, gc.isenabled())\n"
        "before_imports.pause_garbage_collection(); print(gc.isenabled())\n"
        "before_imports.resume_garbage_collection(); print(gc.get_freeze_count() > frozen + 1000, gc.isenabled())"
    )
    assert run(code).splitlines() == ["0 True", "False", "True True"]


def test_loading_the_model_resumes_garbage_collection():
    pytest.importorskip("torch")
    code = (
        "import gc; from server import before_imports, runtime; from server.settings import Settings\n"
        "before_imports.pause_garbage_collection()\n"
        "runtime.load(Settings(device='cpu', compile='off')); print(gc.isenabled())"
    )
    assert run(code) == "True"


def test_torchs_libraries_are_loaded_before_torch_is_imported():
    pytest.importorskip("torch")
    code = (
        "import sys, threading; from server import before_imports\n"
        "before_imports.preload_torch()\n"
        "[each.join() for each in threading.enumerate() if each is not threading.current_thread()]\n"
        "print('libtorch_python' in open('/proc/self/maps').read(), 'torch' in sys.modules)\n"
        "import torch; print(int(torch.ones(2).sum()))"
    )
    assert run(code).splitlines() == ["True False", "2"]
