"""A service of a bench's own."""

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from text_to_image_client._service import Service, local_launch, running

LOCAL = [("grpc.enable_http_proxy", 0)]  # a proxy has another loopback
UNLIMITED = [*LOCAL, ("grpc.max_receive_message_length", -1)]
_READY_SECONDS = 900.0  # what is compiled takes minutes


@contextmanager
def served(*flags: str) -> Iterator[tuple[str, Service]]:
    """The address of a service with these flags, once it is ready, and the service, which ends with this.

    So it does when the bench is ended by SIGTERM, unless that is inside a library's own waiting.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        launch = local_launch(Path(folder), gpu=False)
        command = (*launch.command, "--log-level", "warning", *flags)
        with running(replace(launch, command=command), Path(folder)) as service:
            yield service.wait_until_serving(_READY_SECONDS), service
