"""Bad input by the thousand: flags, messages, machines and signals that a server must survive. See docs/soak.md.

Run: make soak, or one part: python -m soak messages --count 1000 --seed 7. Each part prints its seed and its counts,
and for every violation what repeats it alone; the command ends with 1 if there is any.
"""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent.parent / "tests" / "support")
)  # serving.py, which the tests have their servers from
