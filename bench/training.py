"""Tokens per second, MFU and peak memory of plain fine-tuning (SFT) and of LEAD, against Hugging Face's Trainer and TRL's SFTTrainer.

    python bench/training.py                  # CPU, one thread: 3.3M and 8M parameters; bench/results/training-cpu.json
    python bench/training.py --quick          # the same path in under a minute; its figures are no measurement
    python bench/training.py --gpu 1b         # on a GPU: bench/results/training-gpu-1b.json; also 3b
    python bench/training.py --model FOLDER   # a Hugging Face folder instead; bench/results/training-cpu-NAME.json

All train the same model (fp32 master weights, the same compute precision) with AdamW on the same samples, the same number of tokens a step,
one process each, in turns whose order rotates: `--turns` turns of some steps, every contender once a turn (on a GPU, whose memory they
could not share, one after another). Speeds are of real tokens: padding is not counted. Peak memory is each process's own, beyond what it
took before its model was built (on a GPU: of tensors). The yardstick for a step's FLOPs is a large product measured here.
The result file is written after every contender (on a CPU: every turn of all); one that fails or takes longer than
--contender-seconds is named in it and costs nobody else's row.
Samples: made here, of lengths like instruction data's (log-normal, median 115 tokens, a fiftieth over 400; 16 to 1,024), three fifths of
them response. The contenders, as rows of the result:

    engine, SFT                    this engine, --method random: the loop that LEAD runs in, without LEAD
    engine, LEAD                   this engine with its default options; plans for itself, trains what all train
    engine, compiled               LEAD with --runtime.compile (on a GPU, or with --compiled)
    Trainer, packed                padding-free: the same micro-batches as one row whose positions restart, sdpa (on a GPU flash-attention 2
                                   where it is installed)
    Trainer, padded                the same micro-batches as padded rows, sdpa
    Trainer, padded, by length     the same samples regrouped by length over 32 steps, as Trainer's own grouping does; as many tokens a step
    SFTTrainer, padded, by length  TRL's, with its fused head, the same batches
    SFTTrainer, packed             the same as Trainer's packed rows (on a GPU; on a CPU they share its slow attention)
    ... + Liger                    with Liger-Kernel (on a GPU, where it is installed)
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import RESULTS, describe, product_tflops
from training_contenders import Spec

HERE = Path(__file__).parent
SHAPES = {
    # name: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embedding
    "mini": (192, 512, 4, 6, 6, 4096, False),  # scratch:mini
    "small": (256, 704, 8, 8, 4, 4096, False),  # scratch:small
    "1b": (2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "3b": (3072, 8192, 28, 24, 8, 128256, True),  # Llama 3.2 3B
}
SAMPLES = 4096
GROUP = 32
"""Steps among whose samples the padded batches are grouped by length (Trainer's own grouping looks at 50 batches)."""
ENGINE = "engine, SFT"


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    model: str
    """A name in SHAPES, or a Hugging Face folder."""
    capacity: int
    micro_batches: int
    turns: int
    steps: int
    """Of a contender in one turn. The engine trains two rounds; on a CPU, those that do not group by length train half as many: by so much
    do they differ."""
    round_steps: int = 4
    """Of the engine's rounds, as by default."""


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
    changes = {
        name: getattr(flags, name) for name in ("turns", "steps", "round_steps", "capacity") if getattr(flags, name)
    }
    return [replace(setting, **changes) for setting in settings]


def contenders(setting: Setting, data: Path, precision: str, compiled: bool = False) -> list[Spec]:
    shape = (setting.capacity, setting.micro_batches, setting.round_steps)
    plain = Spec("", "trainer", "padded", False, False, str(data), *shape, precision, 1e-4)
    specs = [
        replace(plain, name=ENGINE, kind="random", form="packed"),
        replace(plain, name="engine, LEAD", kind="lead", form="packed"),
        *([replace(plain, name="engine, compiled", kind="lead", form="packed", compiled=True)] if compiled else []),
        replace(plain, name="Trainer, packed", form="packed"),
        replace(plain, name="Trainer, padded"),
        replace(plain, name="Trainer, padded, by length", grouped=True),
        replace(plain, name="SFTTrainer, padded, by length", kind="sft", grouped=True),
    ]
    if torch.cuda.is_available():
        specs.append(replace(plain, name="SFTTrainer, packed", kind="sft", form="packed"))
        if versions("liger-kernel"):
            peers = [
                spec for spec in specs if spec.kind in ("trainer", "sft") and (spec.form == "packed" or spec.grouped)
            ]
            specs += [replace(spec, name=f"{spec.name} + Liger", liger=True) for spec in peers]
    return specs


# --- what all train ---


def make_data(folder: Path, setting: Setting) -> dict[str, Any]:
    """Model, pool and steps in `folder`; returns the model FLOPs and real tokens of one step, on average."""
    from transformers import AutoModelForCausalLM

    from lead_engine.model.packed import PackedLM
    from lead_engine.pool.store import TokenStore
    from lead_engine.pool.tokenizer import train_tokenizer
    from lead_engine.training.flops import ModelFlops

    if setting.model in SHAPES:
        model = make_model(setting.model)
        model.save_pretrained(folder / "model")
        train_tokenizer(["a few words are enough for a vocabulary of bytes"] * 3, 300).save_pretrained(folder / "model")
    else:
        (folder / "model").symlink_to(Path(setting.model).resolve(), target_is_directory=True)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    vocabulary = model.config.get_text_config().vocab_size
    flops = ModelFlops.of(PackedLM(model, attention="mask", max_length=1024, chunk_bytes=None))
    make_pool(folder / "pool", vocabulary, min(1024, setting.capacity))
    store = TokenStore.open(folder / "pool" / "store")
    steps = make_steps(store, setting)
    torch.save(steps, folder / "steps.pt")
    ids = steps["ids"][steps["ids"] < store.num_samples]
    count = len(steps["ids"])
    return {
        "flops_per_step": float(flops.samples(store.lengths[ids], store.response_rows[ids]).sum()) / count,
        "tokens_per_step": int(store.lengths[ids].sum()) / count,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def make_model(shape: str) -> torch.nn.Module:
    """A Llama of random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.06,  # wide enough for losses to depend on what a token may see
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_pool(folder: Path, vocabulary: int, longest: int) -> None:
    from lead_engine.pool.state import PoolState
    from lead_engine.pool.store import TokenStore

    random = np.random.default_rng(0)
    lengths = np.clip(np.round(random.lognormal(np.log(115), 0.62, SAMPLES)), 16, longest).astype(int)
    TokenStore.write(
        folder / "store", ((random.integers(4, vocabulary, n), np.arange(n) >= 2 * n // 5) for n in lengths)
    )
    PoolState(
        utility=torch.from_numpy(random.uniform(3, 6, SAMPLES)).float(),
        difficulty=torch.from_numpy(random.uniform(0.3, 1.0, SAMPLES)).float(),
        answer_nll=torch.full((SAMPLES,), 5.0),
        cluster=torch.from_numpy(random.integers(0, 7, SAMPLES)),
        task=torch.from_numpy(random.integers(0, 12, SAMPLES)),
        dropped=torch.zeros(SAMPLES, dtype=torch.bool),
        task_names=[f"task {i}" for i in range(12)],
        num_clusters=7,
    ).save(folder)


def make_steps(store, setting: Setting) -> dict[str, torch.Tensor]:
    """ids int64 [steps, micro-batches, slots] (N in empty slots), their tokens and response rows [steps, micro-batches], and `grouped`: the
    same samples in micro-batches of like length."""
    from lead_kernels import pack_plan

    slots, per_step = setting.capacity // 32, setting.micro_batches
    whole = int(store.lengths.sum()) // (setting.capacity * per_step)
    steps = min(whole // setting.round_steps * setting.round_steps, GROUP)
    order = torch.randperm(store.num_samples, generator=torch.Generator().manual_seed(1))

    def pack(order: torch.Tensor) -> torch.Tensor:
        plan = pack_plan(
            order, store.lengths, num_bins=steps * per_step, capacity=setting.capacity, slots=slots, max_tokens=1 << 40
        )
        return plan.sample_ids.view(steps, per_step, slots)

    ids = pack(order)
    used = ids[ids < store.num_samples]
    by_length = used[store.lengths[used].argsort(stable=True)]
    rows, tokens = (torch.cat([x, x.new_zeros(1)])[ids].sum(-1) for x in (store.response_rows, store.lengths))
    return {
        "ids": ids,
        "tokens": tokens,
        "rows": rows,
        "grouped": group(by_length, store.lengths, ids.shape, store.num_samples),
    }


def group(by_length: torch.Tensor, lengths: torch.Tensor, shape: torch.Size, empty: int) -> torch.Tensor:
    """The samples, sorted, cut into as many micro-batches of as many tokens each, give or take a sample; then in random order."""
    bins = shape[0] * shape[1]
    before = lengths[by_length].cumsum(0) - lengths[by_length]
    place = (before * bins // int(lengths[by_length].sum())).clamp(max=bins - 1)
    parts = [by_length[place == i] for i in range(bins)]
    most = max(shape[2], *map(len, parts))
    grid = torch.full((bins, most), empty)
    for i, part in enumerate(parts):
        grid[i, : len(part)] = part
    return grid[torch.randperm(bins, generator=torch.Generator().manual_seed(2))].view(shape[0], shape[1], most)


# --- turns ---


class Worker:
    """One contender's process. RuntimeError where it fails, or has worked for longer than `limit` seconds in all."""

    def __init__(self, spec: Spec, limit: float) -> None:
        self.spec, self.left = spec, limit
        command = [sys.executable, str(HERE / "training_contenders.py"), json.dumps(asdict(spec))]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def ask(self, order: str) -> dict[str, Any]:
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        started = time.perf_counter()
        if not select.select([self.process.stdout], [], [], max(0.0, self.left))[0]:
            self.process.kill()
            raise RuntimeError(f"{self.spec.name}: took too long; --contender-seconds allows more")
        self.left -= time.perf_counter() - started
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"{self.spec.name} failed:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def steps(self, base: int) -> int:
        """A turn's steps: about as long for each contender."""
        if self.spec.kind in ("lead", "random"):
            return 2 * self.spec.round_steps
        slow = not self.spec.grouped and not torch.cuda.is_available()
        return max(1, base // 2) if slow else base

    def end(self) -> dict[str, Any]:
        told = self.ask("stop")
        self.process.wait(60)
        return told


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
        engine = raw.get(ENGINE, {"seconds_per_step": []})
        rows = {name: summary(found, engine, work, product) for name, found in raw.items()}
        finished = {**asdict(setting), **work, "product_tflops": product, "contenders": rows}
        save(finished)
        return finished

    measure = one_after_another if torch.cuda.is_available() else in_turns
    return so_far(measure(specs, setting, flags, so_far))


def in_turns(
    specs: list[Spec], setting: Setting, flags: argparse.Namespace, tell: Callable[[dict], Any]
) -> dict[str, dict[str, Any]]:
    """All processes stay, and one trains at a time: {name: {"seconds_per_step": [turns], "peak", "before", ...}}."""
    raw: dict[str, dict[str, Any]] = {spec.name: {"seconds_per_step": []} for spec in specs}
    workers = [Worker(spec, flags.contender_seconds) for spec in specs]
    workers = [worker for worker in workers if attempt(worker, raw, lambda w: raw[w.spec.name].update(w.answer()))]
    for turn in range(-1, setting.turns):  # the first warms up
        first = turn % max(1, len(workers))
        for worker in workers[first:] + workers[:first]:
            if not attempt(
                worker, raw, lambda w, turn=turn: keep(raw[w.spec.name], w.ask(f"run {w.steps(setting.steps)}"), turn)
            ):
                workers.remove(worker)
        tell(raw)
        print(f"{setting.model}: turn {turn + 1} of {setting.turns}", file=sys.stderr, flush=True)
    for worker in workers:
        attempt(worker, raw, lambda w: raw[w.spec.name].update(w.end()))
    return raw


def one_after_another(
    specs: list[Spec], setting: Setting, flags: argparse.Namespace, tell: Callable[[dict], Any]
) -> dict[str, dict[str, Any]]:
    """On a GPU, whose memory they do not share: a process per contender, all of its turns at once; LEAD is profiled at the end."""
    raw: dict[str, dict[str, Any]] = {}

    def run(worker: Worker) -> None:
        own = raw[worker.spec.name]
        own.update(worker.answer())
        for turn in range(-1, setting.turns):
            keep(own, worker.ask(f"run {worker.steps(setting.steps)}"), turn)
        if worker.spec.kind == "lead" and not worker.spec.compiled:
            trace = flags.trace or Path(tempfile.gettempdir(), "training-trace.json")
            found = worker.ask(f"profile {trace}")["synchronisations"]
            own["host_waits_in_two_rounds"] = found
            print(
                f"{trace}: "
                + (f"the host waits inside a round: {found}" if found else "the host waits for nothing inside a round")
            )
        own.update(worker.end())

    for spec in specs:
        raw[spec.name] = {"seconds_per_step": []}
        attempt(Worker(spec, flags.contender_seconds), raw, run)
        tell(raw)
    return raw


def attempt(worker: Worker, raw: dict[str, dict[str, Any]], action: Callable[[Worker], object]) -> bool:
    """Whether it went well. A contender that does not fit or does not run keeps its reason, and leaves the others alone."""
    try:
        action(worker)
    except (RuntimeError, OSError) as error:  # OSError: a pipe that its process has closed
        print(error, file=sys.stderr)
        raw[worker.spec.name]["failed"] = str(error).strip().splitlines()[-1]
        worker.process.kill()
        return False
    return True


def keep(raw: dict[str, Any], told: dict[str, Any], turn: int) -> None:
    if turn >= 0:
        raw["seconds_per_step"].append(told["seconds"] / told["steps"])
    if told["losses"] and "first_loss" not in raw:
        raw["first_loss"] = statistics.mean(told["losses"])


def summary(raw: dict[str, Any], engine: dict[str, Any], work: dict[str, Any], product: float) -> dict[str, Any]:
    """Medians and quartiles over turns. Ratios are paired by turn: this contender's speed over the engine's SFT's.

    What a contender that failed had measured before stays, beside the reason.
    """
    seconds = raw["seconds_per_step"]
    failed = {"failed": raw["failed"]} if "failed" in raw else {}
    if not seconds:
        return failed
    speeds = [work["tokens_per_step"] / s for s in seconds]
    ratios = [own / other for own, other in zip(engine["seconds_per_step"], seconds, strict=False)]
    rate = work["flops_per_step"] / statistics.median(seconds) / 1e12
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
        **{key: raw[key] for key in ("host_waits_in_two_rounds",) if key in raw},
        **failed,
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4) if len(values) > 1 else values


def show(setting: dict[str, Any]) -> None:
    tokens = f"{setting['tokens_per_step']:,.0f} tokens a step"
    print(
        f"\n{setting['model']}: {setting['parameters']:,} parameters, {tokens}, {setting['flops_per_step'] / 1e9:,.1f} GFLOPs a step"
    )
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
