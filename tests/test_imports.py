"""Imports of server/ point one way: protocols, frontend, engine; model, ensemble, acceleration."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ROOT

SERVER = ROOT / "server"
SHARED = {"server", "server.domain", "server.errors"}

# The packages and modules that each package may import, apart from itself and SHARED.
MAY_IMPORT = {
    "acceleration": set(),
    "ensemble": {"server.acceleration"},
    "engine": {"server.engine"},
    "stubs": set(),
    "observability": {"server.engine", "server.api"},
    "api": {"server.engine", "server.stubs", "server.settings", "server.observability"},
}


def imported(file: Path) -> Iterator[str]:
    """Yield the modules of server/ that a file imports, those that only type checkers import included."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] == "server")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "server":
            for each in node.names:
                submodule = SERVER.parent / Path(*str(node.module).split("."), each.name)
                is_module = submodule.is_dir() or submodule.with_suffix(".py").is_file()
                yield f"{node.module}.{each.name}" if is_module else str(node.module)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str):
    allowed = MAY_IMPORT[package] | {f"server.{package}"}
    wrong = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in sorted((SERVER / package).rglob("*.py"))
        for module in imported(file)
        if module not in SHARED and not any(f"{module}.".startswith(f"{each}.") for each in allowed)
    ]
    assert wrong == []


def test_every_package_is_in_the_table():
    assert {each.parent.name for each in SERVER.glob("*/__init__.py")} == MAY_IMPORT.keys()


def imports_of_third_parties(file: Path) -> set[str]:
    """Return the top-level packages that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    named = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    named += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {each.split(".")[0] for each in named}


@pytest.mark.parametrize("package", ["engine", "api"])
def test_package_imports_no_torch(package: str):
    importing = [
        str(file.relative_to(ROOT))
        for file in sorted((SERVER / package).rglob("*.py"))
        if {"torch", "diffusers", "transformers"} & imports_of_third_parties(file)
    ]
    assert importing == []
