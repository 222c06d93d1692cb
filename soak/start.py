"""Start the server on a machine that lacks folders, memory, file descriptors, a passwd entry, IPv6, or a stable clock.

Each case is the real server on a machine that lacks one thing. It must serve, or end with a documented exit code and
one sentence, without a traceback, and leave no files. Most cases have the small model of
tests/support/steady_server.py. The cases of folders have the embedded weights, for which the server builds kernels.
"""

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from serving import PATIENCE, ROOT, ServerProcess, request

from soak.flags import outcome
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

_MIB = 2**20
_FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")

# For a mount namespace that ends with the process.
_ALL_READ_ONLY = """
cut -d ' ' -f 2 /proc/mounts | grep -v '^/proc\\|^/sys\\|^/dev$' | while read -r at; do
    mount -o remount,bind,ro "$at" 2> /dev/null || true
done
"""
_FULL = "mount -t tmpfs -o size=64k none {0} && {{ head -c 1M /dev/zero > {0}/full || true; }} 2> /dev/null"


@dataclass(frozen=True)
class Case:
    """One missing thing. A shell runs `script`, as root in the namespaces of `unshare`, and then becomes the server.

    FOLDER in the script and in the variables is a new folder. A variable of None is removed.
    """

    name: str
    script: str = ""
    unshare: str = ""
    variables: Mapping[str, str | None] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    real: bool = False
    allowed: frozenset[int] = frozenset()
    """The allowed exit codes, 0 for serving. Empty: any documented one."""


_SERVES = frozenset({0})

CASES = (
    Case("no HOME", variables={"HOME": None}, real=True, allowed=_SERVES),
    Case("HOME does not exist", variables={"HOME": "/nowhere/home"}, real=True, allowed=_SERVES),
    Case("TMPDIR does not exist", variables={"TMPDIR": "/nowhere/tmp"}, real=True, allowed=_SERVES),
    Case(
        "TMPDIR is read-only",
        "mount -t tmpfs -o ro none FOLDER",
        "--mount",
        {"TMPDIR": "FOLDER"},
        real=True,
        allowed=_SERVES,
    ),
    Case(
        "TMPDIR on noexec",
        "mount -t tmpfs -o noexec none FOLDER",
        "--mount",
        {"TMPDIR": "FOLDER"},
        real=True,
        allowed=_SERVES,
    ),
    Case("TMPDIR is full", _FULL.format("FOLDER"), "--mount", {"TMPDIR": "FOLDER"}, real=True, allowed=_SERVES),
    Case("/tmp is full", _FULL.format("/tmp"), "--mount", {"TMPDIR": None}, real=True, allowed=_SERVES),
    Case(
        "--compile blocks, TMPDIR on noexec",
        "mount -t tmpfs -o noexec none FOLDER",
        "--mount",
        {"TMPDIR": "FOLDER"},
        ("--compile", "blocks"),
        real=True,
    ),
    Case(
        "--compile-cache is read-only",
        "mount -t tmpfs -o ro none FOLDER",
        "--mount",
        flags=("--compile", "blocks", "--compile-cache", "FOLDER"),
        real=True,
    ),
    Case(
        "--compile-cache is full",
        _FULL.format("FOLDER"),
        "--mount",
        flags=("--compile", "blocks", "--compile-cache", "FOLDER"),
        real=True,
    ),
    Case("no writable folder", _ALL_READ_ONLY, "--mount", {"TMPDIR": None}, real=True, allowed=_SERVES),
    Case(
        "a user without a passwd entry",
        "mount --bind /dev/null /etc/passwd",
        "--mount",
        {"HOME": None, "USER": None, "LOGNAME": None},
        real=True,
        allowed=_SERVES,
    ),
    Case(
        "--ready-file on a full disk",
        _FULL.format("FOLDER"),
        "--mount",
        flags=("--ready-file", "FOLDER/ready"),
        allowed=frozenset({4}),
    ),
    Case(
        "--listen on a read-only folder",
        "mount -t tmpfs -o ro none FOLDER",
        "--mount",
        flags=("--listen", "unix:FOLDER/socket"),
        allowed=frozenset({3}),
    ),
    Case(
        "no IPv6, localhost",
        "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
        "--net",
        flags=("--listen", "localhost:0", "--metrics-listen", "localhost:0"),
        allowed=_SERVES,
    ),
    Case(
        "no IPv6, every address",
        "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
        "--net",
        flags=("--listen", "[::]:0"),
        allowed=frozenset({0, 3}),
    ),
    Case(
        "no IPv6, an IPv6 address",
        "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6",
        "--net",
        flags=("--listen", "[::1]:0"),
        allowed=frozenset({3}),
    ),
    Case("no network at all", "", "--net", flags=("--listen", "127.0.0.1:0"), allowed=frozenset({0, 3})),
    Case("64 file descriptors", "ulimit -n 64", allowed=_SERVES),
    Case("64 file descriptors, the real model", "ulimit -n 64", real=True),
    Case("16 file descriptors", "ulimit -n 16"),
    Case("stdin and stdout closed", "exec < /dev/null > /dev/full", allowed=_SERVES),
    Case("an unknown locale", variables={"LC_ALL": "nowhere.UTF-9", "LANG": "x"}, allowed=_SERVES),
    Case("ASCII alone", variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, allowed=_SERVES),
    Case("no PATH", "PATH=", variables={"CXX": None}, real=True, allowed=_SERVES),
)


