"""The first steps of the process, before the imports that take seconds: signals, garbage collection, shared libraries.

Import nothing here that is not in the standard library.
"""

import contextlib
import ctypes
import gc
import importlib.util
import os
import signal
import threading
from pathlib import Path


def exit_on_signals() -> None:
    """Exit at once with code 0 on SIGTERM and SIGINT until lifecycle.py handles signals, and ignore SIGHUP.

    Python's own handlers print a traceback or exit with the code of a killed process.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # set by nohup
        signal.signal(signal.SIGHUP, lambda *_: None)


def pause_garbage_collection() -> None:
    """Collect no garbage until `resume_garbage_collection`.

    Imports allocate millions of objects that live as long as the process; collections take a fifth of their time.
    """
    gc.disable()


def resume_garbage_collection() -> None:
    """Collect garbage again, if that was paused, but never examine the objects that exist by now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def preload_torch() -> None:
    """Load torch's shared libraries in a thread that does not hold the GIL, so that `import torch` finds them loaded.

    That is the same dlopen that the import does. If it fails, the import says why.
    """
    with contextlib.suppress(OSError, AttributeError, ImportError):
        spec = importlib.util.find_spec("torch")
        folder = spec and spec.origin and Path(spec.origin).parent
        library = folder and folder / "lib" / "libtorch_python.so"  # on Linux; the import alone does it elsewhere
        if library and library.is_file():
            dlopen = ctypes.CDLL(None).dlopen
            threading.Thread(
                target=dlopen, args=(os.fsencode(library), os.RTLD_NOW), name="preload torch", daemon=True
            ).start()
