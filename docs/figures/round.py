"""Draws docs/figures/round.svg, the README's picture: one round of training with selection.

python docs/figures/round.py [FILE]    # default: round.svg beside this file; a name that ends in .png gives a bitmap
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

INK, SOFT = "#1f2933", "#52606d"
PLAN, TRAIN, STATE, HOST = "#0f766e", "#1d4ed8", "#9a3412", "#616e7c"  # what each kind of box is drawn in
TINT = {PLAN: "#ecfdf5", TRAIN: "#eff6ff", STATE: "#fff7ed", HOST: "#ffffff"}
WIDTH, HEIGHT = 108, 62  # of the drawing, in its own units; ten of them are an inch

matplotlib.rcParams.update({"svg.hashsalt": "round", "font.family": "DejaVu Sans"})  # the same file every time


def panel(x: float, y: float, width: float, height: float, fill: str, edge: str) -> None:
    """A rounded background."""
    style = "round,pad=0,rounding_size=1.6"
    plt.gca().add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=edge, linewidth=1))


def box(x: float, y: float, width: float, height: float, color: str, title: str, body: str) -> None:
    """A box with a bold title and some lines below it."""
    style = "round,pad=0,rounding_size=1"
    patch = FancyBboxPatch((x, y), width, height, style, facecolor=TINT[color], edgecolor=color, linewidth=1.3)
    plt.gca().add_patch(patch)
    middle, top = x + width / 2, y + height - 1.3
    plt.text(middle, top, title, ha="center", va="top", fontsize=9, fontweight="bold", color=color)
    plt.text(middle, (y + top - 1) / 2, body, ha="center", va="center", fontsize=8, color=INK, linespacing=1.3)


def arrow(*corners: tuple[float, float], color: str = SOFT, dashed: bool = False) -> None:
    """A line through the corners, with a head at its end."""
    line = "--" if dashed else "-"
    if len(corners) > 2:
        plt.plot(*zip(*corners[:-1], strict=True), color=color, linewidth=1.5, linestyle=line, solid_joinstyle="round")
    head = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "linestyle": line, "shrinkA": 0, "shrinkB": 0}
    plt.annotate("", xy=corners[-1], xytext=corners[-2], arrowprops=head)


def label(x: float, y: float, text: str, color: str = SOFT, **options: object) -> None:
    plt.text(x, y, text, fontsize=8, color=color, linespacing=1.3, **{"ha": "center", "va": "center", **options})


def draw() -> None:
    """The whole picture."""
    axes = plt.figure(figsize=(WIDTH / 10, HEIGHT / 10), facecolor="white").add_axes((0, 0, 1, 1))
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(0, HEIGHT)
    axes.axis("off")

    panel(21, 1, 66, 60, "#f5f7fa", "#cbd2d9")
    label(54, 58.6, "ON THE TRAINING DEVICE", fontweight="bold")
    label(9, 58.6, "ON THE HOST", fontweight="bold")
    label(99, 58.6, "ON THE HOST", fontweight="bold")

    # Top, from left to right: once a round.
    label(23, 54.8, "Plan, once a round", PLAN, ha="left", fontweight="bold")
    box(23, 42, 18, 11, PLAN, "Bandit", "each difficulty cluster\ngets a share\nof the round")
    box(45, 42, 18, 11, PLAN, "Rank", "inside a cluster\nand task, a high U\nmakes a draw likely")
    box(67, 42, 18, 11, PLAN, "Pack", "samples into\nS steps of M\nmicro-batches")
    arrow((41, 47.5), (45, 47.5), color=PLAN)
    arrow((63, 47.5), (67, 47.5), color=PLAN)

    # Middle: what is remembered.
    box(23, 28.5, 40, 8.6, STATE, "State", "every sample's utility U and visits;\nevery cluster's bandit weight")
    arrow((32, 37.1), (32, 42), color=STATE)
    arrow((54, 37.1), (54, 42), color=STATE)

    # Bottom, from right to left: every step.
    panel(22, 2.2, 64, 21.8, "#eaf1fd", "#bcd0f7")
    label(54, 21.9, "Train, S optimizer steps", TRAIN, fontweight="bold")
    box(68.5, 8, 16, 12, TRAIN, "Gather", "the tokens of\nthe samples\nin the plan")
    work = "forward, LM head,\nbackward, optimizer:\nloss L and estimated\nchange dL per sample"
    box(45.5, 8, 19, 12, TRAIN, "Train step", work)
    box(23.5, 8, 18, 12, TRAIN, "Learn", "U ← (1−b)(L + dL)\n      + b U\nvisits ← visits + 1")
    arrow((76.5, 42), (76.5, 20), color=PLAN)
    label(77.5, 32.5, "plan", PLAN, ha="left")
    arrow((68.5, 14), (64.5, 14), color=TRAIN)
    arrow((45.5, 14), (41.5, 14), color=TRAIN)
    arrow((32, 20), (32, 28.5), color=STATE)
    arrow((32, 8), (32, 4.6), (76.5, 4.6), (76.5, 8), color=TRAIN)
    label(54, 5.9, "next step", TRAIN)
    arrow((46, 24), (46, 28.5), color=STATE)
    label(47, 26.2, "after S steps: reward", STATE, ha="left")

    # Both sides: all that passes between device and host.
    box(1, 27.3, 16, 11, HOST, "Checkpoint", "between rounds:\nmodel, optimizer,\nstate")
    arrow((23, 32.8), (17, 32.8), color=HOST, dashed=True)
    box(1, 8, 16, 12, HOST, "Logs", "copied without\nwaiting, written\na round later")
    arrow((23.5, 14), (17, 14), color=HOST, dashed=True)
    box(1, 42, 16, 11, HOST, "prepare", "first U, difficulty\nclusters, tasks\n(before training)")
    arrow((17, 47.5), (19.4, 47.5), (19.4, 35.3), (23, 35.3), color=HOST, dashed=True)
    box(91, 42, 16, 11, HOST, "Counts", "2·S·M integers:\nthe host's only\nwait in a round")
    arrow((85, 47.5), (91, 47.5), color=HOST, dashed=True)
    box(91, 8, 16, 12, HOST, "Token store", "on the device\nif the pool fits;\nelse pinned or\nmemory-mapped")
    arrow((91, 14), (84.5, 14), color=HOST, dashed=True)


if __name__ == "__main__":
    draw()
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    plt.savefig(out, dpi=160, metadata={"Date": None} if out.suffix == ".svg" else None)
