"""Plot how the losses of the experts fell, from what training logged. Run: python -m training.curves LOG... PNG"""

import re
import sys
from pathlib import Path

from matplotlib.figure import Figure

_LINE = re.compile(r"(base|refiner): +\d+ %, step (\d+), loss ([\d.]+)")
_SETTLED = 300  # steps: before them the loss is a mean of too few


def main(logs: list[Path], into: Path) -> None:
    told = [match.groups() for log in logs for match in _LINE.finditer(log.read_text(errors="replace"))]
    figure = Figure((8, 2.6), layout="constrained")
    for axes, expert in zip(figure.subplots(1, 2), ("base", "refiner"), strict=True):
        curve = [(int(step), float(loss)) for name, step, loss in told if name == expert and int(step) > _SETTLED]
        axes.plot(*zip(*curve, strict=True), marker=".", markersize=4)
        axes.set(title=expert, xlabel="steps", ylabel="loss, min-SNR weighted")
        axes.grid(alpha=0.3)
    figure.savefig(into, dpi=110)


if __name__ == "__main__":
    *logs, into = map(Path, sys.argv[1:])
    main(logs, into)
