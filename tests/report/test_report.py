from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from lead_engine.config import ReportConfig
from lead_engine.report import (
    budget_plots,
    comparison_plots,
    difference_plots,
    heldout_curve,
    run,
    selection_plots,
    write,
)
from lead_engine.report.page import page, table_html
from lead_engine.report.runs import Collection, read_collection, read_run
from lead_engine.report.style import SETTINGS, Plot, variant_colours
from lead_engine.report.write import plots_of

pytestmark = pytest.mark.slow

ONE_RUN = {"heldout", "loss", "optimizer", "bandit", "selected", "utility"}
TOGETHER = {
    "compare-heldout",
    "compare-difference",
    "compare-task-differences",
    "compare-tasks",
    "compare-time",
    "compare-loss",
}
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "src":
                self.pictures.append(value or "")
            assert name not in ("href", "srcset", "onclick")
        if tag in ("script", "link", "iframe"):
            self.links.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def study(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.make_study(tmp_path_factory.mktemp("study") / "study", seeds=2, budgets=(0.025,))


def test_one_run_gives_pictures_and_a_page_that_needs_nothing_else(synthetic: ModuleType, tmp_path: Path) -> None:
    lead = synthetic.make_run(tmp_path / "run")
    run(ReportConfig(runs=(lead,), out=tmp_path / "out"))
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == ONE_RUN
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".png") == ["index.html"]
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    found = Page(text)
    assert found.links == []
    assert not re.search(r"https?:|url\(|@import", text)
    embedded = {base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in found.pictures}
    assert embedded == {path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert all(picture.startswith(PNG) for picture in embedded)


def test_losses_measured_while_it_trained_are_drawn(synthetic: ModuleType, tmp_path: Path) -> None:
    """Overall, macro and each task; of many tasks, those with the most tokens. One that was not finite is a gap."""
    folder = synthetic.make_run(tmp_path / "run", method="random", finished=False, evaluated=False)
    many = tuple(f"task {i}" for i in range(14))
    for tasks in (synthetic.TASKS[:1], synthetic.TASKS, many):
        lines = synthetic.add_heldout(folder, tasks)
        with matplotlib.rc_context(SETTINGS):
            plot = heldout_curve.heldout_curve(read_run(folder))
        known = [line for line in lines if line["loss"]["overall"] is not None]
        best = min(known, key=lambda line: line["loss"]["overall"])
        assert f"Lowest overall: {best['loss']['overall']:.4f} after step {best['step']}." in plot.text
        assert ("Of 14 tasks, the 12 with the most tokens have a plot." in plot.text) == (tasks == many)
        assert plot.png.startswith(PNG)
    run(ReportConfig(runs=(folder,), out=tmp_path / "out"))
    assert (tmp_path / "out" / "heldout-curve.png").exists()
    assert "Held-out loss while it trained" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_a_study_gives_the_comparison_too(synthetic: ModuleType, tmp_path: Path) -> None:
    study, out = synthetic.make_study(tmp_path / "study", seeds=1, budgets=(0.025,)), tmp_path / "out"
    run(ReportConfig(runs=(study,), out=out))
    assert {path.stem for path in out.glob("*.png")} == TOGETHER
    assert (out / "lead-2.5pct-s0" / "bandit.png").exists()
    assert not (out / "random-2.5pct-s0" / "bandit.png").exists()
    text = (out / "index.html").read_text(encoding="utf-8")
    assert len(Page(text).pictures) == len(TOGETHER) + len(ONE_RUN) + 2 * (len(ONE_RUN) - 1)
    assert "lead against random at 5 % of the pool: overall better" in text
    assert "untrained base" in text


def test_what_is_missing_is_said_and_does_not_fail(synthetic: ModuleType, tmp_path: Path) -> None:
    folder = synthetic.make_run(tmp_path / "run", method="random", finished=False, evaluated=False)
    with matplotlib.rc_context(SETTINGS):
        plots = {plot.name: plot for plot in plots_of(read_run(folder), Collection())}
        assert set(plots) == ONE_RUN
        assert {name for name, plot in plots.items() if plot.png is None} == {"heldout", "bandit", "utility"}
        assert "no bandit" in plots["bandit"].text
        assert "not been evaluated" in plots["heldout"].text
        assert "not finished" in plots["utility"].text
        (folder / "metrics.jsonl").write_text("")
        (folder / "selection.jsonl").unlink()
        assert all(plot.png is None for plot in plots_of(read_run(folder), Collection()))
        empty = read_collection([folder])
        assert all(make(empty).png is None for make in write.COMPARED)
        assert "(not finished)" in page(empty, [], [(empty.runs[0], [])])


def test_names_and_values_from_files_cannot_become_markup(synthetic: ModuleType, tmp_path: Path) -> None:
    folder = synthetic.make_run(tmp_path / "<b>run&", evaluated=False)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"model": "<script>alert(1)</script>"}))
    collection = read_collection([folder])
    text = page(collection, [], [(collection.runs[0], [Plot("x", "<i>", "a < b")])])
    assert Page(text).links == []
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;run&amp;" in text
    assert "a &lt; b" in text


