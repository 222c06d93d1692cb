"""Fixtures for the tests of the ensemble itself: a tiny one, and the devices of this machine."""

import os
from pathlib import Path

import pytest
import tiny_ensemble

from server import model

# Of hundreds of servers each would build kernels, for seconds. test_compilation.py starts some as they come.
os.environ.setdefault("T2I_COMPILE", "off")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ensemble.save(tmp_path_factory.mktemp("ensemble"))


@pytest.fixture(scope="module", params=[name for name, is_there in model._DEVICES.items() if is_there()])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
