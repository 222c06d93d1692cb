"""Soak tests: thousands of bad flags, messages, machines and signals that a server must survive. See docs/soak.md.

Run all parts with `make soak`, or one with `python -m soak messages --count 1000 --seed 7`. Each part prints its seed
and its counts, and for each violation a command that repeats it. The exit code is 1 if there is a violation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))  # serving.py, which starts servers
