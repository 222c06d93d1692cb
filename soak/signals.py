"""Send SIGKILL, SIGSTOP, SIGHUP, SIGINT and SIGTERM to a server at random moments, under load.

Servers run one after another at the same port, with the same ready file and unix socket. Each gets some signals that
it must survive, and then one that ends it, in one of seven rounds before it serves. A second server gets no signals; it
takes the calls of clients with two addresses. Both are the real server with the model of
tests/support/steady_server.py.

- Every call ends with OK, or UNAVAILABLE if its server was ended, and long before the caller's deadline.
- A call that was admitted before SIGINT or SIGTERM gets its images. SIGHUP and SIGSTOP fail no call.
- A call that may go to either server gets its image.
- A server ends with the documented code and leaves no file. Files of a killed server do not disturb the next one.
"""

import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from serving import PATIENCE, ServerProcess, request

from text_to_image_client import TextToImage, TextToImageError
from text_to_image_client.v1 import text_to_image_pb2 as pb
from text_to_image_client.v1 import text_to_image_pb2_grpc as pb_grpc

_CALL_SECONDS = "0.01"  # of a model call
_DEADLINE = 60.0  # seconds; a job takes 0.1
_DEVICE_SECONDS = 4
_CALLERS = 6
_STARTING = 1 / 7  # share of the rounds in which the signal comes before the server serves
_START_SECONDS = 1.5  # the longest delay of that signal

SURVIVED_SIGNALS = ("SIGSTOP", "SIGHUP")
ENDING_SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")


@dataclass
class Outcome:
    """The end of one call. Times are monotonic; `admitted` is the time of the server's first response."""

    kind: str
    code: str
    message: str
    admitted: float | None
    ended: float


@dataclass
class Report:
    """The results of a campaign."""

    seed: int
    signals: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)  # by kind and status
    servers: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"signals: {self.signals.total()} to {self.servers} servers in {self.seconds:.0f} s, seed {self.seed}; "
                f"{self.calls.total()} calls; {len(self.violations)} violations",
                *(f"  {count} {name}" for name, count in sorted((self.signals + self.calls).items())),
                *self.violations,
            ]
        )


def campaign(count: int, seed: int, seconds: float) -> Report:
    """Send `count` signals, or as many as `seconds` allow. The rounds have the seeds `seed`, `seed + 1` and so on."""
    report = Report(seed)
    began = time.monotonic()
    other = ServerProcess(
        program=("tests/support/steady_server.py",), cold=True, STEADY_SECONDS=_CALL_SECONDS
    ).wait_until_ready()
    try:
        with tempfile.TemporaryDirectory() as folder, TextToImage(other.target) as client:
            expected = client.generate("a cat", seed=7, steps=4).images[0].data
            place = Place(Path(folder), _free_port(), other.target, expected)
            while report.signals.total() < count and time.monotonic() - began < seconds:
                found = _round(place, seed + report.servers, report, count - report.signals.total())
                report.servers += 1
                report.violations += found
                if found:
                    break
    finally:
        other.stop()
    report.seconds = time.monotonic() - began
    return report


