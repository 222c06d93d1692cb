"""Real server processes, requests, and channels."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import forking
import grpc
import no_torch
from google.protobuf import json_format

from text_to_image_client.v1 import text_to_image_pb2 as pb

ROOT = Path(__file__).parents[2]
PATIENCE = 180  # seconds to wait for an event; reached only when something is broken
SERVICE = "text_to_image.v1.TextToImageService"

# As long as the limits allow, so that a test can act while it runs: 8 images of 150 steps and as many decodes.
LONG_JOB = {"parameter": {"n": 8}, "sampling": {"steps": 150}}

# Options of a channel that retries every method as the Python client does by default.
RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}
RETRIES = [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": RETRY_POLICY}]}))]


def request(prompt: str = "a cat", **fields: object) -> pb.GenerateRequest:
    return json_format.ParseDict({"data": {"prompt": prompt}, **fields}, pb.GenerateRequest())


def connect(server: "ServerProcess", *options: tuple[str, int]) -> grpc.Channel:
    """Open a channel with its own connection."""
    return grpc.insecure_channel(
        server.target, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), *options]
    )


def digests(choices: list[pb.Choice]) -> list[str]:
    return [hashlib.sha256(choice.raw or choice.image.encode()).hexdigest() for choice in choices]


def first_step(stream: Iterable[pb.StreamGenerateResponse]) -> pb.Progress:
    """Read until the first step of the base; the job is then on the device."""
    return next(
        event.progress for event in stream if event.HasField("progress") and event.progress.stage == pb.STAGE_BASE
    )


class Logged:
    """A process whose log is read line by line, from its stream `output`."""

    patience = PATIENCE

    def __init__(self, process: "subprocess.Popen[str] | forking.ForkedProcess", output: IO[str] | None) -> None:
        assert output is not None
        self.process = process
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._closed = False
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for_log(self, pattern: str, after: int = 0) -> re.Match[str]:
        """Wait until the lines after the first `after` match the pattern."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or re.search(pattern, "\n".join(self.lines[after:])), self.patience
            )
            log = "\n".join(self.lines[after:])
            found = re.search(pattern, log)
            assert found, f"{pattern!r} was not logged in:\n{log}"
            return found


class ServerProcess(Logged):
    """`python -m server`, or another program around it, on a free port of this machine, its log line by line.

    It is forked from a process that has imported torch, unless `cold` is set, `cwd` is another folder, or a variable of
    its environment affects imports.
    """

    def __init__(
        self,
        *flags: str,
        program: Sequence[str] = ("-m", "server"),
        cold: bool = False,
        cwd: Path = ROOT,
        **environment: str,
    ) -> None:
        no_torch.skip_server()
        arguments = [*program, "--listen", "127.0.0.1:0", *flags]
        whole = os.environ | environment
        process: forking.ForkedProcess | subprocess.Popen[str]
        if not cold and cwd == ROOT and forking.suits(whole):
            process = forking.start(arguments, whole, ROOT)
        else:
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=cwd, env=whole, stderr=subprocess.PIPE, text=True
            )
        super().__init__(process, process.stderr)

    @property
    def target(self) -> str:
        """Wait until the port is open; HOST:PORT."""
        return self.wait_for_log(r"listening on (\S+);")[1]

    def wait_until_ready(self) -> "ServerProcess":
        self.wait_for_log(r'lifecycle(: |", "message": ")serving ')  # as text or as JSON
        return self

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Wait for the end of the process; return its exit code."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def stop(self) -> int:
        if self.process.poll() is None:
            self.terminate()
        return self.wait()
