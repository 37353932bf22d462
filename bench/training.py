"""Tokens per second, MFU and peak memory of SFT and LEAD here, against Hugging Face's Trainer and TRL's SFTTrainer.

    python bench/training.py                  # CPU, one thread: 3.3M and 8M parameters; bench/results/training-cpu.json
    python bench/training.py --quick          # the same path in under a minute; its figures are no measurement
    python bench/training.py --gpu 1b         # on a GPU: bench/results/training-gpu-1b.json; also 3b
    python bench/training.py --model FOLDER   # a Hugging Face folder instead; bench/results/training-cpu-NAME.json

All train the same model (fp32 master weights, the same compute precision) with AdamW on the same samples, the same
number of tokens a step, one process each, in turns whose order rotates: `--turns` turns of some steps, every contender
once a turn (on a GPU, whose memory they could not share, one after another). Speeds are of real tokens: padding is not
counted. Peak memory is each process's own, beyond what it took before its model was built (on a GPU: of tensors). The
yardstick for a step's FLOPs is a large product measured here. The result file is written after every contender (on a
CPU: every turn of all); one that fails or takes longer than --contender-seconds is named in it and costs nobody else's
row.
Samples: made here, of lengths like instruction data's (log-normal, median 115 tokens, a fiftieth over 400; 16 to
1,024), three fifths of them response. The contenders, as rows of the result:

    engine, SFT                    this engine, --method random: the loop that LEAD runs in, without LEAD
    engine, LEAD                   this engine with its default options; plans for itself, trains what all train
    engine, compiled               LEAD with --runtime.compile (on a GPU, or with --compiled)
    Trainer, packed                padding-free: the same micro-batches as one row whose positions restart, sdpa (on a
                                   GPU flash-attention 2 where it is installed)
    Trainer, padded                the same micro-batches as padded rows, sdpa
    Trainer, padded, by length     the same samples regrouped by length over 32 steps, as Trainer's own grouping does;
                                   as many tokens a step
    SFTTrainer, padded, by length  TRL's, with its fused head, the same batches
    SFTTrainer, packed             the same as Trainer's packed rows (on a GPU; on a CPU they share its slow attention)
    ... + Liger                    with Liger-Kernel (on a GPU, where it is installed)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, describe, product_tflops
from training_data import SHAPES, Setting, make_data
from training_link import Spec
from training_report import plot, show
from training_turns import fresh, in_turns, one_after_another

ENGINE = "engine, SFT"


def main() -> None:
    flags = arguments()
    settings = chosen(flags)
    precision = flags.precision
    if precision == "auto":
        from lead_engine.model.precision import choose_precision

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        precision = "bf16" if choose_precision("auto", device) == torch.bfloat16 else "fp32"
    torch.set_num_threads(1)
    path = flags.out or default_path(flags)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"bench": "training", **describe(), "precision": precision, "quick": flags.quick, "settings": []}
    result["versions"] |= versions("trl", "accelerate", "liger-kernel", "flash-attn")
    for setting in settings:
        result["settings"].append(None)

        def save(finished: dict[str, Any]) -> None:
            result["settings"][-1] = finished
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

        with tempfile.TemporaryDirectory(dir=flags.work) as folder:
            finished = compare(Path(folder), setting, precision, make_data(Path(folder), setting), flags, save)
        show(finished)
    plot(result, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")
    rows = [row for setting in result["settings"] for row in setting["contenders"].items()]
    failed = [f"{name} ({row['failed']})" for name, row in rows if "failed" in row]
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def default_path(flags: argparse.Namespace) -> Path:
    where = f"gpu-{flags.gpu}" if flags.gpu else "cpu"
    name = f"-{flags.model.name}" if flags.model else ""
    return RESULTS / f"training-{where}{name}{'-quick' if flags.quick else ''}.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--gpu", choices=("1b", "3b"), help="on a GPU: a Llama of that size, micro-batches of 8192 tokens"
    )
    parser.add_argument("--quick", action="store_true", help="few steps of one small model: whether it runs")
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), help="instead of the usual ones")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, instead of the usual ones")
    parser.add_argument(
        "--compiled", action="store_true", help="also the engine with --runtime.compile; a GPU has that row anyway"
    )
    parser.add_argument(
        "--contender-seconds", type=float, default=600.0, help="a contender that takes longer in all is ended"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these contenders alone, by their rows' names")
    parser.add_argument("--turns", type=int, help="instead of the usual number")
    parser.add_argument("--steps", type=int, help="of Trainer and SFTTrainer in a turn, instead of the usual number")
    parser.add_argument("--round-steps", type=int, help="of the engine's rounds (default 4); it trains two in a turn")
    parser.add_argument("--capacity", type=int, help="tokens in a micro-batch; default 4096, with --gpu 8192")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--trace", type=Path, help="with --gpu: where the profiler's trace of two rounds goes")
    parser.add_argument("--out", type=Path, help="result file")
    parser.add_argument(
        "--work", type=Path, help="folder for models and data (default: the system's for temporary files)"
    )
    return parser.parse_args()


def chosen(flags: argparse.Namespace) -> list[Setting]:
    if flags.gpu:
        settings = [Setting(flags.gpu, 8192, 4, 4, 4)]
    elif flags.quick:
        settings = [Setting("mini", 2048, 1, 2, 2, 2)]
    else:
        settings = [Setting("mini", 4096, 1, 5, 4), Setting("small", 4096, 1, 3, 3)]
    models = [str(flags.model)] if flags.model else flags.models
    if models:
        settings = [replace(settings[0], model=model) for model in models]
    given = {name: getattr(flags, name) for name in ("turns", "steps", "round_steps", "capacity")}
    changes = {name: value for name, value in given.items() if value}
    return [replace(setting, **changes) for setting in settings]


def contenders(setting: Setting, data: Path, precision: str, compiled: bool = False) -> list[Spec]:
    shape = (setting.capacity, setting.micro_batches, setting.round_steps)
    plain = Spec("", "trainer", "padded", False, False, str(data), *shape, precision, 1e-4)
    specs = [
        replace(plain, name=ENGINE, kind="random", form="packed"),
        replace(plain, name="engine, LEAD", kind="lead", form="packed"),
        replace(plain, name="engine, compiled", kind="lead", form="packed", compiled=True),
        replace(plain, name="Trainer, packed", form="packed"),
        replace(plain, name="Trainer, padded"),
        replace(plain, name="Trainer, padded, by length", grouped=True),
        replace(plain, name="SFTTrainer, padded, by length", kind="sft", grouped=True),
    ]
    if not compiled:
        specs = [spec for spec in specs if not spec.compiled]
    if torch.cuda.is_available():
        specs.append(replace(plain, name="SFTTrainer, packed", kind="sft", form="packed"))
        if versions("liger-kernel"):
            peers = [spec for spec in specs if spec.kind in ("trainer", "sft")]
            peers = [spec for spec in peers if spec.form == "packed" or spec.grouped]
            specs += [replace(spec, name=f"{spec.name} + Liger", liger=True) for spec in peers]
    return specs


def compare(
    folder: Path,
    setting: Setting,
    precision: str,
    work: dict[str, Any],
    flags: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The setting's result; `save` is given what there is of it after every contender or turn."""
    specs = contenders(setting, folder, precision, flags.compiled or torch.cuda.is_available())
    if unknown := set(flags.only or ()) - {spec.name for spec in specs}:
        sys.exit(f"--only {', '.join(sorted(unknown))}: the contenders are {', '.join(spec.name for spec in specs)}")
    specs = [spec for spec in specs if not flags.only or spec.name in flags.only]
    product = product_tflops(torch.bfloat16 if precision == "bf16" else torch.float32)

    def so_far(raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
        engine = raw.get(ENGINE, fresh())
        rows = {name: summary(found, engine, work, product) for name, found in raw.items()}
        finished = {
            **asdict(setting),
            "model": Path(setting.model).name,
            **work,
            "product_tflops": product,
            "contenders": rows,
        }
        save(finished)
        return finished

    measure = one_after_another if torch.cuda.is_available() else in_turns
    return so_far(measure(specs, setting, flags, so_far))


def summary(raw: dict[str, Any], engine: dict[str, Any], work: dict[str, Any], product: float) -> dict[str, Any]:
    """Medians and quartiles over turns. Ratios are paired by turn: this contender's speed over the engine's SFT's.

    What a contender that failed had measured before stays, beside the reason.
    """
    seconds = raw["seconds_per_step"]
    failed = {"failed": raw["failed"]} if "failed" in raw else {}
    if not seconds:
        return failed
    speeds = speeds_of(raw)
    ratios = [own / other for own, other in zip(speeds, speeds_of(engine), strict=False)]
    rate = work["flops_per_step"] / work["tokens_per_step"] * statistics.median(speeds) / 1e12
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_quartiles": quartiles(speeds),
        "speed_relative_to_engine": statistics.median(ratios) if ratios else None,
        "speed_relative_quartiles": quartiles(ratios),
        "model_tflops": rate,
        "share_of_a_product": rate / product,
        "peak_bytes": raw.get("peak"),  # told at the end
        "peak_bytes_beyond_start": raw["peak"] - raw["before"] if "peak" in raw else None,
        "first_loss": raw.get("first_loss"),  # mean over the first `round_steps` steps
        "seconds_per_step": seconds,
        "tokens_per_step": raw["tokens_per_step"],
        **{key: raw[key] for key in ("host_waits_in_two_rounds",) if key in raw},
        **failed,
    }


def speeds_of(raw: dict[str, Any]) -> list[float]:
    """Tokens a second, by turn: of the tokens that it trained, as batches of like length differ in theirs."""
    return [tokens / s for tokens, s in zip(raw["tokens_per_step"], raw["seconds_per_step"], strict=True)]


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values


def versions(*names: str) -> dict[str, str]:
    import importlib.metadata

    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
