"""The library of the C++ kernels: found next to this file or in the cache, or else built.

    python -m server.acceleration.kernels.cpu_library [--output FOLDER]

builds it next to this file, where every server finds it: for an image without a compiler. This needs no torch.

A library ends with the SHA-256 of everything before it, because a process that loads a truncated one is killed by a
signal. An unusable library, whatever the reason, is built again.
"""

import argparse
import contextlib
import ctypes
import errno
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent
_SOURCE = _FOLDER / "library.cpp"  # which includes the other ones
_FLAGS = ("-O3", "-mavx2", "-mfma", "-fopenmp", "-shared", "-fPIC", "-std=c++17")


def _key() -> str:
    """Return a hash of flags and sources."""
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for source in sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")]):
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


_NAME = f"cpu-kernels-{_key()}.so"
_PREBUILT = _FOLDER
_UNFINISHED = ".cpu-kernels-unfinished-"
_STALE_SECONDS = 600  # after which no process is still at work on an unfinished build
# Reasons in a compiler's own words that concern the folder to which it writes.
_UNWRITABLE = [os.strerror(each) for each in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)]

_lock = threading.Lock()


def can_run_here() -> bool:
    """Return whether Linux reports AVX2 and FMA, and ATEN_CPU_CAPABILITY does not keep PyTorch from using them.

    Needs no torch. `cpu.is_supported` asks torch itself.
    """
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() == "default":
        return False
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and {"avx2", "fma"} <= set(found[1].split())


class BuildError(Exception):
    """There is no library and none can be built, for `reason`. `advice` says what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice


class _UnusableError(Exception):
    """A library cannot be loaded, or must not be."""


def load(cache: Path | None) -> ctypes.CDLL:
    """Load the library: the prebuilt one, else that of the cache, else build one into the cache.

    Without a cache it is built in a temporary folder, which is removed when it is loaded. Raises BuildError.
    """
    with _lock:
        return _load(cache)


@functools.cache
def _load(cache: Path | None) -> ctypes.CDLL:
    unusable = []
    for file, is_shared in ((_PREBUILT / _NAME, False), *([] if cache is None else [(cache / _NAME, True)])):
        try:
            if file.is_file():
                return _open(file, is_shared)
        except (_UnusableError, OSError) as error:
            unusable.append(f"{file} {_reason(error)}")
    try:
        if cache is not None:
            return _open_built(cache, "--compile-cache")
        with _temporary_folder() as temporary:
            return _open_built(Path(temporary), "TMPDIR")
    except BuildError as error:
        raise BuildError("; ".join([*unusable, error.reason]), error.advice) from error


def _open_built(folder: Path, option: str) -> ctypes.CDLL:
    file = build(folder, option)
    try:
        return _open(file, is_shared=False)
    except (_UnusableError, OSError) as error:
        raise BuildError(f"{file} {_reason(error)}", _advice(option)) from error


def prebuild() -> Path:
    """Build the library next to this file, unless there is a usable one, and return its path. Raises BuildError."""
    file = _PREBUILT / _NAME
    with contextlib.suppress(_UnusableError, OSError):
        _open(file, is_shared=False)
        return file
    return build(_PREBUILT)


def build(folder: Path, option: str = "--output") -> Path:
    """Build the library in a folder, atomically, and return its path. Raises BuildError.

    `option` is the name of the setting that chose the folder, for the advice.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as unfinished:
            output = Path(unfinished) / _NAME
            _compile(output, option)
            with output.open("ab") as file:
                file.write(hashlib.sha256(output.read_bytes()).digest())
            output.replace(folder / _NAME)
    except OSError as error:
        raise BuildError(f"nothing can be written to {folder}: {_reason(error)}", _advice(option)) from error
    return folder / _NAME


def _compile(output: Path, option: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *_FLAGS, "-o", str(output), str(_SOURCE)]
    # The compiler writes to one folder alone, which a message can name.
    environment = os.environ | {"TMPDIR": str(output.parent), "LC_ALL": "C"}
    try:
        completed = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        is_absent = isinstance(error, FileNotFoundError)
        advice = "install a C++ compiler" if is_absent else "set CXX to a C++ compiler that can be run"
        raise BuildError(f"{compiler}: {error.strerror}", advice) from error
    if completed.returncode == 0:
        return
    if unwritable := next((each for each in _UNWRITABLE if each in completed.stderr), None):
        raise BuildError(f"nothing can be written to {output.parent.parent}: {unwritable}", _advice(option))
    reason = next((line for line in completed.stderr.splitlines() if "error" in line), f"exit {completed.returncode}")
    raise BuildError(f"{compiler}: {reason}", "set CXX to a C++ compiler that works")


def _open(file: Path, is_shared: bool) -> ctypes.CDLL:
    """Load a library after checking its hash and, in a folder that is shared with others, that none of them wrote it.

    Raises _UnusableError or OSError.
    """
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        content = opened.read()
    if is_shared and (status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH):
        raise _UnusableError("belongs to somebody else, or can be written by anybody")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise _UnusableError("is broken")
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        if os.statvfs(file.parent).f_flag & os.ST_NOEXEC:
            raise _UnusableError("is on a file system that is mounted noexec") from error
        raise _UnusableError(f"cannot be loaded: {str(error).removeprefix(f'{file}: ')}") from error


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise BuildError(f"there is no temporary folder: {_reason(error)}", _advice("TMPDIR")) from error


def _remove_stale(folder: Path) -> None:
    """Remove the unfinished builds of processes that were killed."""
    for each in folder.glob(f"{_UNFINISHED}*"):
        try:
            is_stale = time.time() - each.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # it was finished
            continue
        if is_stale:
            shutil.rmtree(each, ignore_errors=True)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _advice(option: str) -> str:
    return f"let {option} name a folder that can be written to, has room, and is not mounted noexec"


def main() -> int:
    """Build the library in the folder that the command line names, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m server.acceleration.kernels.cpu_library", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=_PREBUILT, metavar="FOLDER", help="default: %(default)s")
    folder = parser.parse_args().output
    if platform.machine() != "x86_64":
        print(f"the kernels are for x86-64, and this is {platform.machine()}", file=sys.stderr)  # noqa: T201
        return 1
    try:
        print(build(folder))  # noqa: T201
    except BuildError as error:
        print(f"python -m server.acceleration.kernels.cpu_library: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
