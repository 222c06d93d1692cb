"""Draw every figure of docs/ in one style: colours, sizes, axes, labels, and small files."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, GREEN, VERMILION, ORANGE = "#0072b2", "#009e73", "#d55e00", "#e69f00"
_DPI = 130
_GAP = 6  # pixels between the pictures of a sheet
_LABEL = 26  # pixels of height for the labels of columns


def panels(count: int, width: float = 10.0, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` x `height` inches with `count` axes in one row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def style(axes: Axes, title: str, x: str = "", y: str = "") -> None:
    """Give axes their title and labels, with a light grid and no frame at the top and on the right."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes) -> None:
    """Put one legend for all panels below them."""
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=10)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG with a palette of 128 colours."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, facecolor="white")
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def sheet(
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]], columns: Sequence[str], side: int, path: Path
) -> None:
    """Write rows of pictures as a PNG, with a label for each row and column.

    `rows` has the label and the pictures of each row, uint8 of shape (height, width, 3); a picture is shown with
    `side` pixels a side.
    """
    font = ImageFont.load_default(15)
    left = 12 + max(int(font.getlength(label)) for label, _ in rows)
    whole = Image.new("RGB", (left + len(columns) * (side + _GAP), _LABEL + len(rows) * (side + _GAP)), "white")
    pen = ImageDraw.Draw(whole)
    for number, heading in enumerate(columns):
        pen.text((left + number * (side + _GAP) + side / 2, _LABEL / 2), heading, "black", font, anchor="mm")
    for number, (label, pictures) in enumerate(rows):
        top = _LABEL + number * (side + _GAP)
        pen.text((left - 8, top + side / 2), label, "black", font, anchor="rm")
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            whole.paste(shown, (left + column * (side + _GAP), top))
    whole.save(path, optimize=True)
