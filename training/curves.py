"""Plot the losses of the experts from training logs.

Run: python -m training.curves LOG... PNG
"""

import re
import sys
from pathlib import Path

from bench import plotting

_LINE = re.compile(r"(base|refiner): +\d+ %, step (\d+), loss ([\d.]+)")
_SETTLED = 300  # steps; earlier losses are means of too few values


def main(logs: list[Path], into: Path) -> None:
    lines = [match.groups() for log in logs for match in _LINE.finditer(log.read_text(errors="replace"))]
    figure, panels = plotting.panels(2, width=8, height=2.8)
    for axes, expert in zip(panels, ("base", "refiner"), strict=True):
        curve = [(int(step), float(loss)) for name, step, loss in lines if name == expert and int(step) > _SETTLED]
        axes.plot(*zip(*curve, strict=True), marker=".", markersize=4, color=plotting.BLUE)
        plotting.style(axes, expert, "steps", "loss, min-SNR weighted")
    plotting.save(figure, into)


if __name__ == "__main__":
    *logs, into = map(Path, sys.argv[1:])
    main(logs, into)