@dataclass(frozen=True)
class Place:
    """The folder and the port of the servers, the address of the second server, and the expected image."""

    folder: Path
    port: int
    other: str
    expected: bytes

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> ServerProcess:
        """Start the next server."""
        for name in ("temporary", "home"):
            (self.folder / name).mkdir(exist_ok=True)
        return ServerProcess(
            "--listen",
            f"{self.target},unix:{self.folder}/socket",
            "--ready-file",
            f"{self.folder}/ready",
            "--device-timeout-seconds",
            f"{_DEVICE_SECONDS}",
            program=("tests/support/steady_server.py",),
            cold=True,
            STEADY_SECONDS=_CALL_SECONDS,
            TMPDIR=f"{self.folder}/temporary",
            HOME=f"{self.folder}/home",
        )

    def files(self) -> list[str]:
        """Return the files that servers left."""
        return sorted(str(each.relative_to(self.folder)) for each in self.folder.rglob("*") if not each.is_dir())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _round(place: Place, seed: int, report: Report, most: int) -> list[str]:
    """Start a server, send it signals, and end it. Returns the violations."""
    choose = random.Random(seed)
    server = place.start()
    ending = choose.choice(ENDING_SIGNALS)
    sent: list[str] = []
    calls: list[Outcome] = []
    violations: list[str] = []
    try:
        if choose.random() < _STARTING:
            _wait_for_handlers(server.process.pid)
            time.sleep(choose.uniform(0, _START_SECONDS))
            ended_at = time.monotonic()
            _send(server, ending, sent)
        else:
            server.wait_until_ready()
            if (place.folder / "ready").read_text() != server.target.replace(",", "\n") + "\n":
                violations.append(f"the ready file has {(place.folder / 'ready').read_text()!r}")
            callers = [Caller(place, seed, number) for number in range(_CALLERS)]
            for each in callers:
                each.start()
            for _ in range(min(choose.randrange(4), most - 1)):
                time.sleep(choose.uniform(0, 0.5))
                _send_survived(server, choose, sent)
            time.sleep(choose.uniform(0, 0.5))
            stop_first = choose.random() < 0.1
            ended_at = time.monotonic()
            if stop_first:
                _send(server, "SIGSTOP", sent)
            _send(server, ending, sent)
            if stop_first and ending != "SIGKILL":
                time.sleep(choose.uniform(0, 0.5))
                server.process.send_signal(signal.SIGCONT)
            for each in callers:
                each.leave()
            for each in callers:
                each.join(_DEADLINE + PATIENCE)
                if each.is_alive():
                    violations.append(f"a call of {each.kind} never ended")
                calls += each.outcomes
        code = server.wait()
    finally:
        server.process.kill()
    report.signals.update(sent)
    report.calls.update(f"{each.kind}: {each.code}" for each in calls)
    if code != (expected := -signal.SIGKILL if ending == "SIGKILL" else 0):
        violations.append(f"exit code {code}, not {expected}")
    # A server that ends before it has read its flags cannot remove the files of a killed one.
    if ending != "SIGKILL" and "listening on" in server.log and (left := place.files()):
        violations.append(f"files are left: {left}")
    violations += [f"in the log: {line}" for line in server.lines if "Traceback" in line or " ERROR " in line]
    violations += [found for each in calls if (found := _violation(each, ended_at, ending))]
    if not violations:
        return []
    log = "\n".join(server.lines[-40:])
    command = f"python -m soak signals --count {max(1, len(sent))} --seed {seed}"
    return [f"{', '.join(sent)}: " + "; ".join(violations) + f"\n  {command}\n{log}"]


def _wait_for_handlers(pid: int) -> None:
    """Wait until the process handles SIGTERM; before that, the interpreter is starting."""
    mask = 1 << (signal.SIGTERM - 1)
    while not int(Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0], 16) & mask:
        time.sleep(0.001)


def _send(server: ServerProcess, name: str, sent: list[str]) -> None:
    server.process.send_signal(signal.Signals[name])
    sent.append(name)


def _send_survived(server: ServerProcess, choose: random.Random, sent: list[str]) -> None:
    """Send a signal that the server must survive."""
    name = choose.choice(SURVIVED_SIGNALS)
    _send(server, name, sent)
    if name == "SIGSTOP":
        long = choose.random() < 0.05  # longer than --device-timeout-seconds
        time.sleep(_DEVICE_SECONDS + 1 if long else choose.uniform(0, 0.5))
        server.process.send_signal(signal.SIGCONT)