def test_numbers_stand_right_and_missing_cells_are_dashes() -> None:
    text = table_html(["run", "loss", "steps"], [["a", 1.23456, 12345], ["b", None, 3]])
    assert text.count('class="number"') == 6
    assert "1.235" in text
    assert "12,345" in text
    assert ">-<" in text


def test_pool_shares_are_of_samples_and_in_the_order_asked_for(synthetic: ModuleType, tmp_path: Path) -> None:
    read = read_run(synthetic.make_run(tmp_path / "run"))
    assert read.utility is not None
    shares = selection_plots._pool_shares(read, list(reversed(synthetic.TASKS)), synthetic.CLUSTERS)
    assert shares is not None
    by_task, by_cluster = shares
    assert by_task.sum() == pytest.approx(100)
    assert by_cluster.sum() == pytest.approx(100)
    assert by_task[0] == pytest.approx(100 * np.mean(read.utility["task"] == len(synthetic.TASKS) - 1))
    assert by_cluster[3] == pytest.approx(100 * np.mean(read.utility["cluster"] == 3))


def test_dropped_samples_belong_to_no_cluster(synthetic: ModuleType, tmp_path: Path) -> None:
    read = read_run(synthetic.make_run(tmp_path / "run"))
    assert read.utility is not None
    read.utility["dropped"] = read.utility["cluster"] == 0
    read.utility["visits"][read.utility["dropped"]] = 0
    shares = selection_plots._pool_shares(read, list(synthetic.TASKS), synthetic.CLUSTERS)
    assert shares is not None
    assert shares[1][0] == 0
    assert shares[1].sum() == pytest.approx(100)
    assert shares[0].sum() == pytest.approx(100)
    read.utility["visits"][read.utility["cluster"] == 0] = 1  # a run that trains them all the same
    shares = selection_plots._pool_shares(read, list(synthetic.TASKS), synthetic.CLUSTERS)
    assert shares is not None
    assert shares[1][0] > 0


def test_a_mixture_has_no_cluster_drawn(synthetic: ModuleType, tmp_path: Path) -> None:
    read = read_run(synthetic.make_run(tmp_path / "run"))
    drawn = selection_plots.bandit_plot(read)
    for line in read.rounds:
        line["cluster"] = None
    mixture = selection_plots.bandit_plot(read)
    assert drawn.png
    assert mixture.png
    assert "share of a round's samples" in mixture.text
    assert "share of a round's samples" not in drawn.text


def test_paired_differences_pair_by_seed(study: Path) -> None:
    collection = read_collection([study])
    ((method, budget, by_kind),) = difference_plots.paired_differences(collection)
    assert (method, budget) == ("lead", 0.025)
    losses = {
        (run.method, run.seed): run.evaluation["loss"]["overall"]
        for run in collection.runs
        if run.evaluation is not None
    }
    expected = [losses["lead", seed] - losses["random", seed] for seed in (0, 1)]
    assert by_kind["overall"][1] == pytest.approx(expected)
    assert by_kind["overall"][0].mean == pytest.approx(np.mean(expected))
    without = Collection([run for run in collection.runs if (run.method, run.seed) != ("random", 1)])
    assert difference_plots.paired_differences(without)[0][2]["overall"][1] == pytest.approx(expected[:1])
    assert (
        difference_plots.paired_differences(Collection([run for run in collection.runs if run.method != "random"]))
        == []
    )


