"""Run the server: flags to settings to a server, and each of its ends to an exit code (server/errors.py)."""

# Signals come first, since the imports take a second or two.

from server import before_imports

if __name__ == "__main__":
    before_imports.exit_on_signals()
    before_imports.pause_garbage_collection()
    before_imports.preload_torch()

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
from server.settings import Settings, read, unknown_variables

log = logging.getLogger("server")


def main() -> int:
    """Run the server and return its exit code."""
    try:
        settings = read(sys.argv[1:])
    except InvalidSettings as error:
        for problem in error.problems:
            print(f"python -m server: {problem}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    captured = _start_log(settings)
    if unknown := unknown_variables():
        log.warning("unknown variables are ignored: %s", ", ".join(unknown))
    code, device_is_busy = asyncio.run(_serve(settings))
    if device_is_busy:
        # Python cannot exit while another thread is inside the device's library, for example while it loads or compiles
        # a large model.
        log.warning("the model is still busy; exiting without waiting for it")
        logging.shutdown()
        if captured is not None:
            captured.close()
        os._exit(code)
    return code


def _start_log(settings: Settings) -> CapturedStderr | None:
    """Set up the log. With the JSON format, lines that libraries write to stderr become JSON too."""
    captured = failure = None
    if settings.log_format == "json" and sys.stderr is not None:  # else descriptor 2 may be anything
        try:
            captured = CapturedStderr(settings.log_level)
        except OSError as error:
            failure = error
    log_to_stderr(settings.log_level, settings.log_format, None if captured is None else captured.stream)
    if failure is not None:
        log.warning("lines of libraries on stderr stay text: %s", failure)
    if sys.stderr is not None:
        faulthandler.enable()  # if Python crashes, stderr has the stack of each thread
    return captured


async def _serve(settings: Settings) -> tuple[int, bool]:
    """Return the exit code and whether the model is still busy."""
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