def _violation(call: Outcome, ended_at: float, ending: str) -> str | None:
    """Return the violation of a call, None if it has none."""
    if call.code == "OK":
        return None
    description = f"{call.kind}, admitted {'yes' if call.admitted else 'no'}: {call.code} {call.message}"
    if call.kind == "either server":
        return description
    if call.ended < ended_at:
        return f"before the end, {description}"
    if call.code != "UNAVAILABLE":
        return description
    if ending != "SIGKILL" and call.admitted is not None and call.admitted < ended_at:
        return f"{ended_at - call.admitted:.3f} s after its admission, {description}"
    return None


class Caller(threading.Thread):
    """Make calls until `leave`, and at least one."""

    def __init__(self, place: Place, seed: int, number: int) -> None:
        super().__init__(daemon=True)
        self.kind = ""
        self.outcomes: list[Outcome] = []
        self._place = place
        self._name = f"round-{seed}-caller-{number}"
        self._choose = random.Random(f"{seed} {number}")
        self._leaving = threading.Event()

    def leave(self) -> None:
        """End after the current call."""
        self._leaving.set()

    def run(self) -> None:
        address = self._place.target if self._choose.random() < 0.7 else f"unix:{self._place.folder}/socket"
        both = f"ipv4:{self._place.target},{self._place.other}"
        with (
            grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
            TextToImage(both, round_robin=True, timeout=_DEADLINE) as client,
        ):
            stub = pb_grpc.TextToImageServiceStub(channel)
            kinds = {
                "unary": lambda: self._unary(stub),
                "stream": lambda: self._stream(stub, request("a cat", parameter={"seed": 7})),
                "detached": lambda: self._detached(stub),
                "either server": lambda: self._either(client),
            }
            while not self._leaving.is_set():
                self.kind = self._choose.choice(list(kinds))
                kinds[self.kind]()

    def _unary(self, stub: pb_grpc.TextToImageServiceStub) -> None:
        call = stub.Generate.future(request("a cat", parameter={"seed": 7}, output={"raw": True}), timeout=_DEADLINE)
        call.initial_metadata()
        admitted = time.monotonic() if not call.done() else None
        try:
            assert call.result().data.choices[0].raw == self._place.expected
        except grpc.RpcError as error:
            return self._ended(error, admitted)
        return self._ended(None, admitted)

    def _stream(self, stub: pb_grpc.TextToImageServiceStub, message: pb.GenerateRequest | pb.AttachRequest) -> None:
        method = stub.Attach if isinstance(message, pb.AttachRequest) else stub.StreamGenerate
        admitted = event = None
        try:
            for each in method(message, timeout=_DEADLINE):  # type: ignore[arg-type]
                admitted, event = admitted or time.monotonic(), each
            assert event is not None
            assert event.HasField("done")
        except grpc.RpcError as error:
            return self._ended(error, admitted)
        return self._ended(None, admitted)

    def _detached(self, stub: pb_grpc.TextToImageServiceStub) -> None:
        """Start a detached job, leave it, and attach to it."""
        name = f"{self._name}-{len(self.outcomes)}"
        stream = stub.StreamGenerate(
            request("a cat", request_id=name, on_disconnect="ON_DISCONNECT_DETACH"), timeout=_DEADLINE
        )
        try:
            next(stream)
        except grpc.RpcError as error:
            return self._ended(error, None)
        stream.cancel()
        time.sleep(self._choose.uniform(0, 0.1))
        return self._stream(stub, pb.AttachRequest(request_id=name))

    def _either(self, client: TextToImage) -> None:
        try:
            assert client.generate("a cat", seed=7, steps=4).images[0].data == self._place.expected
        except TextToImageError as error:
            self.outcomes.append(Outcome(self.kind, error.code.name, error.message, None, time.monotonic()))
        else:
            self.outcomes.append(Outcome(self.kind, "OK", "", None, time.monotonic()))

    def _ended(self, error: grpc.RpcError | None, admitted: float | None) -> None:
        code, message = ("OK", "") if error is None else (error.code().name, error.details() or "")
        self.outcomes.append(Outcome(self.kind, code, message, admitted, time.monotonic()))
