"""Start-up without what is usually there: folders, memory, files, a passwd entry, IPv6; and a clock that is set back.

Each case is the real server in a machine that lacks one thing. It must serve, or end with a documented exit code and
one sentence; never with a traceback, and it leaves nothing behind. Most cases take the small model of
tests/support/steady_server.py; those of folders take the embedded weights, for which kernels are built.
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

# Inside a mount namespace of its own, which ends with the process.
_ALL_READ_ONLY = """
cut -d ' ' -f 2 /proc/mounts | grep -v '^/proc\\|^/sys\\|^/dev$' | while read -r at; do
    mount -o remount,bind,ro "$at" 2> /dev/null || true
done
"""
_FULL = "mount -t tmpfs -o size=64k none {0} && {{ head -c 1M /dev/zero > {0}/full || true; }} 2> /dev/null"


@dataclass(frozen=True)
class Case:
    """What is missing. `script` is run by a shell, as root in namespaces `unshare`, before the server in its place.

    FOLDER in the script and in the variables is a folder of the case's own. A variable of None is taken away.
    """

    name: str
    script: str = ""
    unshare: str = ""
    variables: Mapping[str, str | None] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    real: bool = False
    must: frozenset[int] = frozenset()
    """Exit codes of which it must be one; empty: it may serve or end, as documented."""


_SERVES = frozenset({0})

CASES = (
    Case("no HOME", variables={"HOME": None}, real=True, must=_SERVES),
    Case("HOME that is not there", variables={"HOME": "/nowhere/home"}, real=True, must=_SERVES),
    Case("TMPDIR that is not there", variables={"TMPDIR": "/nowhere/tmp"}, real=True, must=_SERVES),
    Case(
        "TMPDIR that is read-only", "mount -t tmpfs -o ro none FOLDER", "--mount",
        {"TMPDIR": "FOLDER"}, real=True, must=_SERVES,
    ),
    Case(
        "TMPDIR on noexec", "mount -t tmpfs -o noexec none FOLDER", "--mount",
        {"TMPDIR": "FOLDER"}, real=True, must=_SERVES,
    ),
    Case("TMPDIR that is full", _FULL.format("FOLDER"), "--mount", {"TMPDIR": "FOLDER"}, real=True, must=_SERVES),
    Case("/tmp that is full", _FULL.format("/tmp"), "--mount", {"TMPDIR": None}, real=True, must=_SERVES),
    Case(
        "--compile blocks, TMPDIR on noexec", "mount -t tmpfs -o noexec none FOLDER", "--mount",
        {"TMPDIR": "FOLDER"}, ("--compile", "blocks"), real=True,
    ),
    Case(
        "--compile-cache that is read-only", "mount -t tmpfs -o ro none FOLDER", "--mount",
        flags=("--compile", "blocks", "--compile-cache", "FOLDER"), real=True,
    ),
    Case(
        "--compile-cache that is full", _FULL.format("FOLDER"), "--mount",
        flags=("--compile", "blocks", "--compile-cache", "FOLDER"), real=True,
    ),
    Case("no folder to write to", _ALL_READ_ONLY, "--mount", {"TMPDIR": None}, real=True, must=_SERVES),
    Case(
        "a user without a passwd entry", "mount --bind /dev/null /etc/passwd", "--mount",
        {"HOME": None, "USER": None, "LOGNAME": None}, real=True, must=_SERVES,
    ),
    Case("--ready-file on a full disk", _FULL.format("FOLDER"), "--mount",
         flags=("--ready-file", "FOLDER/ready"), must=frozenset({4})),
    Case("--listen on a read-only folder", "mount -t tmpfs -o ro none FOLDER", "--mount",
         flags=("--listen", "unix:FOLDER/socket"), must=frozenset({3})),
    Case("no IPv6, localhost", "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", "--net",
         flags=("--listen", "localhost:0", "--metrics-listen", "localhost:0"), must=_SERVES),
    Case("no IPv6, every address", "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", "--net",
         flags=("--listen", "[::]:0"), must=frozenset({0, 3})),
    Case("no IPv6, IPv6 asked for", "ip link set lo up; echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6", "--net",
         flags=("--listen", "[::1]:0"), must=frozenset({3})),
    Case("no network at all", "", "--net", flags=("--listen", "127.0.0.1:0"), must=frozenset({0, 3})),
    Case("64 files", "ulimit -n 64", must=_SERVES),
    Case("64 files, the real model", "ulimit -n 64", real=True),
    Case("16 files", "ulimit -n 16"),
    Case("stdin and stdout closed", "exec < /dev/null > /dev/full", must=_SERVES),
    Case("a locale that is not there", variables={"LC_ALL": "nowhere.UTF-9", "LANG": "x"}, must=_SERVES),
    Case("ASCII alone", variables={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, must=_SERVES),
    Case("no PATH", "PATH=", variables={"CXX": None}, real=True, must=_SERVES),
)  # fmt: skip


@dataclass
class Report:
    """What a campaign has found."""

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
    """Start `count` cases by chance, or those that `seconds` allow; without `real` none with the embedded weights."""
    report = Report(seed)
    cases = [each for each in CASES if real or not each.real]
    began = time.monotonic()
    for case in random.Random(seed).sample(cases, min(count, len(cases))):
        if time.monotonic() - began > seconds:
            report.skipped.append(f"{case.name}, since the time was over")
        elif (reason := why_not(case)) is not None:
            report.skipped.append(f"{case.name}, since {reason}")
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


def why_not(case: Case) -> str | None:
    """What this machine lacks for the case."""
    if case.unshare and (
        os.geteuid() != 0 or subprocess.run(["unshare", case.unshare, "true"], check=False).returncode
    ):
        return "only root can have namespaces here"
    if "ip link" in case.script and shutil.which("ip") is None:
        return "there is no command ip"
    return None


def _run(case: Case) -> tuple[str, list[str]]:
    """How a case ended, and what is wrong with that."""
    # Not in /tmp, which the case may hide.
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
        found, code = outcome(subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, errors="backslashreplace",
        ))  # fmt: skip
        if case.must and code not in case.must:
            found.append(f"exit code {code}, not one of {sorted(case.must)}")
        if left := os.listdir(folder):
            found.append(f"left {left}")
    repeat = f'\n  python -m soak start --case "{case.name}"'
    return f"served, then {code}" if code == 0 else f"exit code {code}", [f"{case.name}: {w}{repeat}" for w in found]


def _environment() -> dict[str, str]:
    """That of this process without what the server reads, and without the folder that torch names once imported.

    Without coverage too, which writes a file of its own at the end.
    """
    others = ("T2I_", "TORCHINDUCTOR_", "COVERAGE_", "COV_")
    return {name: value for name, value in os.environ.items() if not name.startswith(others)}


def _less_memory() -> tuple[str, list[str] | None]:
    """The real server in an address space that is 256 MiB too small."""
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
        cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _clock() -> tuple[str, list[str] | None]:
    """The wall clock of a server is set back an hour, and then forward two, while it has jobs with deadlines."""
    if not _FAKETIME.exists():
        return "the clock set back, since libfaketime is not installed (Debian's faketime)", None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        clock.write_text("+0")
        server = ServerProcess(
            program=("tests/support/steady_server.py",), cold=True, STEADY_SECONDS="0.2", LD_PRELOAD=str(_FAKETIME),
            FAKETIME_TIMESTAMP_FILE=str(clock), FAKETIME_NO_CACHE="1", FAKETIME_DONT_FAKE_MONOTONIC="1",
            DONT_FAKE_MONOTONIC="1",
        ).wait_until_ready()  # fmt: skip
        try:
            with grpc.insecure_channel(server.target) as channel:
                stub = pb_grpc.TextToImageServiceStub(channel)
                for shift in ("-1h", "+1h"):
                    name = f"kept-{shift.strip('+-')}-{'back' if shift[0] == '-' else 'forward'}"
                    detached = request(request_id=name, on_disconnect="ON_DISCONNECT_DETACH")
                    kept = stub.StreamGenerate(detached, timeout=PATIENCE)
                    next(kept)
                    clock.write_text(shift)
                    kept.cancel()
                    events = list(stub.Attach(pb.AttachRequest(request_id=detached.request_id), timeout=PATIENCE))
                    if not events or not events[-1].HasField("done"):
                        found.append(f"a detached job was lost at {shift}")
                    stub.Generate(request(), timeout=PATIENCE)
                    began = time.monotonic()
                    late = stub.Generate.future(request(sampling={"steps": 150}), timeout=2)
                    if late.code().name not in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"):
                        found.append(f"a deadline of 2 s ended with {late.code().name} at {shift}")
                    if time.monotonic() - began > PATIENCE:
                        found.append(f"a deadline of 2 s was not kept at {shift}")
        except grpc.RpcError as error:
            found.append(f"{error.code().name}: {error.details()}")
        finally:
            code = server.stop()
    stamps = [line[:19] for line in server.lines]
    if stamps == sorted(stamps):
        found.append("the clock was not set back at all")
    if code != 0 or "Traceback" in server.log:
        found.append(f"exit code {code}:\n" + "\n".join(server.lines[-20:]))
    return "jobs and deadlines went on", found


def repeat(name: str) -> list[str]:
    """Run one case alone."""
    return [words for case in CASES if case.name == name for words in _run(case)[1]]
