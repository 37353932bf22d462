"""Every option of the engine, as frozen dataclasses that refuse bad values when they are built.

The command line (`cli.py`) is generated from these classes: a field `batch.capacity` is the flag `--batch.capacity`, and its
docstring is the flag's help. A YAML file given with `--config` has the same nesting; flags override it.
`Bounds` stand beside the number they bound (see options.py); what a class checks itself are rules between its fields.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from lead_engine import reads
from lead_engine.bounds import Bounds, PathText, Seed
from lead_engine.errors import UserError
from lead_engine.options import Options

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
Share = Annotated[float, Bounds(gt=0, le=1, says="shares in (0, 1]")]
Decay = Annotated[float, Bounds(ge=0, lt=1, says="two numbers in [0, 1)")]
Budget = Annotated[float, Bounds(gt=0, le=1000, says="above 0 and at most 1000 (times the pool)")]

NAME = r"[\w.-]+"
"""What a module's name is made of; anything else is a regular expression."""


def require(condition: bool, flag: str, value: object, rule: str) -> None:
    """Raise UserError "FLAG VALUE: must be RULE" unless `condition` holds."""
    if not condition:
        raise UserError(f"{flag} {value}: must be {rule}")


@dataclass(frozen=True)
class BatchConfig(Options):
    """How samples are packed. An optimizer step is `micro_batches` x `capacity` token places, however many ranks share it."""

    flags: ClassVar[str] = "--batch."

    capacity: Annotated[int, Bounds(ge=16, le=2**24)] = 4096
    """Token places in one packed micro-batch; also the longest sample that can be trained."""
    micro_batches: Annotated[int, Bounds(ge=1, le=2**16)] = 1
    """Micro-batches in one optimizer step, over all ranks; a multiple of the number of ranks."""
    slots: Annotated[int, Bounds(ge=0, le=2**20, zero="automatic")] = 0
    """Most samples in one micro-batch; 0 means capacity / 32."""

    @property
    def num_slots(self) -> int:
        return self.slots or max(1, self.capacity // 32)


@dataclass(frozen=True)
class SelectionConfig(Options):
    """LEAD's options (arXiv 2505.07437), which `rescore` shares; other methods read `round_steps` and the options named after them."""

    flags: ClassVar[str] = "--selection."

    loss_change: LossChange = "inner"
    """How a step's effect on its own samples is estimated: gradient inner product at the last hidden state, the paper's, or not at all."""
    inner_form: Literal["sketch", "exact"] = "sketch"
    """The inner product through random projections (q x q numbers a sample), or exact (keeps [T, H] twice)."""
    sketch_dim: Annotated[int, Bounds(ge=1, le=2**12)] = 64
    """q, the width of the random projections."""
    calibrate_every: Annotated[int, Bounds(ge=1)] = 8
    """Optimizer steps between two measurements of the step's true first-order loss change."""
    smoothing: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """b of U <- (1 - b) (loss + change) + b U."""
    bandit: Bandit = "exp3"
    """Who draws the round's cluster; `none` treats the pool as one cluster."""
    gamma: Annotated[float, Bounds(gt=0, le=1)] = 0.1
    """Exploration share of EXP3."""
    exp3s_alpha: Annotated[float, Bounds(ge=0, lt=1)] = 0.01
    """Share of weight that EXP3.S spreads over all clusters each round."""
    draw: Literal["cluster", "mixture"] = "mixture"
    """What a round trains: the one cluster that the bandit draws, or all of them in the proportions of its probabilities."""
    prior: Literal["uniform", "size"] = "size"
    """What the bandit starts from and explores: every cluster alike, or in proportion to its samples."""
    ranking: Literal["hard", "soft", "random"] = "soft"
    """Inside a cluster and task: the best first, a draw with probability ~ rank value ** soft_power, or any."""
    soft_power: Annotated[float, Bounds(gt=0, le=100)] = 2.0
    """Power of the rank value in `--selection.ranking soft`."""
    rank_by: Literal["utility", "density", "answers"] = "density"
    """The rank value: U; U x answer tokens / tokens, what a sample teaches for every token of budget it costs; or that share alone."""
    unseen: Literal["initial", "drift", "estimate"] = "initial"
    """U of samples not trained yet: what `prepare` measured; moved by how far cluster and task have come since; or an estimate alone."""
    optimism: Annotated[float, Bounds(ge=0)] = 1.0
    """With `--selection.unseen estimate`: standard deviations by which a cluster and task nobody has tried stands above its estimate."""
    drop_misaligned: bool = False
    """Never train samples whose answer the instruction does not make likelier."""
    use_tasks: bool = True
    """Give every task a quota, in proportion to its eligible samples to the power of `task_power`."""
    task_power: Annotated[float, Bounds(ge=0, le=1)] = 0.5
    """1: tasks in proportion to their samples; 0: all tasks alike; between: small ones more often than their share."""
    max_visits: Annotated[int, Bounds(ge=1)] = 4
    """How often one sample may be trained."""
    round_steps: Annotated[int, Bounds(ge=1, le=2**16)] = 4
    """S, optimizer steps trained on one bandit decision."""
    epochs: Annotated[int, Bounds(ge=1)] = 3
    """Of `iterit`: how often it scores and chooses anew; each time for an equal share of the budget."""
    candidates: Annotated[float, Bounds(ge=1)] = 3.0
    """Of `iterit`: after the first epoch only the best are scored, this many times the samples that an epoch trains."""
    decay: Annotated[float, Bounds(ge=0, lt=1)] = 0.1
    """Of `iterit`: what is left of an n-gram's weight once a chosen answer has used it."""
    match: Path | None = None
    """Of `random-matched`: folder of the finished run whose picks it imitates in length and task."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


def recipe_value(recipe: str, option: str, default: Any) -> Any:
    """The value of an option, with dots, that nobody gives under the recipe."""
    group, _, name = option.rpartition(".")
    return RECIPES[recipe].get(group, {}).get(name, default)


@dataclass(frozen=True)
class OptimizerConfig(Options):
    """AdamW with linear warm-up and decay over the token budget."""

    flags: ClassVar[str] = "--optimizer."

    lr: Annotated[float, Bounds(gt=0)] = 2e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Bounds(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moment decay rates."""
    eps: Annotated[float, Bounds(ge=1e-30, le=1)] = 1e-8
    """AdamW's denominator floor."""
    max_grad_norm: Annotated[float, Bounds(gt=0)] = 1.0
    """Clip the global gradient norm to this."""
    warmup: Annotated[float, Bounds(ge=0, lt=1)] = 0.05
    """Share of the token budget over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How it falls afterwards."""
    final_lr: Annotated[float, Bounds(ge=0, le=1)] = 0.1
    """Learning rate at the end, as a share of the peak."""
    kind: OptimizerKind = "adamw"
    """adamw: torch's fused AdamW, fp32 moments; adamw8bit: moments in 8 bits (bitsandbytes), a quarter of the memory."""


@dataclass(frozen=True)
class LoraConfig(Options):
    """Low-rank adapters (peft); rank 0 trains all weights."""

    flags: ClassVar[str] = "--lora."

    rank: Annotated[int, Bounds(ge=0, le=2**16, zero="full fine-tuning")] = 0
    """Rank of the adapters; 0 means full fine-tuning."""
    alpha: Annotated[float, Bounds(gt=0)] = 16.0
    """Adapter output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Layers to adapt: the blocks' linear layers (the head has --lora.head), ends of names (q_proj v_proj), or one regular
    expression for whole names."""
    head: bool = False
    """Give the LM head an adapter too."""
    dropout: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that is dropped in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the magnitudes of the adapted weights' rows apart (DoRA, arXiv 2402.09353)."""
    modules_to_save: tuple[str, ...] = ()
    """Modules to train whole beside the adapters, by the ends of their names: lm_head, embed_tokens, norm."""
    quantize: Quantize = "none"
    """nf4: keep the frozen base in 4 bits, double quantised (QLoRA, arXiv 2305.14314)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rank > 0 or not self.head, "--lora.head", self.head, "false without adapters: give --lora.rank too"
        )
        require(
            self.rank > 0 or self.quantize == "none",
            "--lora.quantize",
            self.quantize,
            "none without adapters: give --lora.rank too",
        )
        for name in ("target_modules", "dropout", "rslora", "dora", "modules_to_save"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            shown = " ".join(value) if isinstance(value, tuple) else value
            flag, rule = f"--lora.{name.replace('_', '-')}", "left out without adapters: give --lora.rank too"
            require(self.rank > 0 or value == default, flag, shown, rule)
        for name in ("dropout", "dora"):
            rule = "left out beside --lora.head: the head's adapter is computed inside the loss, without it"
            require(not (self.head and getattr(self, name)), f"--lora.{name}", getattr(self, name), rule)
        targets, one = " ".join(self.target_modules), len(self.target_modules) == 1
        plain = all(re.fullmatch(NAME, target) for target in self.target_modules)
        several = len(self.target_modules) > 1 and plain and "all-linear" not in self.target_modules
        rule = "names, or one regular expression alone, or all-linear alone"
        require(one or several, "--lora.target-modules", targets, rule)
        try:
            re.compile(targets if one else "")
        except re.error as error:
            raise UserError(f"--lora.target-modules {targets}: no regular expression ({error})") from None

    @property
    def targets_by_pattern(self) -> bool:
        """Whether `target_modules` is a regular expression: it has a character that no name has."""
        return len(self.target_modules) == 1 and not re.fullmatch(NAME, self.target_modules[0])


@dataclass(frozen=True)
class RuntimeConfig(Options):
    """Where and in which precision things run."""

    flags: ClassVar[str] = "--runtime."

    precision: Precision = "auto"
    """Compute precision; auto is bf16 where the hardware multiplies it natively, else fp32. Master weights are fp32."""
    attention: Attention = "auto"
    """Attention over packed samples; auto takes the fastest that this machine has."""
    placement: Placement = "auto"
    """Where the pool's tokens lie: on the training device, in pinned host memory, or on disk."""
    head_chunk_mib: Annotated[int, Bounds(ge=0, le=2**20, zero="automatic")] = 0
    """Most memory for one chunk of logits; 0: 64 MiB on a CPU, 1 GiB on a GPU."""
    checkpointing: Checkpointing = "none"
    """Activations recomputed in the backward pass: none, all but the blocks' inputs (full), or all but matrix products (selective)."""
    compile: bool = False
    """Compile every block with torch.compile."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory (FSDP2's CPU offload)."""
    replicate: Annotated[int, Bounds(ge=1)] = 1
    """HSDP: replicas of the model, each sharded over ranks / replicate ranks; 1 shards over all of them."""
    timeout: Annotated[float, Bounds(ge=1, le=1e7)] = 1800.0
    """Seconds that a rank waits for the others before the run stops and says where it stood."""
    peak_tflops: Annotated[float, Bounds(ge=0, zero="automatic")] = 0.0
    """Peak of one device in TFLOP/s, for MFU; 0 takes the known figure of the device, or reports no MFU where none is known."""


@dataclass(frozen=True)
class TrainConfig(Options):
    """Train a model on the samples that a method selects from a prepared pool."""

    read_with: ClassVar[reads.Table] = reads.TRAIN

    pool: Path
    """Folder written by `lead-engine prepare`."""
    model: PathText
    """Hub name, model folder, run (an adapter is trained on), or scratch:tiny|mini|small|100m."""
    out: Path
    """Run folder to write."""
    method: Method = "lead"
    """Who chooses the samples."""
    recipe: Recipe = "default"
    """Set of options that files and flags then change: the best measured here, or LEAD as its paper has it."""
    budget: Budget = 0.025
    """Tokens to train, as a share of the pool's tokens; not for `full`, which takes the whole pool `epochs` times."""
    epochs: Annotated[int, Bounds(ge=1, le=1000)] = 1
    """Passes over the pool; for `full` only."""
    seed: Seed = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the newest complete checkpoint in `out`."""
    checkpoint_every: Annotated[int, Bounds(ge=0, zero="none before the end")] = 0
    """Rounds between two checkpoints; 0 writes none before the end."""
    keep_checkpoints: Annotated[int, Bounds(ge=1)] = 2
    """How many checkpoints to keep."""
    max_skipped_steps: Annotated[int, Bounds(ge=0)] = 10
    """Steps with a loss or gradient that is not finite are skipped and counted; after more of them than this the run stops."""
    eval_data: tuple[PathText, ...] = ()
    """Held-out files, in any form that `prepare` reads: their loss is measured before training and at its end."""
    eval_every: Annotated[int, Bounds(ge=0, zero="only before training and at its end")] = 0
    """Measure it every so many optimizer steps, too (0: not in between), at a round's end; keep the best model in OUT/best."""
    patience: Annotated[int, Bounds(ge=0, zero="never stop early")] = 0
    """Stop after so many measurements in a row without a lower held-out loss; 0 never does."""
    skip_bad: bool = False
    """Leave out records of `eval_data` that cannot be used (each is named and counted) instead of refusing them."""
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
        super().__post_init__()
        for name in ("eval_every", "patience", "skip_bad"):
            value = getattr(self, name)
            alone = value and not self.eval_data
            require(not alone, self.flag(name), value, "left out without --eval-data, the files that it is about")
        alone = self.patience and not self.eval_every
        require(not alone, "--patience", self.patience, "left out without --eval-every N")

    def default_of(self, option: str) -> Any:
        return recipe_value(self.recipe, option, super().default_of(option))

    def _completed(self, name: str, value: Any) -> Any:
        """A recipe comes under the options of a mapping, and stands for those of a caller who gives none."""
        if name == "selection" and self.recipe != "default":
            recipe = RECIPES[self.recipe]["selection"]
            if isinstance(value, Mapping) or value == SelectionConfig():
                return super()._completed(name, recipe | (dict(value) if isinstance(value, Mapping) else {}))
            own = [key for key in recipe if recipe[key] != getattr(SelectionConfig(), key)]
            if isinstance(value, SelectionConfig) and all(getattr(value, key) != recipe[key] for key in own):
                raise UserError(
                    f"--recipe {self.recipe}: `selection` has none of it; give a mapping, which lies over the recipe"
                )
        return super()._completed(name, value)


@dataclass(frozen=True)
class PretrainConfig(Options):
    """Train a small base model on plain text, in the same loop."""

    read_with: ClassVar[reads.Table] = reads.PRETRAIN

    text: tuple[Path, ...]
    """Plain-text files; a blank line or a line break ends a paragraph."""
    out: Path
    """Run folder; the model lies in OUT/model."""
    model: PathText = "scratch:tiny"
    """scratch:NAME, a hub name or a folder."""
    vocab_size: Annotated[
        int, Bounds(ge=300, le=2**20, says="at least 300 (256 bytes and the special tokens) and at most 1048576")
    ] = 4096
    """Size of the byte-level BPE vocabulary trained for scratch:NAME."""
    block: Annotated[int, Bounds(ge=16, le=2**24)] = 512
    """Tokens in one training sample."""
    epochs: Annotated[int, Bounds(ge=1, le=1000)] = 1
    """Passes over the text."""
    seed: Seed = 0
    """Seed of everything random."""
    resume: bool = False
    """Go on from the newest complete checkpoint."""
    checkpoint_every: Annotated[int, Bounds(ge=0, zero="none before the end")] = 0
    """Rounds between two checkpoints; 0 writes none before the end."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-3, weight_decay=0.1))
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block <= self.batch.capacity, "--block", self.block, "at most --batch.capacity")


@dataclass(frozen=True)
class PrepareConfig(Options):
    """Turn instruction files into a prepared pool: tokens, difficulty, initial utility, clusters, tasks."""

    read_with: ClassVar[reads.Table] = reads.PREPARE

    pool: tuple[PathText, ...]
    """Files (JSON, JSONL, CSV, TSV, Parquet, Arrow; text also .gz, .zst, .bz2), folders, patterns, "-", or hub
    NAME[:CONFIG[:SPLIT]]."""
    model: PathText
    """Hub name, model folder, run, or scratch:tiny|mini|small|100m."""
    out: Path
    """Folder to write."""
    max_length: Annotated[int, Bounds(ge=8, le=2**24)] = 1024
    """Longest sample in tokens; longer ones are cut, and counted."""
    clusters: Annotated[int, Bounds(ge=1, le=2**16)] = 7
    """K, difficulty clusters."""
    tasks: Annotated[int, Bounds(ge=0, le=2**16)] = 0
    """Topic clusters by k-means, for records that name no `dataset`; 0 takes the `dataset` field, or one task without it."""
    scoring: Literal["model", "ngram"] = "model"
    """Who judges the samples before training: the model (three passes over the pool), or counts of n-grams (no pass at all)."""
    warmup_share: Annotated[float, Bounds(ge=0, lt=1)] = 0.01
    """Share of the pool's tokens on which a copy of the model is trained briefly before difficulty is measured
    (with --scoring model)."""
    vocab_size: Annotated[
        int, Bounds(ge=300, le=2**20, says="at least 300 (256 bytes and the special tokens) and at most 1048576")
    ] = 4096
    """Size of the vocabulary trained for scratch:NAME."""
    skip_bad: bool = False
    """Leave out records that cannot be used (each is named and counted) instead of refusing the pool."""
    fold_system: bool = False
    """Put a system message at the head of the user turn that follows it, for chat templates without that role."""
    seed: Seed = 0
    """Seed of the warm-up and of k-means."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length <= self.batch.capacity, "--max-length", self.max_length, "at most --batch.capacity")


@dataclass(frozen=True)
class EvalConfig(Options):
    """Held-out loss per task, and exact match with --generate."""

    read_with: ClassVar[reads.Table] = reads.EVAL

    model: PathText
    """Run folder, model folder, or hub name."""
    data: tuple[PathText, ...]
    """Held-out files, in any form that `prepare` reads."""
    out: Path | None = None
    """Folder for eval.json and per-sample results; by default, RUN/eval for a run folder, else only printed."""
    generate: Annotated[int, Bounds(ge=0, zero="none")] = 0
    """Samples per task for which an answer is generated and compared; 0 generates none."""
    max_new_tokens: Annotated[int, Bounds(ge=1, le=2**24)] = 128
    """Longest generated answer."""
    max_length: Annotated[int, Bounds(ge=8, le=2**24)] = 1024
    """Longest sample in tokens."""
    skip_bad: bool = False
    """Leave out records that cannot be used instead of refusing the file."""
    fold_system: bool = False
    """As in `prepare`; a run on a pool that was prepared so does it of itself."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length <= self.batch.capacity, "--max-length", self.max_length, "at most --batch.capacity")


@dataclass(frozen=True)
class HarnessConfig(Options):
    """Public benchmarks by lm-eval: GSM8K, MMLU, HumanEval, TyDiQA, and tasks of your own."""

    model: PathText
    """Run folder, model folder, or hub name; an adapter is merged into its base."""
    tasks: tuple[str, ...]
    """lm-eval's task, group or tag names, or patterns of them: gsm8k mmlu humaneval tydiqa."""
    out: Path
    """Folder for results.json and the samples."""
    include_path: Path | None = None
    """Folder with task YAML files of your own."""
    shots: Annotated[int, Bounds(ge=-1, le=10_000, says="0 to 10000, or -1 for each task's own")] = -1
    """Examples in the prompt; -1 takes each task's own number."""
    limit: Annotated[int, Bounds(ge=0, zero="all")] = 0
    """Samples a task; 0 takes all."""
    batch_size: Annotated[int, Bounds(ge=1, le=2**16)] = 8
    """Samples at a time."""
    max_length: Annotated[int, Bounds(ge=0, le=2**24, zero="the model's own")] = 0
    """Longest prompt and answer in tokens; 0 takes the model's own limit."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    allow_code: bool = False
    """Run tasks that execute what the model writes (humaneval): on this machine, as this user."""
    seed: Seed = 0
    """Seed of the examples in the prompts."""


@dataclass(frozen=True)
class ReportConfig(Options):
    """Plots and one stand-alone HTML page from run folders."""

    runs: tuple[Path, ...]
    """Run folders."""
    out: Path
    """Folder to write."""


@dataclass(frozen=True)
class MergeConfig(Options):
    """Merge a LoRA adapter into its base; writes a model folder in Hugging Face format."""

    run: Path
    """Run folder with an adapter."""
    out: Path
    """Model folder to write."""


@dataclass(frozen=True)
class StudyConfig(Options):
    """A comparison: methods and variants of them x budgets x seeds (the YAML of `compare`)."""

    flags: ClassVar[str] = ""

    pool: Path
    """Folder written by `prepare`."""
    model: PathText
    """The base that every run starts from."""
    heldout: tuple[PathText, ...]
    """Held-out files."""
    methods: tuple[Method, ...] = ("lead", "random", "full")
    """Each stands as a variant of its own name; a file that names variants and no methods has only those."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """NAME: options of `train` that lie over the study's own, and method, match, budgets and seeds; see evaluation/variants.py."""
    reference: str | None = None
    """The variant that every other is compared with; `random` where there is one."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Further pairs [A, B] of variants, compared as A minus B."""
    jobs: Annotated[int, Bounds(ge=1, le=1024)] = 1
    """Runs at a time; they share the processor's cores between them."""
    budgets: tuple[Share, ...] = (0.025,)
    seeds: tuple[Seed, ...] = (0, 1, 2)
    ranks: Annotated[int, Bounds(ge=1, le=1024)] = 1
    """torchrun processes per run."""
    generate: Annotated[int, Bounds(ge=0, zero="none")] = 0
    """Samples per task for exact match."""
    epochs: Annotated[int, Bounds(ge=1, le=1000)] = 1
    """Passes over the pool for `full`, which stands beside the others as the reference that costs 100 %."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.methods or self.variants),
            "methods",
            self.methods,
            "at least one method, where there are no variants",
        )
        require(len(set(self.seeds)) == len(self.seeds) >= 1, "seeds", self.seeds, "at least one seed, each once")


@dataclass(frozen=True)
class CompareConfig(Options):
    """Train several methods at equal token budget over several seeds, with paired intervals."""

    config: Path
    """YAML with the fields of a study (see docs)."""
    out: Path
    """Folder to write; runs that are already complete there are kept."""


@dataclass(frozen=True)
class MakePoolConfig(Options):
    """Write a procedural pool to try the engine on: pool.jsonl, heldout.jsonl and text.txt to pre-train on."""

    out: Path
    """Folder to write."""
    samples: Annotated[int, Bounds(ge=100, le=10**8)] = 4000
    """Records in pool.jsonl."""
    seed: Seed = 0
    """Seed of everything random."""


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain YAML/JSON types (paths as strings, tuples as lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Path):
            return str(value)
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(config)
