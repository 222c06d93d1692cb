"""The server's log on stderr: text for people or one JSON object a line, with the identifiers of the call.

stderr_lines.py turns what libraries write to stderr themselves into JSON.
"""

import json
import logging
import sys
import threading
import time
from typing import TextIO

import grpc

from server.observability.call_context import log_fields

log = logging.getLogger(__name__)


def log_to_stderr(level: str, form: str, stream: TextIO | None = None) -> None:
    """Log from `level` on in the form "text" or "json" to `stream`, by default stderr; include uncaught exceptions."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_JsonFormatter() if form == "json" else _TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(form == "json")  # Python would write them to stderr as text
    sys.excepthook = lambda *error: log.critical("unexpected error", exc_info=error)
    threading.excepthook = _log_uncaught_in_thread
    sys.unraisablehook = _log_unraisable
    logging.getLogger("grpc._cython.cygrpc").addFilter(_has_caller)


def _has_caller(record: logging.LogRecord) -> bool:
    """Drop gRPC's traceback of a call whose caller disconnected just before the response."""
    return not (record.exc_info and isinstance(record.exc_info[1], grpc.aio.InternalError))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread else "(already gone)"
    error = args.exc_value or args.exc_type()
    log.critical("unexpected error in the thread %s", name, exc_info=error)


def _log_unraisable(args: "sys.UnraisableHookArgs") -> None:
    message = args.err_msg or "an exception that cannot be raised"
    log.error("%s: %r", message, args.object, exc_info=args.exc_value or True)


class _TextFormatter(logging.Formatter):
    """One line, with the identifiers of the call at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        line = super().formatMessage(record)
        fields = " ".join(f"{key}={value}" for key, value in log_fields().items())
        return f"{line} [{fields}]" if fields else line


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **log_fields(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)
