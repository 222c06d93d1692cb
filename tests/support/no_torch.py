"""`pytest --no-torch` runs the tests that import no torch, which `make check` does within minutes.

An import of torch, or of a library that imports it, skips the module or the test that makes it. So does the start of a
server, which would import torch in a process of its own. No list of tests has to be maintained.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

_LIBRARIES = frozenset({"torch", "diffusers", "transformers", "accelerate"})


class _SkipImports(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in _LIBRARIES:
            pytest.skip("--no-torch: it imports torch", allow_module_level=True)
        return None


_finder = _SkipImports()


def enable() -> None:
    sys.meta_path.insert(0, _finder)


def is_enabled() -> bool:
    return _finder in sys.meta_path


def skip_server() -> None:
    """Skip the test that is about to start a server, where these are left out."""
    if is_enabled():
        pytest.skip("--no-torch: it starts a server")


def must_ignore(folder: Path) -> bool:
    """Return whether the conftest of a folder imports torch, for all of its tests."""
    conftest = folder / "conftest.py"
    return is_enabled() and conftest.is_file() and "\nimport torch\n" in conftest.read_text("utf-8")


def imported() -> list[str]:
    """Return the libraries that this process has imported all the same."""
    return sorted(_LIBRARIES & sys.modules.keys())
