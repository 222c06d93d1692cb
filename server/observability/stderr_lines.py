"""Turn each line that libraries write to stderr into one JSON object, for `--log-format json`.

gRPC's core, OpenMP, CUDA's libraries and a crashing Python write to descriptor 2 without `logging`. A small process of
its own reads them, so that a library's last line before it ends this process is logged too. That process runs this
file, with the standard library alone.
"""

import atexit
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import TextIO

LEVELS = ("debug", "info", "warning", "error")
_LEVEL_OF_LETTER = {"I": "info", "W": "warning", "E": "error", "F": "error"}
_END_SECONDS = 2.0  # for the last lines


class CapturedStderr:
    """Redirects descriptor 2 of this process to another process until `close`. Raises OSError.

    `stream` is the original stderr, for lines that are JSON already. Lines below `level` are dropped; a line without a
    level counts as a warning.
    """

    def __init__(self, level: str) -> None:
        self.stream: TextIO = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        self._reader = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, level], stdin=subprocess.PIPE, stdout=self.stream
        )
        assert self._reader.stdin is not None
        os.dup2(self._reader.stdin.fileno(), 2)
        self._reader.stdin.close()
        atexit.register(self.close)

    def close(self) -> None:
        """Restore descriptor 2, after all that was written to it is out."""
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
        os.dup2(self.stream.fileno(), 2)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a child of this process may still hold it
            self._reader.wait(_END_SECONDS)


def line_of(text: str) -> dict[str, str]:
    """Return the log fields of one line of a library. gRPC's lines begin like Abseil's: a letter, month and day."""
    letter = re.match(r"([IWEF])\d{4} \d\d:\d\d:\d\d", text)
    now = time.time()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z",
        "level": _LEVEL_OF_LETTER[letter[1]] if letter else "warning",
        "logger": "stderr",
        "message": text,
    }


def main() -> None:
    """Copy stdin to stdout, one JSON object a line, until its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the process whose lines these are
        signal.signal(number, signal.SIG_IGN)
    least = LEVELS.index(sys.argv[1])
    for line in sys.stdin.buffer:
        if text := line.decode("utf-8", "backslashreplace").rstrip():
            fields = line_of(text)
            if LEVELS.index(fields["level"]) >= least:
                os.write(1, (json.dumps(fields) + "\n").encode())


if __name__ == "__main__":
    main()
