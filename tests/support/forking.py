"""Start Python programs by a fork of one process that has imported torch and diffusers, which takes seconds of a core.

multiprocessing's fork server is that process. Each program that it starts is a process with its own flags,
environment, log and exit code; it shares only the imports.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

_IMPORTED = ["server.lifecycle", "server.runtime", "server.model"]
_READ_LATE = ("T2I_", "OTEL_", "PYTEST_", "COV_", "COVERAGE_")  # variables that no import reads

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_IMPORTED)
_environment_of_imports: dict[str, str] | None = None


class ForkedProcess:
    """A started program, with the methods of subprocess.Popen that tests use."""

    def __init__(self, process: "multiprocessing.context.ForkServerProcess", stderr: IO[str]) -> None:
        self._process = process
        self.stderr = stderr

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the program. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def suits(environment: Mapping[str, str]) -> bool:
    """Return whether a program with this environment may share imports: no variable that an import reads differs."""
    fixed = _environment_of_imports or dict(os.environ)
    changed = {name for name, _ in fixed.items() ^ environment.items()}
    return all(name.startswith(_READ_LATE) for name in changed)


def start(arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> ForkedProcess:
    """Start `python ARGUMENTS`, where these begin with "-m" and a module or with a file, in a folder."""
    global _environment_of_imports
    if _environment_of_imports is None:
        _environment_of_imports = dict(os.environ)
    ours, theirs = _context.Pipe(duplex=False)
    process = _context.Process(target=_run, args=(list(arguments), dict(environment), str(folder), theirs), daemon=True)
    process.start()
    theirs.close()
    return ForkedProcess(process, os.fdopen(os.dup(ours.fileno()), encoding="utf-8", errors="replace"))


def _run(arguments: list[str], environment: dict[str, str], folder: str, stderr: Connection) -> None:
    os.dup2(stderr.fileno(), 2)
    stderr.close()
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys():
        if name.startswith(_READ_LATE):
            del os.environ[name]
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, folder)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
