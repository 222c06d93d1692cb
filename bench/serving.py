"""Start a server for a benchmark, and the channel options that reach it."""

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from text_to_image_client.launcher import ChildServer, local_server, run_server

LOCAL = [("grpc.enable_http_proxy", 0)]  # a proxy has another loopback
UNLIMITED = [*LOCAL, ("grpc.max_receive_message_length", -1)]
_READY_SECONDS = 900.0  # compiling takes minutes


@contextmanager
def served(*flags: str) -> Iterator[tuple[str, ChildServer]]:
    """Start a server with `flags`, yield its address and its process once it is ready, and stop it on leaving.

    SIGTERM to the benchmark stops it, too, unless the signal arrives while a library waits in native code.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        server = local_server(Path(folder), gpu=False)
        command = (*server.command, "--log-level", "warning", *flags)
        with run_server(replace(server, command=command), Path(folder)) as process:
            yield process.wait_until_serving(_READY_SECONDS), process
