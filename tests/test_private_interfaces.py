"""Every interface of a dependency that its maintainers do not document is listed here, and is there in the installed
release.

The lists are what the server uses. A failure names the release that broke it: replace the use, or cap the package in
pyproject.toml.
"""

import ast
import importlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from serving import ROOT

SERVER = ROOT / "server"

# Dotted names by package. The first part that is private, or undocumented, makes the whole name so.
INTERFACES: dict[ModuleType, list[str]] = {
    torch: [
        "torch._dynamo.config.accumulated_recompile_limit",
        "torch._dynamo.config.recompile_limit",
        "torch._dynamo.exc.TorchDynamoException",
        "torch._inductor.exc.InvalidCxxCompiler",
        "torch._scaled_mm",
        "torch.compiler.config.cache_key_tag",
        "torch.cpu._is_avx2_supported",
        "torch.ops.aten.silu.out",
        "torch.utils._pytree.tree_map",
    ],
    diffusers: [
        "diffusers.StableDiffusionXLImg2ImgPipeline._get_add_time_ids",
        "diffusers.StableDiffusionXLPipeline._get_add_time_ids",
    ],
}
NAMED = {name for names in INTERFACES.values() for name in names}
# What private names of foreign objects look like in the source, where the object is not the module itself.
OBJECTS = {"pipeline._get_add_time_ids"}
PUBLIC = {"os._exit"}  # documented in spite of its name
LOGGERS = ["grpc._cython.cygrpc"]


def resolve(name: str) -> object:
    """Return the object of a dotted name, importing as many leading parts as are modules."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:index]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package, names in INTERFACES.items() for name in names]
)
def test_installed_release_has_the_interface(package: ModuleType, name: str):
    try:
        resolve(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"{package.__name__} {package.__version__} has no {name}, which the server uses: {error}")


def private_names(file: Path) -> set[str]:
    """Return the private names of other packages in a source file: imported ones and attributes."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and any(map(is_private, node.module.split("."))):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))}
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            found.add(ast.unparse(node))
    return found


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__")


def own_names() -> set[str]:
    """Return the private attributes that the server's own classes define or set, or that namedtuples have."""
    names = {"_replace", "_asdict", "_fields"}
    for file in SERVER.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def test_every_private_interface_in_the_source_is_listed():
    own = own_names()
    sources = (file for file in SERVER.rglob("*.py") if "stubs" not in file.parts)
    used = {name for file in sources for name in private_names(file) if name.rpartition(".")[2] not in own}
    prefixes = {".".join(name.split(".")[:length]) for name in NAMED for length in range(1, name.count(".") + 2)}
    unlisted = used - prefixes - OBJECTS - PUBLIC
    assert not unlisted, f"not listed in {Path(__file__).name}: {sorted(unlisted)}"


@pytest.mark.parametrize("name", LOGGERS)
def test_loggers_of_grpc_that_get_a_filter_are_still_used(name: str):
    program = f"import grpc, logging; print({name!r} in logging.Logger.manager.loggerDict)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "True", f"grpcio {version('grpcio')} has no logger {name}"
