"""How plots look: size, colours, axes.

The colours differ for readers with any common colour blindness: Okabe & Ito 2008 for methods, cividis for ordered
clusters.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

METHOD_COLOURS = {"lead": "#0072B2", "random": "#E69F00", "full": "#009E73"}
OTHER_COLOURS = ("#CC79A7", "#56B4E9", "#D55E00", "#7F5FA8", "#6B6B00", "#444444")
BETTER, WORSE = "#0072B2", "#D55E00"
REFERENCE = METHOD_COLOURS["random"]
GREY = "#8a8a8a"
INK = "#333333"
BEFORE, AFTER = GREY, "#0072B2"
DOTS_PER_INCH = 110
WIDTH = 9.0
"""Inches."""
TOGETHER = 6
"""Most variants that are drawn over each other."""

HOLLOW: dict[str, Any] = {"facecolor": "white", "edgecolor": GREY, "linewidth": 1.4}
"""Dots of the untrained base."""

SETTINGS: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b0b0b0",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Plot:
    """A picture with its words, or a sentence that says why there is none."""

    name: str
    """Of the PNG file, without suffix."""
    title: str
    text: str
    """What the picture shows and how to read it; or why there is none."""
    png: bytes | None = None


def new_figure(
    rows: int = 1, columns: int = 1, *, height: float = 3.4, **options: Any
) -> tuple[Figure, Sequence[Axes]]:
    """A figure as wide as the page and `height` inches high, and its axes row by row. options: of `Figure.subplots`."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def finish(name: str, title: str, text: str, figure: Figure) -> Plot:
    """The figure as a Plot."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return Plot(name, title, text, buffer.getvalue())


def tokens_axis(axes: Axes, label: str = "tokens trained") -> None:
    """Label the x axis in tokens: 20 k, 1.5 M."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def ordered_colours(count: int) -> list[tuple[float, ...]]:
    """Colours of an ordered category (difficulty clusters, easiest first): dark blue to yellow."""
    scale = matplotlib.colormaps["cividis"]
    return [scale(i / max(1, count - 1)) for i in range(count)]


def method_colour(method: str) -> str:
    """The colour of a method that stands alone in its plot."""
    return METHOD_COLOURS.get(method, OTHER_COLOURS[0])


def variant_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each variant: methods keep theirs in every plot, others take those that are left, over and over."""
    free = [
        colour
        for colour in (*METHOD_COLOURS.values(), *OTHER_COLOURS)
        if colour not in {METHOD_COLOURS.get(name) for name in names}
    ]
    others = [name for name in names if name not in METHOD_COLOURS]
    return METHOD_COLOURS | {name: free[i % len(free)] for i, name in enumerate(others)}


def group_name(method: str, budget: float | None) -> str:
    """ "lead, 2.5 %"; `full` has no budget."""
    return method if budget is None else f"{method}, {100 * budget:g} %"


def short(text: str, length: int = 28) -> str:
    """A label that fits beside an axis."""
    return text if len(text) <= length else text[: length - 1] + "\u2026"
