"""The table and the plot of bench/training.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def show(setting: dict[str, Any]) -> None:
    tokens, gigaflops = f"{setting['tokens_per_step']:,.0f} tokens", f"{setting['flops_per_step'] / 1e9:,.1f} GFLOPs"
    print(f"\n{setting['model']}: {setting['parameters']:,} parameters, {tokens} and {gigaflops} a step")
    print(f"{'':32}{'tokens/s':>10}{'quartiles':>18}{'/ engine':>10}{'of product':>12}{'memory MiB':>12}{'loss':>8}")
    for name, row in setting["contenders"].items():
        if "tokens_per_second" not in row:
            print(f"{name:32}failed: {row['failed']}")
            continue
        low, high = row["tokens_per_second_quartiles"][0], row["tokens_per_second_quartiles"][-1]
        ratio = _or_dash(row["speed_relative_to_engine"], ".3f")
        memory = _or_dash(row["peak_bytes_beyond_start"] and row["peak_bytes_beyond_start"] / 2**20, ",.0f")
        loss = _or_dash(row["first_loss"], ".3f")
        text = f"{name:32}{row['tokens_per_second']:>10,.0f}{f'{low:,.0f} - {high:,.0f}':>18}{ratio:>10}"
        print(
            text
            + f"{row['share_of_a_product']:>12.1%}{memory:>12}{loss:>8}"
            + (f"  failed: {row['failed']}" if "failed" in row else "")
        )


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of tokens/s, medians with quartiles, a panel per model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(result["settings"]), figsize=(5.5 * len(result["settings"]), 3.2), squeeze=False, sharey=True
    )
    for panel, setting in zip(panels[0], result["settings"], strict=True):
        rows = {name: row for name, row in reversed(setting["contenders"].items()) if "tokens_per_second" in row}
        for place, row in enumerate(rows.values()):
            low, high = row["tokens_per_second_quartiles"][0], row["tokens_per_second_quartiles"][-1]
            middle, ours = row["tokens_per_second"], list(rows)[place].startswith("engine")
            whiskers = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
            panel.barh(
                place, middle, xerr=whiskers, color="#2a6fbb" if ours else "#b9b9b9", ecolor="#333333", capsize=2
            )
            panel.text(middle, place, f"  {middle:,.0f}", va="bottom", fontsize=8)
        panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
        panel.set_xlabel("real tokens per second")
        panel.set_title(
            f"{setting['parameters'] / 1e6:,.1f}M parameters, {setting['tokens_per_step']:,.0f} tokens a step",
            fontsize=9,
        )
        panel.spines[["top", "right"]].set_visible(False)
    where = f"{result['processor']}, {result['precision']}" + ("" if torch.cuda.is_available() else ", one thread")
    figure.suptitle(f"Full fine-tuning, {where}, {result['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
