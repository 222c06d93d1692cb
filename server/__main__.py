"""Run the server: flags to settings to a server, and each of its ends to an exit code (server/errors.py)."""

# Signals come first, since the imports take a second or two.

from server import starting

if __name__ == "__main__":
    starting.exit_on_signals()
    starting.pause_garbage_collection()
    starting.preload_torch()

import asyncio
import faulthandler
import logging
import os
import sys
from functools import partial

from server.errors import InvalidSettings, StartupError
from server.lifecycle import Lifecycle
from server.observability.logs import log_to_stderr
from server.observability.stderr_lines import CapturedStderr
from server.runtime import load
from server.settings import Settings, read

log = logging.getLogger("server")


def main() -> int:
    """Run the server; returns its exit code."""
    try:
        settings = read(sys.argv[1:])
    except InvalidSettings as error:
        for problem in error.problems:
            print(f"python -m server: {problem}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    captured = _start_log(settings)
    code, device_is_busy = asyncio.run(_serve(settings))
    if device_is_busy:
        # Python cannot leave while another thread is inside the device's library, as when a signal comes while a large
        # model is being loaded, or compiled.
        log.warning("the model is still busy; leaving without it")
        logging.shutdown()
        if captured is not None:
            captured.close()
        os._exit(code)
    return code


def _start_log(settings: Settings) -> CapturedStderr | None:
    """Log as the settings say; what libraries write to stderr themselves becomes JSON, too, if that is the format."""
    captured = failure = None
    if settings.log_format == "json" and sys.stderr is not None:  # else descriptor 2 may be anything
        try:
            captured = CapturedStderr(settings.log_level)
        except OSError as error:
            failure = error
    log_to_stderr(settings.log_level, settings.log_format, None if captured is None else captured.stream)
    if failure is not None:
        log.warning("lines of libraries will be in the log as they are: %s", failure)
    if sys.stderr is not None:
        faulthandler.enable()  # where Python itself crashes, stderr has where every thread was
    return captured


async def _serve(settings: Settings) -> tuple[int, bool]:
    """The exit code, and whether the model is still busy."""
    server = None
    code = 0
    try:
        server = Lifecycle(settings, partial(load, settings))
        await server.serve()
    except StartupError as error:
        log.error("%s", error)
        code = error.exit_code
    return code, server is not None and server.device_is_busy


if __name__ == "__main__":
    sys.exit(main())
