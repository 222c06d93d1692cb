"""What a signal does while the server is being imported, for a second or two, before lifecycle.py takes it.

Python itself would answer with a traceback, or with the exit code of a process that was killed.
"""

import os
import signal


def leave_on_signals() -> None:
    """Let SIGTERM and SIGINT end the process at once with 0, as nothing has begun. SIGHUP has nothing to read yet."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup set
        signal.signal(signal.SIGHUP, lambda *_: None)