@dataclass
class Report:
    """The results of a campaign."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    skipped: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"start: {self.counts.total()} cases in {self.seconds:.0f} s, seed {self.seed}; "
                f"{len(self.violations)} violations",
                *(f"  {name}" for name in self.counts),
                *(f"  skipped: {words}" for words in self.skipped),
                *self.violations,
            ]
        )


def campaign(count: int, seed: int, seconds: float, real: bool = True) -> Report:
    """Start `count` random cases, or as many as `seconds` allow; without `real`, none with the embedded weights."""
    report = Report(seed)
    cases = [each for each in CASES if real or not each.real]
    began = time.monotonic()
    for case in random.Random(seed).sample(cases, min(count, len(cases))):
        if time.monotonic() - began > seconds:
            report.skipped.append(f"{case.name}: the time is over")
        elif (reason := missing_for(case)) is not None:
            report.skipped.append(f"{case.name}: {reason}")
        else:
            ended, found = _run(case)
            report.counts[f"{case.name}: {ended}"] += 1
            report.violations += found
    for name, check in (("256 MiB less memory than it needs", _less_memory), ("the clock set back", _clock)):
        if real or check is _clock:
            words, broken = check()
            (report.skipped.append(words) if broken is None else report.counts.update([f"{name}: {words}"]))
            report.violations += [f"{name}: {each}" for each in broken or []]
    report.seconds = time.monotonic() - began
    return report


def missing_for(case: Case) -> str | None:
    """Return the reason why this machine cannot run the case, None if it can."""
    if case.unshare and (
        os.geteuid() != 0 or subprocess.run(["unshare", case.unshare, "true"], check=False).returncode
    ):
        return "only root can create namespaces here"
    if "ip link" in case.script and shutil.which("ip") is None:
        return "the command ip is not installed"
    return None


def _run(case: Case) -> tuple[str, list[str]]:
    """Run a case. Returns how it ended, and the violations."""
    # Not in /tmp, which a case may mount over.
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        words = [each.replace("FOLDER", folder) for each in case.flags]
        script = f'set -e\n{case.script.replace("FOLDER", folder)}\nexec "$@"\n'
        program = ["-m", "server"] if case.real else ["tests/support/steady_server.py"]
        command = ["sh", "-c", script, "sh", sys.executable, *program, "--listen", "127.0.0.1:0", *words]
        if case.unshare:
            command = ["unshare", case.unshare, *command]
        environment = _environment()
        for name, value in case.variables.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value.replace("FOLDER", folder)
        found, code = outcome(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
            )
        )
        if case.allowed and code not in case.allowed:
            found.append(f"exit code {code}, not one of {sorted(case.allowed)}")
        if left := os.listdir(folder):
            found.append(f"left {left}")
    repeat = f'\n  python -m soak start --case "{case.name}"'
    return f"served, then {code}" if code == 0 else f"exit code {code}", [f"{case.name}: {w}{repeat}" for w in found]


def _environment() -> dict[str, str]:
    """Return the environment without variables that the server reads, torch sets, or that start coverage in it."""
    others = ("T2I_", "TORCHINDUCTOR_", "COVERAGE_", "COV_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def _less_memory() -> tuple[str, list[str] | None]:
    """Run the real server in an address space that is 256 MiB too small."""
    needed = _peak()
    found, code = outcome(_limited(needed - 256 * _MIB))
    return f"needs {needed // _MIB} MiB of addresses; exit code {code}", found


def _peak() -> int:
    process = _limited(None)
    assert process.stderr is not None
    peak = 0
    for line in process.stderr:
        if "lifecycle: serving" in line:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = int(status.partition("VmPeak:")[2].split()[0]) * 1024
            process.terminate()
    process.wait()
    return peak


def _limited(size: int | None) -> "subprocess.Popen[str]":
    limit = "unlimited" if size is None else str(size // 1024)
    environment = _environment()
    return subprocess.Popen(
        ["sh", "-c", f'ulimit -v {limit}; exec "$@"', "sh", sys.executable, "-m", "server", "--listen", "127.0.0.1:0"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _clock() -> tuple[str, list[str] | None]:
    """Set the wall clock of a server back an hour, and then forward two, while it has jobs with deadlines."""
    if not _FAKETIME.exists():
        return "the clock set back: libfaketime is not installed (Debian's faketime)", None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        clock.write_text("+0")
        server = ServerProcess(
            program=("tests/support/steady_server.py",),
            cold=True,
            STEADY_SECONDS="0.2",
            LD_PRELOAD=str(_FAKETIME),
            FAKETIME_TIMESTAMP_FILE=str(clock),
            FAKETIME_NO_CACHE="1",
            FAKETIME_DONT_FAKE_MONOTONIC="1",
            DONT_FAKE_MONOTONIC="1",
        ).wait_until_ready()
        try:
            with grpc.insecure_channel(server.target) as channel:
                stub = pb_grpc.TextToImageServiceStub(channel)
                for shift in ("-1h", "+1h"):
                    name = f"detached-{shift.strip('+-')}-{'back' if shift[0] == '-' else 'forward'}"
                    detached = request(request_id=name, on_disconnect="ON_DISCONNECT_DETACH")
                    stream = stub.StreamGenerate(detached, timeout=PATIENCE)
                    next(stream)
                    clock.write_text(shift)
                    stream.cancel()
                    events = list(stub.Attach(pb.AttachRequest(request_id=detached.request_id), timeout=PATIENCE))
                    if not events or not events[-1].HasField("done"):
                        found.append(f"a detached job was lost at {shift}")
                    stub.Generate(request(), timeout=PATIENCE)
                    began = time.monotonic()
                    late = stub.Generate.future(request(sampling={"steps": 150}), timeout=2)
                    if late.code().name not in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"):
                        found.append(f"a deadline of 2 s ended with {late.code().name} at {shift}")
                    if time.monotonic() - began > PATIENCE:
                        found.append(f"a deadline of 2 s was missed at {shift}")
        except grpc.RpcError as error:
            found.append(f"{error.code().name}: {error.details()}")
        finally:
            code = server.stop()
    stamps = [line[:19] for line in server.lines]
    if stamps == sorted(stamps):
        found.append("the clock was not set back")
    if code != 0 or "Traceback" in server.log:
        found.append(f"exit code {code}:\n" + "\n".join(server.lines[-20:]))
    return "jobs and deadlines were not affected", found


def repeat(name: str) -> list[str]:
    """Run one case and return its violations."""
    return [words for case in CASES if case.name == name for words in _run(case)[1]]
