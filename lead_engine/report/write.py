"""`lead-engine report`: from run folders to PNG files and one HTML page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

from lead_engine.base import console
from lead_engine.base.errors import UserError
from lead_engine.base.files import write_bytes, write_text
from lead_engine.config import ReportConfig
from lead_engine.report import (
    budget_plots,
    comparison_plots,
    difference_plots,
    heldout_curve,
    selection_plots,
    training_plots,
)
from lead_engine.report.page import page
from lead_engine.report.runs import Collection, Run, read_collection
from lead_engine.report.style import SETTINGS, Plot

COMPARED: tuple[Callable[[Collection], Plot], ...] = (
    budget_plots.budgets_plot,
    difference_plots.differences_plot,
    difference_plots.contrasts_plot,
    difference_plots.task_differences_plot,
    comparison_plots.tasks_plot,
    comparison_plots.time_plot,
    comparison_plots.losses_plot,
)
SINGLE = 24
"""Most runs with plots of their own in one report; a page of more opens slowly in a browser."""


def run(config: ReportConfig) -> None:
    """Write OUT/index.html, which holds everything, and its pictures as OUT/*.png and OUT/RUN/*.png.

    Raises UserError for folders that hold no run and for damaged files.
    """
    if not config.runs:
        raise UserError("report: give at least one run folder")
    collection = read_collection(config.runs)
    config.out.mkdir(parents=True, exist_ok=True)
    several, shown = len(collection.runs) > 1, runs_shown(collection)
    with matplotlib.rc_context(SETTINGS), console.progress(len(shown) + several, "plots") as bar:
        compared = []
        if several:
            compared = [make(collection) for make in COMPARED]
            _write_pictures(config.out, compared)
            bar.advance()
        single = []
        for each in shown:
            plots = plots_of(each, collection)
            _write_pictures(config.out / each.name if several else config.out, plots)
            single.append((each, plots))
            bar.advance()
    write_text(config.out / "index.html", page(collection, compared, single))
    console.say(f"written: {config.out / 'index.html'}")


def runs_shown(collection: Collection) -> list[Run]:
    """The runs with plots of their own: all if few, else up to `SINGLE` of the first seed at the largest budget."""
    if len(collection.runs) <= SINGLE:
        return collection.runs
    largest = max((run.budget for run in collection.runs if run.budget is not None), default=None)
    first = min(run.seed for run in collection.runs)
    return [run for run in collection.runs if run.seed == first and run.budget in (largest, None)][:SINGLE]


def plots_of(run: Run, collection: Collection) -> list[Plot]:
    """One run's plots, in the order of the page."""
    return [
        training_plots.heldout_plot(run, collection.base),
        *([heldout_curve.heldout_curve(run)] if run.heldout else ()),
        training_plots.loss_plot(run),
        training_plots.optimizer_plot(run),
        selection_plots.bandit_plot(run),
        selection_plots.selected_plot(run),
        selection_plots.utility_plot(run),
    ]


def _write_pictures(folder: Path, plots: list[Plot]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        if plot.png is not None:
            write_bytes(folder / f"{plot.name}.png", plot.png)
