"""The library of the C++ kernels of `cpu_kernels.cpp`: found next to this file or in the cache, or else built.

    python -m server.acceleration.cpu_library [--output FOLDER]

builds it next to this file, where every server finds it: for an image without a compiler. No torch is needed for that.

A library ends with the SHA-256 of all that is before it: the process would end by a signal if it loaded one that is cut
short. One that cannot be used, whatever the reason, counts as none, and is built again.
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
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
_FLAGS = ("-O3", "-mavx2", "-mfma", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
_NAME = f"cpu-kernels-{hashlib.sha256(repr(_FLAGS).encode() + _SOURCE.read_bytes()).hexdigest()[:16]}.so"
_PREBUILT = Path(__file__).parent
_UNFINISHED = ".cpu-kernels-unfinished-"
_STALE_SECONDS = 600  # after which what a build left unfinished is nobody's any more
# A compiler says these in its own lines; they are about where it writes.
_NO_PLACE = [os.strerror(each) for each in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)]

_lock = threading.Lock()


class CannotBuild(Exception):
    """There is no library and none can be built. `reason` says why, `advice` what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason, self.advice = reason, advice


class _Unusable(Exception):
    """A library that cannot be loaded, or must not be."""


def load(cache: Path | None) -> ctypes.CDLL:
    """Load the library: the prebuilt one, or one from the cache, or else a new one, which the cache then keeps.

    Without a cache a new one is in a temporary folder until it is loaded. Raises CannotBuild.
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
        except (_Unusable, OSError) as error:
            unusable.append(f"{file} {_words(error)}")
    try:
        if cache is not None:
            return _open_built(cache, "--compile-cache")
        with _temporary_folder() as temporary:
            return _open_built(Path(temporary), "TMPDIR")
    except CannotBuild as error:
        raise CannotBuild("; ".join([*unusable, error.reason]), error.advice) from error


def _open_built(folder: Path, knob: str) -> ctypes.CDLL:
    file = build(folder, knob)
    try:
        return _open(file, is_shared=False)
    except (_Unusable, OSError) as error:
        raise CannotBuild(f"{file} {_words(error)}", _advice(knob)) from error


def prebuild() -> Path:
    """Build the library next to this file, unless a usable one is there, and return its file. Raises CannotBuild."""
    file = _PREBUILT / _NAME
    with contextlib.suppress(_Unusable, OSError):
        _open(file, is_shared=False)
        return file
    return build(_PREBUILT)


def build(folder: Path, knob: str = "--output") -> Path:
    """Build the library in a folder, whole or not at all, and return its file. Raises CannotBuild.

    `knob` is the option that names the folder, for the advice.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as unfinished:
            made = Path(unfinished) / _NAME
            _compile(made, knob)
            with made.open("ab") as file:
                file.write(hashlib.sha256(made.read_bytes()).digest())
            made.replace(folder / _NAME)
    except OSError as error:
        raise CannotBuild(f"nothing can be written to {folder}: {_words(error)}", _advice(knob)) from error
    return folder / _NAME


def _compile(made: Path, knob: str) -> None:
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
    # All that a compiler writes is in one folder, which a message can name.
    environment = os.environ | {"TMPDIR": str(made.parent), "LC_ALL": "C"}
    try:
        ended = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            check=False,
        )  # fmt: skip
    except OSError as error:
        is_absent = isinstance(error, FileNotFoundError)
        advice = "install a C++ compiler" if is_absent else "set CXX to a C++ compiler that can be run"
        raise CannotBuild(f"{compiler}: {error.strerror}", advice) from error
    if ended.returncode == 0:
        return
    if no_place := next((each for each in _NO_PLACE if each in ended.stderr), None):
        raise CannotBuild(f"nothing can be written to {made.parent.parent}: {no_place}", _advice(knob))
    reason = next((line for line in ended.stderr.splitlines() if "error" in line), f"exit {ended.returncode}")
    raise CannotBuild(f"{compiler}: {reason}", "set CXX to a C++ compiler that works")


def _open(file: Path, is_shared: bool) -> ctypes.CDLL:
    """Load a library that is whole; one from a folder that is shared with others, only if none of them wrote it.

    Raises _Unusable or OSError.
    """
    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        content = opened.read()
    if is_shared and (status.st_uid not in (0, os.geteuid()) or status.st_mode & stat.S_IWOTH):
        raise _Unusable("belongs to somebody else, or can be written by anybody")
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise _Unusable("is broken")
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        if os.statvfs(file.parent).f_flag & os.ST_NOEXEC:
            raise _Unusable("is on a file system that is mounted noexec") from error
        raise _Unusable(f"cannot be loaded: {str(error).removeprefix(f'{file}: ')}") from error


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise CannotBuild(f"there is no temporary folder: {_words(error)}", _advice("TMPDIR")) from error


def _remove_stale(folder: Path) -> None:
    """Remove what processes that were killed left of their builds."""
    for each in folder.glob(f"{_UNFINISHED}*"):
        try:
            is_stale = time.time() - each.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # it is finished
            continue
        if is_stale:
            shutil.rmtree(each, ignore_errors=True)


def _words(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _advice(knob: str) -> str:
    return f"let {knob} name a folder that can be written to, has room, and is not mounted noexec"


def main() -> int:
    """Build the library where the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m server.acceleration.cpu_library", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=_PREBUILT, metavar="FOLDER", help="default: %(default)s")
    folder = parser.parse_args().output
    if platform.machine() != "x86_64":
        print(f"the kernels are for x86-64, and this is {platform.machine()}", file=sys.stderr)  # noqa: T201
        return 1
    try:
        print(build(folder))  # noqa: T201
    except CannotBuild as error:
        print(f"python -m server.acceleration.cpu_library: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
