"""The public interface: cost and names of `import lead_engine`, and the programs in docs/API.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from needs import TRAINERS

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[1] / "docs" / "API.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def program(starting_with: str) -> str:
    return next(text for text in PROGRAMS if text.startswith(starting_with))


def execute(code: str, **names: object) -> dict[str, object]:
    scope: dict[str, object] = {"__name__": "__main__", **names}
    exec(compile(code, str(PAGE), "exec"), scope)
    return scope


def test_importing_it_is_fast_and_imports_nothing() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import lead_engine; took = time.perf_counter() - start;"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'trl', 'datasets'} & set(sys.modules);"
        "assert not heavy, heavy; assert took < 0.2, took;"
        "assert set(lead_engine.__all__) <= set(dir(lead_engine)); lead_engine.TrainConfig;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_is_documented_and_stands_on_the_page() -> None:
    import lead_engine

    page = PAGE.read_text(encoding="utf-8")
    for name in lead_engine.__all__:
        value = getattr(lead_engine, name)
        assert (value.__doc__ or "").strip(), name
        assert name in page or name in lead_engine.__doc__, name
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lead_engine.__version__)
    with pytest.raises(AttributeError, match="nonsense"):
        lead_engine.nonsense  # noqa: B018


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    import ast

    import lead_engine

    tree = ast.parse(Path(lead_engine.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == lead_engine._HOME
    assert sorted(seen) == lead_engine.__all__
    assert (Path(lead_engine.__file__).parent / "py.typed").exists()


def test_a_whole_run_in_ten_lines(make_model, tmp_path, monkeypatch, capsys) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    for name, count in (("pool.jsonl", 60), ("heldout.jsonl", 8)):
        lines = [
            {"instruction": f"say {words[i % 8]} {i}", "output": " ".join(words[: 1 + i % 7])} for i in range(count)
        ]
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("MODEL").symlink_to(make_model())
    code = program("from pathlib import Path")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    from lead_engine import TrainConfig, UserError

    scope = execute(code)
    assert 2 < scope["result"]["loss"]["overall"] < 20
    assert "held-out loss" in capsys.readouterr().out
    assert (tmp_path / "RUN" / "model" / "config.json").exists()

    # The second program: the same run in the caller's hands gives the same losses.
    again = execute(program("with lead.Session"), lead=scope["lead"], pool=scope["pool"], run=scope["run"], Path=Path)
    metrics = [json.loads(line) for line in Path("RUN/metrics.jsonl").read_text().splitlines()]
    report = again["report"]
    assert report.losses == [line["loss"] for line in metrics if line["round"] == report.round]
    selection = [json.loads(line) for line in Path("RUN/selection.jsonl").read_text().splitlines()]
    assert sum(map(len, report.sample_ids)) == selection[-1]["samples"]
    assert report.tokens == selection[-1]["tokens"]
    assert again["loss"] == pytest.approx(scope["result"]["loss"]["overall"], abs=1e-6)  # bf16 or not, as `eval` has it
    assert (tmp_path / "TUNED" / "model.safetensors").read_bytes() == (
        tmp_path / "RUN" / "model" / "model.safetensors"
    ).read_bytes()
    with pytest.raises(UserError, match="with Session"):
        _ = again["session"].model
    assert isinstance(again["session"].config, TrainConfig)


def test_selection_and_head_in_a_loop_of_ones_own_select_and_learn_as_the_engine_does(
    make_model, make_pool, tmp_path, monkeypatch
) -> None:
    import torch

    import lead_engine
    from lead_engine.config import BatchConfig, OptimizerConfig, RuntimeConfig, SelectionConfig, TrainConfig
    from lead_engine.training.build import build
    from lead_engine.training.distributed import process_group
    from lead_engine.training.rounds import Progress

    monkeypatch.chdir(tmp_path)
    pool, model = make_pool(samples=1500), make_model()
    Path("PREPARED").symlink_to(pool)
    Path("MODEL").symlink_to(model)
    scope = execute(program("import torch\nfrom torch.nn"))
    assert scope["step"] > 4

    longest = int(scope["store"].lengths.max())
    config = TrainConfig(
        pool=pool,
        model=str(model),
        out=tmp_path,
        budget=0.1,
        batch=BatchConfig(capacity=12 * longest, slots=12),
        selection=SelectionConfig(round_steps=4),
        optimizer=OptimizerConfig(lr=1e-3, warmup=0.0, schedule="constant"),
        runtime=RuntimeConfig(precision="fp32"),
    )
    with lead_engine.Session(config) as session:  # left after its first round, and gone on with
        losses = [next(session.rounds()).losses, *(report.losses for report in session.rounds())]
        assert len(losses) > 2
        assert sum(map(len, losses)) == scope["step"]
        assert torch.equal(session.selector.samples.visits, scope["selector"].samples.visits)
    with process_group() as ranks:
        trainer = build(config, ranks).trainer
        trainer.budget = scope["store"].num_tokens // 10
        *_, last = trainer.rounds(Progress())
    own, theirs = scope["selector"].samples, trainer.selector.samples
    assert last.after.step == scope["step"]
    assert torch.equal(own.visits, theirs.visits)  # the same samples
    # Both are fp32; padded and packed batches differ in the order of sums. The estimate of dL amplifies rounding by
    # <G, dtheta> / |G|^2.
    torch.testing.assert_close(own.utility, theirs.utility, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(own.utility[:-1], scope["state"].utility)


@TRAINERS
def test_three_lines_bring_it_into_trainers(make_model, make_pool, tmp_path, monkeypatch) -> None:
    import json

    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {i} twice:", "completion": f" {i} {i} and {'so on ' * (i % 3)}"} for i in range(48)]
    Path("pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("MODEL").symlink_to(make_model())
    Path("PREPARED").symlink_to(make_pool(samples=80))
    code = program("import torch\nfrom datasets import load_dataset")
    assert [line.partition("#")[2].strip()[:1] for line in code.splitlines() if "#" in line] == ["1", "2", "3"]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    trainer = execute(code)["trainer"]
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert 1 <= len(log) <= trainer.args.max_steps == 2
    assert log[-1]["lead_tokens"] <= 0.4 * int(trainer.lead_rows.lengths.sum())
    scope = execute(program("from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollator"))
    assert int(scope["visits"].sum()) > 20
    assert (tmp_path / "OUT2" / "checkpoint-2" / "lead_selection.safetensors").exists()
    ids = [json.loads(line)["ids"] for line in Path("OUT2/selection.jsonl").read_text().splitlines()]
    assert sum(len(step) for steps in ids for step in steps) == int(scope["visits"].sum())
