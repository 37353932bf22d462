"""Every option of the engine, as frozen dataclasses that refuse bad values when they are built.

The command line (`cli.py`) is generated from these classes: a field `batch.capacity` is the flag `--batch.capacity`, and its
docstring is the flag's help. A YAML file given with `--config` has the same nesting; flags override it.
This module imports nothing of the engine but its error type.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from lead_engine.errors import UserError

Method = Literal["lead", "iterit", "rescore", "loss", "ifd", "random", "random-matched", "full"]
LossChange = Literal["inner", "paper", "none"]
Bandit = Literal["exp3", "exp3s", "uniform", "none"]
Recipe = Literal["default", "paper"]
Precision = Literal["auto", "bf16", "fp32"]
Placement = Literal["auto", "device", "pinned", "mmap"]
Attention = Literal["auto", "flash", "varlen", "segment", "mask"]
Checkpointing = Literal["none", "selective", "full"]
OptimizerKind = Literal["adamw", "adamw8bit"]
Quantize = Literal["none", "nf4"]


def require(condition: bool, flag: str, value: object, rule: str) -> None:
    """Raise UserError "FLAG VALUE: must be RULE" unless `condition` holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {rule}")


@dataclass(frozen=True)
class BatchConfig:
    """How samples are packed. An optimizer step is `micro_batches` x `capacity` token places, however many ranks share it."""

    capacity: int = 4096
    """Token places in one packed micro-batch; also the longest sample that can be trained."""
    micro_batches: int = 1
    """Micro-batches in one optimizer step, over all ranks; a multiple of the number of ranks."""
    slots: int = 0
    """Most samples in one micro-batch; 0 means capacity / 32."""

    def __post_init__(self) -> None:
        require(self.capacity >= 16, "--batch.capacity", self.capacity, "at least 16")
        require(self.micro_batches >= 1, "--batch.micro-batches", self.micro_batches, "at least 1")
        require(self.slots >= 0, "--batch.slots", self.slots, "0 (automatic) or more")

    @property
    def num_slots(self) -> int:
        return self.slots or max(1, self.capacity // 32)


@dataclass(frozen=True)
class SelectionConfig:
    """LEAD's options (arXiv 2505.07437), which `rescore` shares; other methods read `round_steps` and the options named after them."""

    loss_change: LossChange = "inner"
    """How a step's effect on its own samples is estimated: gradient inner product at the last hidden state, the paper's, or not at all."""
    inner_form: Literal["sketch", "exact"] = "sketch"
    """The inner product through random projections (q x q numbers a sample), or exact (keeps [T, H] twice)."""
    sketch_dim: int = 64
    """q, the width of the random projections."""
    calibrate_every: int = 8
    """Optimizer steps between two measurements of the step's true first-order loss change."""
    smoothing: float = 0.1
    """b of U <- (1 - b) (loss + change) + b U."""
    bandit: Bandit = "exp3"
    """Who draws the round's cluster; `none` treats the pool as one cluster."""
    gamma: float = 0.1
    """Exploration share of EXP3."""
    exp3s_alpha: float = 0.01
    """Share of weight that EXP3.S spreads over all clusters each round."""
    draw: Literal["cluster", "mixture"] = "mixture"
    """What a round trains: the one cluster that the bandit draws, or all of them in the proportions of its probabilities."""
    prior: Literal["uniform", "size"] = "size"
    """What the bandit starts from and explores: every cluster alike, or in proportion to its samples."""
    ranking: Literal["hard", "soft", "random"] = "soft"
    """Inside a cluster and task: the best first, a draw with probability ~ rank value ** soft_power, or any."""
    soft_power: float = 2.0
    """Power of the rank value in `--selection.ranking soft`."""
    rank_by: Literal["utility", "density", "answers"] = "density"
    """The rank value: U; U x answer tokens / tokens, what a sample teaches for every token of budget it costs; or that share alone."""
    unseen: Literal["initial", "drift", "estimate"] = "initial"
    """U of samples not trained yet: what `prepare` measured; moved by how far cluster and task have come since; or an estimate alone."""
    optimism: float = 1.0
    """With `--selection.unseen estimate`: standard deviations by which a cluster and task nobody has tried stands above its estimate."""
    drop_misaligned: bool = False
    """Never train samples whose answer the instruction does not make likelier."""
    use_tasks: bool = True
    """Give every task a quota, in proportion to its eligible samples to the power of `task_power`."""
    task_power: float = 0.5
    """1: tasks in proportion to their samples; 0: all tasks alike; between: small ones more often than their share."""
    max_visits: int = 4
    """How often one sample may be trained."""
    round_steps: int = 4
    """S, optimizer steps trained on one bandit decision."""
    epochs: int = 3
    """Of `iterit`: how often it scores and chooses anew; each time for an equal share of the budget."""
    candidates: float = 3.0
    """Of `iterit`: after the first epoch only the best are scored, this many times the samples that an epoch trains."""
    decay: float = 0.1
    """Of `iterit`: what is left of an n-gram's weight once a chosen answer has used it."""
    match: Path | None = None
    """Of `random-matched`: folder of the finished run whose picks it imitates in length and task."""

    def __post_init__(self) -> None:
        require(self.sketch_dim >= 1, "--selection.sketch-dim", self.sketch_dim, "at least 1")
        require(self.calibrate_every >= 1, "--selection.calibrate-every", self.calibrate_every, "at least 1")
        require(0 <= self.smoothing < 1, "--selection.smoothing", self.smoothing, "in [0, 1)")
        require(0 < self.gamma <= 1, "--selection.gamma", self.gamma, "in (0, 1]")
        require(0 <= self.exp3s_alpha < 1, "--selection.exp3s-alpha", self.exp3s_alpha, "in [0, 1)")
        require(0 <= self.task_power <= 1, "--selection.task-power", self.task_power, "in [0, 1]")
        require(self.max_visits >= 1, "--selection.max-visits", self.max_visits, "at least 1")
        require(self.soft_power > 0, "--selection.soft-power", self.soft_power, "above 0")
        require(self.optimism >= 0, "--selection.optimism", self.optimism, "0 or more")
        require(self.round_steps >= 1, "--selection.round-steps", self.round_steps, "at least 1")
        require(self.epochs >= 1, "--selection.epochs", self.epochs, "at least 1")
        require(self.candidates >= 1, "--selection.candidates", self.candidates, "at least 1")
        require(0 <= self.decay < 1, "--selection.decay", self.decay, "in [0, 1)")
        require(
            self.draw == "cluster" or self.loss_change != "paper",
            "--selection.loss-change",
            self.loss_change,
            "inner or none with --selection.draw mixture (the paper's change is that of one cluster)",
        )


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "selection": {
            "loss_change": "paper",
            "smoothing": 0.1,
            "bandit": "exp3",
            "gamma": 0.1,
            "draw": "cluster",
            "prior": "uniform",
            "ranking": "hard",
            "rank_by": "utility",
            "unseen": "initial",
            "drop_misaligned": True,
            "use_tasks": True,
            "task_power": 1.0,
            "max_visits": 4,
        }
    },
}
"""Named sets of options, under what a file and flags say: `paper` is the setting of arXiv 2505.07437, `default` the best measured here."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and decay over the token budget."""

    lr: float = 2e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    warmup: float = 0.05
    """Share of the token budget over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls afterwards."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    kind: OptimizerKind = "adamw"
    """adamw: torch's fused AdamW, fp32 moments; adamw8bit: moments in 8 bits (bitsandbytes), a quarter of the memory."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "--optimizer.lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "--optimizer.weight-decay", self.weight_decay, "0 or more")
        require(all(0 <= b < 1 for b in self.betas), "--optimizer.betas", self.betas, "two numbers in [0, 1)")
        require(self.max_grad_norm > 0, "--optimizer.max-grad-norm", self.max_grad_norm, "above 0")
        require(0 <= self.warmup < 1, "--optimizer.warmup", self.warmup, "in [0, 1)")
        require(0 <= self.final_lr <= 1, "--optimizer.final-lr", self.final_lr, "in [0, 1]")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (peft); rank 0 trains all weights."""

    rank: int = 0
    """Rank of the adapters; 0 means full fine-tuning."""
    alpha: float = 16.0
    """Adapter output is scaled by alpha / rank."""
    head: bool = False
    """Give the LM head an adapter too."""
    quantize: Quantize = "none"
    """nf4: keep the frozen base in 4 bits, double quantised (QLoRA, arXiv 2305.14314)."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "--lora.rank", self.rank, "0 (full fine-tuning) or more")
        require(self.rank > 0 or not self.head, "--lora.head", self.head, "false without adapters: give --lora.rank too")
        require(self.rank > 0 or self.quantize == "none", "--lora.quantize", self.quantize, "none without adapters: give --lora.rank too")
        require(self.alpha > 0, "--lora.alpha", self.alpha, "above 0")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and in which precision things run."""

    precision: Precision = "auto"
    """Compute precision; auto is bf16 where the hardware multiplies it natively, else fp32. Master weights are fp32."""
    attention: Attention = "auto"
    """Attention over packed samples; auto takes the fastest that this machine has."""
    placement: Placement = "auto"
    """Where the pool's tokens lie: on the training device, in pinned host memory, or on disk."""
    head_chunk_mib: int = 0
    """Most memory for one chunk of logits; 0: 64 MiB on a CPU, 1 GiB on a GPU."""
    checkpointing: Checkpointing = "none"
    """Activations recomputed in the backward pass: none, all but the blocks' inputs (full), or all but matrix products (selective)."""
    compile: bool = False
    """Compile every block with torch.compile."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP2's CPU offload)."""
    replicate: int = 1
    """HSDP: replicas of the model, each sharded over ranks / replicate ranks; 1 shards over all of them."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before the run stops and says where it stood."""
    peak_tflops: float = 0.0
    """Peak of one device in TFLOP/s, for MFU; 0 takes the known figure of the device, or reports no MFU where none is known."""

    def __post_init__(self) -> None:
        require(self.replicate >= 1, "--runtime.replicate", self.replicate, "at least 1")
        require(self.timeout > 0, "--runtime.timeout", self.timeout, "above 0")
        require(self.peak_tflops >= 0, "--runtime.peak-tflops", self.peak_tflops, "0 (automatic) or more")
        require(self.head_chunk_mib >= 0, "--runtime.head-chunk-mib", self.head_chunk_mib, "at least 0")


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on the samples that a method selects from a prepared pool."""

    pool: Path
    """Folder written by `lead-engine prepare`."""
    model: str
    """Hub name, model folder, or scratch:tiny|small|100m."""
    out: Path
    """Run folder to write."""
    method: Method = "lead"
    """Who chooses the samples."""
    recipe: Recipe = "default"
    """Set of options that files and flags then change: the best measured here, or LEAD as its paper has it."""
    budget: float = 0.025
    """Tokens to train, as a share of the pool's tokens; `full` ignores it and takes the whole pool `epochs` times."""
    epochs: int = 1
    """Passes over the pool; for `full` only."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the newest complete checkpoint in `out`."""
    checkpoint_every: int = 0
    """Rounds between two checkpoints; 0 writes none before the end."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    max_skipped_steps: int = 10
    """Steps with a loss or gradient that is not finite are skipped and counted; after more of them than this the run stops."""
    wandb: str = ""
    """Also log to Weights & Biases: the project's name."""
    mlflow: str = ""
    """Also log to MLflow: the experiment's name."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(0 < self.budget <= 1000, "--budget", self.budget, "above 0 and at most 1000 (times the pool)")
        require(self.epochs >= 1, "--epochs", self.epochs, "at least 1")
        require(self.checkpoint_every >= 0, "--checkpoint-every", self.checkpoint_every, "0 or more")
        require(self.keep_checkpoints >= 1, "--keep-checkpoints", self.keep_checkpoints, "at least 1")
        require(self.max_skipped_steps >= 0, "--max-skipped-steps", self.max_skipped_steps, "0 or more")


@dataclass(frozen=True)
class PretrainConfig:
    """Train a small base model on plain text, in the same loop."""

    text: tuple[Path, ...]
    """Plain-text files; a blank line or a line break ends a paragraph."""
    out: Path
    """Run folder; the model lies in OUT/model."""
    model: str = "scratch:tiny"
    """scratch:NAME, a hub name or a folder."""
    vocab_size: int = 4096
    """Size of the byte-level BPE vocabulary trained for scratch:NAME."""
    block: int = 512
    """Tokens in one training sample."""
    epochs: int = 1
    """Passes over the text."""
    seed: int = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the newest complete checkpoint."""
    checkpoint_every: int = 0
    """Rounds between two checkpoints; 0 writes none before the end."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3, weight_decay=0.1))
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(self.vocab_size >= 300, "--vocab-size", self.vocab_size, "at least 300 (256 bytes and the special tokens)")
        require(16 <= self.block <= self.batch.capacity, "--block", self.block, "between 16 and --batch.capacity")
        require(self.epochs >= 1, "--epochs", self.epochs, "at least 1")


@dataclass(frozen=True)
class PrepareConfig:
    """Turn instruction files into a prepared pool: tokens, difficulty, initial utility, clusters, tasks."""

    pool: tuple[str, ...]
    """JSON, JSONL or Parquet files, or hub data set names."""
    model: str
    """Hub name, model folder, or scratch:NAME."""
    out: Path
    """Folder to write."""
    max_length: int = 1024
    """Longest sample in tokens; longer ones are cut, and counted."""
    clusters: int = 7
    """K, difficulty clusters."""
    tasks: int = 0
    """Topic clusters by k-means where records name no `dataset`; 0 takes the `dataset` field, or one task without it."""
    scoring: Literal["model", "ngram"] = "model"
    """Who judges the samples before training: the model (three passes over the pool), or counts of n-grams (no pass at all)."""
    warmup_share: float = 0.01
    """Share of the pool's tokens on which a copy of the model is trained briefly before difficulty is measured."""
    vocab_size: int = 4096
    """Size of the vocabulary trained for scratch:NAME."""
    skip_bad: bool = False
    """Leave out records that cannot be used (each is named and counted) instead of refusing the pool."""
    seed: int = 0
    """Seed of the warm-up and of k-means."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(8 <= self.max_length <= self.batch.capacity, "--max-length", self.max_length, "between 8 and --batch.capacity")
        require(self.clusters >= 1, "--clusters", self.clusters, "at least 1")
        require(self.tasks >= 0, "--tasks", self.tasks, "0 or more")
        require(0 <= self.warmup_share < 1, "--warmup-share", self.warmup_share, "in [0, 1)")


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss per task, and exact match with --generate."""

    model: str
    """Run folder, model folder, or hub name."""
    data: tuple[str, ...]
    """Held-out files, in any form that `prepare` reads."""
    out: Path | None = None
    """Folder for eval.json and per-sample results; by default, RUN/eval for a run folder, else only printed."""
    generate: int = 0
    """Samples per task for which an answer is generated and compared; 0 generates none."""
    max_new_tokens: int = 128
    """Longest generated answer."""
    max_length: int = 1024
    """Longest sample in tokens."""
    skip_bad: bool = False
    """Leave out records that cannot be used instead of refusing the file."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(8 <= self.max_length <= self.batch.capacity, "--max-length", self.max_length, "between 8 and --batch.capacity")
        require(self.generate >= 0, "--generate", self.generate, "0 or more")
        require(self.max_new_tokens >= 1, "--max-new-tokens", self.max_new_tokens, "at least 1")


@dataclass(frozen=True)
class HarnessConfig:
    """Public benchmarks by lm-eval: GSM8K, MMLU, HumanEval, TyDiQA, and tasks of your own."""

    model: str
    """Run folder, model folder, or hub name; an adapter is merged into its base."""
    tasks: tuple[str, ...]
    """lm-eval's task, group or tag names, or patterns of them: gsm8k mmlu humaneval tydiqa."""
    out: Path
    """Folder for results.json and the samples."""
    include_path: Path | None = None
    """Folder with task YAML files of your own."""
    shots: int = -1
    """Examples in the prompt; -1 takes each task's own number."""
    limit: int = 0
    """Samples a task; 0 takes all."""
    batch_size: int = 8
    """Samples at a time."""
    max_length: int = 0
    """Longest prompt and answer in tokens; 0 takes the model's own limit."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    allow_code: bool = False
    """Run tasks that execute what the model writes (humaneval): on this machine, as this user."""
    seed: int = 0
    """Seed of the examples in the prompts."""

    def __post_init__(self) -> None:
        require(self.shots >= -1, "--shots", self.shots, "0 or more, or -1 for each task's own")
        require(self.limit >= 0, "--limit", self.limit, "0 (all) or more")
        require(self.batch_size >= 1, "--batch-size", self.batch_size, "at least 1")
        require(self.max_length >= 0, "--max-length", self.max_length, "0 (the model's) or more")


@dataclass(frozen=True)
class ReportConfig:
    """Plots and one stand-alone HTML page from run folders."""

    runs: tuple[Path, ...]
    """Run folders."""
    out: Path
    """Folder to write."""


@dataclass(frozen=True)
class MergeConfig:
    """Merge a LoRA adapter into its base; writes a model folder in Hugging Face format."""

    run: Path
    """Run folder with an adapter."""
    out: Path
    """Model folder to write."""


@dataclass(frozen=True)
class StudyConfig:
    """A comparison: methods and variants of them x budgets x seeds (the YAML of `compare`)."""

    pool: Path
    """Folder written by `prepare`."""
    model: str
    """The base that every run starts from."""
    heldout: tuple[str, ...]
    """Held-out files."""
    methods: tuple[Method, ...] = ("lead", "random", "full")
    """Each stands as a variant of its own name; a file that names variants and no methods has only those."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """NAME: options of `train` that lie over the study's own, and method, match, budgets and seeds; see evaluation/variants.py."""
    reference: str | None = None
    """The variant that every other is compared with; `random` where there is one."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Further pairs [A, B] of variants, compared as A minus B."""
    jobs: int = 1
    """Runs at a time; they share the processor's cores between them."""
    budgets: tuple[float, ...] = (0.025,)
    seeds: tuple[int, ...] = (0, 1, 2)
    ranks: int = 1
    """torchrun processes per run."""
    generate: int = 0
    """Samples per task for exact match."""
    epochs: int = 1
    """Passes over the pool for `full`, which stands beside the others as the reference that costs 100 %."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        require(bool(self.methods or self.variants), "methods", self.methods, "at least one method, where there are no variants")
        require(self.jobs >= 1, "jobs", self.jobs, "at least 1")
        require(len(set(self.seeds)) == len(self.seeds) >= 1, "seeds", self.seeds, "at least one seed, each once")
        require(all(0 < b <= 1 for b in self.budgets), "budgets", self.budgets, "shares in (0, 1]")
        require(self.ranks >= 1, "ranks", self.ranks, "at least 1")


@dataclass(frozen=True)
class CompareConfig:
    """Train several methods at equal token budget over several seeds, with paired intervals."""

    config: Path
    """YAML with the fields of a study (see docs)."""
    out: Path
    """Folder to write; runs that are already complete there are kept."""


@dataclass(frozen=True)
class MakePoolConfig:
    """Write a procedural pool to try the engine on: pool.jsonl, heldout.jsonl and text.txt to pre-train on."""

    out: Path
    """Folder to write."""
    samples: int = 4000
    """Records in pool.jsonl."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        require(self.samples >= 100, "--samples", self.samples, "at least 100")
        require(self.seed >= 0, "--seed", self.seed, "0 or more")


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON types (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError naming file and line if it is not one."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a YAML file that can be read") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}" if mark else "not UTF-8 text"
        raise UserError(f"--config {path}: {where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected a mapping of options, found {type(values).__name__}")
    return values