def test_one_seed_has_no_interval_but_plots(study: Path) -> None:
    collection = read_collection([study])
    one = Collection([run for run in collection.runs if run.seed == 0])
    with matplotlib.rc_context(SETTINGS):
        assert difference_plots.differences_plot(one).png is not None
        assert budget_plots.budgets_plot(one).png is not None
        only_full = Collection([run for run in one.runs if run.method == "full"])
        assert comparison_plots.losses_plot(only_full).png is not None
        assert comparison_plots.tasks_plot(only_full).png is not None


def test_many_variants_are_drawn_in_the_order_of_the_study(synthetic: ModuleType, tmp_path: Path) -> None:
    study = synthetic.make_study(tmp_path / "study", seeds=2, budgets=(0.01, 0.02), variants=8)
    collection = read_collection([study])
    expected = ["lead", *(f"lead-variant-{letter}" for letter in "hgfedcba"), "random", "full"]
    assert collection.variants == expected
    assert list(collection.groups) == [(name, budget) for budget in (0.01, 0.02) for name in expected[:-1]] + [
        ("full", None)
    ]
    rows = difference_plots.paired_differences(collection)
    assert [row[:2] for row in rows] == [(name, budget) for name in expected[:-2] for budget in (0.01, 0.02)]
    with matplotlib.rc_context(SETTINGS):
        plots = {plot.name: plot for plot in (make(collection) for make in write.COMPARED)}
    assert all(plot.png is not None for plot in plots.values())
    assert set(plots) == TOGETHER | {"compare-contrasts"}
    assert "a panel for each variant" in plots["compare-heldout"].text
    assert "The first 6 variants of 11" in plots["compare-loss"].text
    shown = write.runs_shown(collection)
    assert [run.name for run in shown] == sorted(
        run.name for run in collection.runs if run.seed == 0 and run.budget != 0.01
    )
    assert "11 of 42 runs are drawn here" in page(collection, [], [(run, []) for run in shown])


def test_another_reference_and_the_mean_over_samples(synthetic: ModuleType, tmp_path: Path) -> None:
    study = synthetic.make_study(tmp_path / "study", seeds=2, budgets=(0.05,), variants=1)
    collection = read_collection([study])
    collection.reference = "lead-variant-a"
    rows = {row[0]: row[2] for row in difference_plots.paired_differences(collection)}
    assert list(rows) == ["lead", "random"]
    means = []
    for seed in (0, 1):
        nll = [
            pq.read_table(study / "runs" / f"{name}-5pct-s{seed}/eval/samples.parquet")["nll"]
            for name in ("lead", "lead-variant-a")
        ]
        means.append(np.mean(nll[0].to_numpy()) - np.mean(nll[1].to_numpy()))
    assert rows["lead"]["per_sample"][1] == pytest.approx(means)
    assert rows["lead"]["per_sample"][0].mean == pytest.approx(np.mean(means))


def test_time_is_split_only_where_the_parts_are_known() -> None:
    known = {"seconds": 10.0, "selection_seconds": 1.0, "scoring_seconds": 3.0}
    parts = comparison_plots.time_parts([known, known | {"seconds": 20.0}])
    assert parts == {"training": 11.0, "selection": 1.0, "scoring": 3.0, "not split": 0.0}
    parts = comparison_plots.time_parts([known, {"seconds": 20.0}])
    assert parts == {"training": 0.0, "selection": 0.0, "scoring": 0.0, "not split": 15.0}


def test_every_variant_has_a_colour_and_few_have_different_ones() -> None:
    names = ["lead", "random", "full", "a", "b", "c", "d", "e", "f"]
    colours = variant_colours(names)
    assert len({colours[name] for name in names}) == len(names)
    assert set(variant_colours([f"v{i}" for i in range(40)])) >= {f"v{i}" for i in range(40)}
