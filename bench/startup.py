"""Measure how long a server on the embedded weights takes to become SERVING, next to the imports that it needs.

Each round times two new processes in turn: one that only imports torch and diffusers' pipeline, and a server, from its
start until its ready file names the port, which it does once its health is SERVING. The ratio of the medians is the
cost of serving beyond the imports.

Run: make bench-startup
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = "import torch; from diffusers import StableDiffusionXLPipeline"
_POLL_SECONDS = 0.005


def main() -> None:
    """Print a table with the seconds of each round, their medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="(default: 7, after one that is not counted)")
    parser.add_argument("flags", nargs="*", help="of the server, after --")
    options = parser.parse_args()

    print("| round | imports, s | SERVING, s | ratio |\n| --- | --- | --- | --- |")
    imports, serving = [], []
    for number in range(options.rounds + 1):
        pair = import_seconds(), serving_seconds(options.flags)
        if number:  # the first fills the page cache
            imports.append(pair[0])
            serving.append(pair[1])
            print(row(str(number), *pair), flush=True)
    print(row("median", statistics.median(imports), statistics.median(serving)))


def import_seconds() -> float:
    """Time a process that imports what a server needs, from its start to its end."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def serving_seconds(flags: list[str]) -> float:
    """Time a server from its start until it is SERVING, then stop it."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder, "ready")
        command = [sys.executable, "-m", "server", "--listen", "127.0.0.1:0", "--ready-file", str(ready), *flags]
        began = time.perf_counter()
        with (Path(folder) / "log").open("w+") as log, subprocess.Popen(command, stderr=log) as server:
            try:
                while not ready.exists():
                    if server.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"the server ended with {server.returncode}:\n{log.read()}")
                    time.sleep(_POLL_SECONDS)
                return time.perf_counter() - began
            finally:
                server.terminate()


def row(name: str, imports: float, serving: float) -> str:
    """Format a row of the table."""
    return f"| {name} | {imports:.2f} | {serving:.2f} | {serving / imports:.2f} |"


if __name__ == "__main__":
    main()
