"""Everything that only a GPU can tell, in parts of at most nine minutes each. `bench/run_gpu.sh` starts it; see there.

Only Python's standard library is needed to read this file and to say what is missing. Every step is a process of its
own with a time limit of its own; one that fails costs the others nothing. Results are copied to --results after every
step, and the logs of all steps, as one archive, at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PART_SECONDS = 540
"""Of a whole part."""
RESERVE_SECONDS = 10
"""Left at a part's end, to pack what it found."""
MOST_FILES, MOST_BYTES, LOG_BYTES = 8, 16 << 20, 1 << 20
"""Of what a part brings home: files, bytes of one, and bytes of a step's log (its end)."""

NEEDED = {
    "tyro": "tyro",
    "docstring_parser": "docstring-parser",
    "typeguard": "typeguard",
    "peft": "peft",
    "pytest": "pytest",
}
"""Import name -> package without which most steps cannot run."""
OPTIONAL = {
    "trl": "trl",
    "datasets": "datasets",
    "bitsandbytes": "bitsandbytes",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
    "flash_attn": "flash-attn",
    "hypothesis": "hypothesis",
    "pytest_timeout": "pytest-timeout",
}
"""Import name -> package without which something is left out."""

FIRST_TESTS = [
    "tests/model/test_long_tail.py",
    "tests/lead_kernels/test_on_cuda.py",
    "tests/training/test_no_synchronisation.py",
    "tests/model/test_attention.py",
]
"""What would make everything after it worthless if it failed."""


@dataclass
class Step:
    """One process. `results`: files that it writes in the work folder."""

    name: str
    seconds: int
    command: list[str]
    results: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    flags = parse(arguments)
    work = flags.work.resolve()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    flags.results.mkdir(parents=True, exist_ok=True)
    environment = make_environment(work)
    left_out = missing(environment)
    for line in left_out:
        print(line)
    if not flags.dry and not has_gpu(environment):
        print("no CUDA device, or a torch without CUDA: nothing was run (--dry goes through all steps on a CPU)")
        return 2
    outcome = {name: run_part(name, flags, work, environment, left_out) for name in flags.part}
    failed = [
        f"{part}: {name}: {what}" for part, steps in outcome.items() for name, what in steps.items() if what != "done"
    ]
    print("\n".join(["", *(f"failed: {line}" for line in failed)]) if failed else f"all done: {flags.results}")
    return 1 if failed else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run_gpu.sh", description="Everything that only a GPU can tell.")
    parser.add_argument(
        "--part",
        nargs="+",
        choices=sorted(PARTS),
        default=["A"],
        help="A correctness; B training; C planning, "
        "overhead, fidelity; D the head on all shapes; E the other tests; F the study, a piece a call",
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="folder that receives results and logs"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(os.environ.get("LEAD_ENGINE_GPU_WORK", ROOT / "runs" / "gpu")),
        help="folder for models, pools and logs (default: LEAD_ENGINE_GPU_WORK, or runs/gpu)",
    )
    parser.add_argument("--seconds", type=int, default=PART_SECONDS, help="of one part")
    parser.add_argument(
        "--pool", type=Path, help="C and F: pool.jsonl, with heldout.jsonl beside it; default: the procedural pool"
    )
    parser.add_argument(
        "--text", type=Path, nargs="+", help="C and F: text for the base model; default: the procedural pool's"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: every step runs, no figure counts")
    return parser.parse_args(arguments)


# --- the parts ---


def part_a(flags: argparse.Namespace, work: Path) -> list[Step]:
    """Is it right? What the card can do, the tests that everything rests on, the head on two shapes."""
    shapes = ["96x64x500"] if flags.dry else ["4096x2048x128256", "16384x4096x128256"]
    limits = (
        ["--turns", "3", "--seconds", "5"]
        if flags.dry
        else ["--turns", "7", "--seconds", "15", "--build-seconds", "30"]
    )
    head = bench(
        "head", ["--shapes", *shapes, *limits, *(["--contestants", "ours", "naive"] if flags.dry else [])], flags, work
    )
    machine = Step("machine", 60, python("bench/machine.py", "--out", work / "gpu-machine.json"), ["gpu-machine.json"])
    tests = [test(file, 90, flags) for file in (FIRST_TESTS[:1] if flags.dry else FIRST_TESTS)]
    return [machine, *tests, Step("head", 240, head, ["gpu-head.json", "gpu-head.png"])]


def part_b(flags: argparse.Namespace, work: Path) -> list[Step]:
    """Training a model of 1.2B parameters, beside Trainer and SFTTrainer, and a trace of two rounds."""
    size = (
        ["--models", "mini", "--capacity", "512", "--turns", "1", "--only", "engine, SFT"]
        if flags.dry
        else ["--gpu", "1b"]
    )
    trace = [] if flags.dry else ["--trace", str(work / "training-trace.json"), "--contender-seconds", "75"]
    command = python("bench/training.py", *size, *trace, "--work", work, "--out", work / "gpu-training-1b.json")
    return [Step("training", 520, command, ["gpu-training-1b.json", "gpu-training-1b.png"])]


def part_c(flags: argparse.Namespace, work: Path) -> list[Step]:
    """Planning from up to 100 million samples; the selection's share of a step; launches and what graphs would save;
    predicted against seen loss change."""
    sizes = ["--samples", "1000", "--repeats", "1"] if flags.dry else []
    plan = Step("plan", 120, bench("plan", sizes, flags, work), ["gpu-plan.json", "gpu-plan.png"])
    common = [
        "--pool",
        str(work / "prepared"),
        "--model",
        str(work / "base"),
        *small_or(flags, "--capacity", 512, 16384),
        "--lr",
        "1e-4",
    ]
    short = (
        {
            "step_overhead": ["--rounds", "2"],
            "launches": ["--round-steps", "2"],
            "loss_change_fidelity": ["--rounds", "3", "--only", "exact"],
        }
        if flags.dry
        else {}
    )
    measured = [
        Step(
            name,
            80,
            python(f"bench/{name}.py", *common, *short.get(name, []), "--out", work / f"gpu-{name}.json"),
            [f"gpu-{name}.json"],
        )
        for name in ("step_overhead", "launches", "loss_change_fidelity")
    ]
    return [*prepared(flags, work), plan, *measured]


def part_d(flags: argparse.Namespace, work: Path) -> list[Step]:
    """The head beside its peers, on every shape."""
    shapes = (
        ["--shapes", "64x32x200", "--turns", "3", "--seconds", "5", "--contestants", "ours", "naive"]
        if flags.dry
        else []
    )
    limits = [] if flags.dry else ["--seconds", "20", "--build-seconds", "60"]
    return [Step("head", 520, bench("head", [*shapes, *limits], flags, work), ["gpu-head.json", "gpu-head.png"])]


def part_e(flags: argparse.Namespace, work: Path) -> list[Step]:
    """All other tests that touch the device, a process a file: an assertion on the device ends its process."""
    folders = ("lead_kernels", "model", "training", "selection")
    files = [str(f.relative_to(ROOT)) for name in folders for f in sorted((ROOT / "tests" / name).glob("test_*.py"))]
    files = [file for file in files if file not in FIRST_TESTS and "aot" not in file]  # compiling ahead needs no GPU
    return [test(file, 120, flags) for file in (files[:1] if flags.dry else files)]


def part_f(flags: argparse.Namespace, work: Path) -> list[Step]:
    """The study with a base of 100M parameters. `compare` resumes: call this part again until it is complete."""
    study = work / "study.yaml"
    heldout = (flags.pool.parent if flags.pool else work / "data") / "heldout.jsonl"
    text = (ROOT / "bench" / "study" / "gpu.yaml").read_text(encoding="utf-8")
    study.write_text(
        text.replace("runs/gpu/heldout.jsonl", str(heldout)).replace("runs/gpu", str(work)), encoding="utf-8"
    )
    command = python("-m", "lead_engine", "compare", "--config", study, "--out", work / "study")
    if flags.dry:
        command = python("-m", "lead_engine", "compare", "--help")
    return [*prepared(flags, work), Step("study", 500, command, [] if flags.dry else ["study/results.json"])]


PARTS = {"A": part_a, "B": part_b, "C": part_c, "D": part_d, "E": part_e, "F": part_f}


def prepared(flags: argparse.Namespace, work: Path) -> list[Step]:
    """A base model of 100M parameters and a prepared pool; what an earlier call has made is kept."""
    pool, text = flags.pool or work / "data" / "pool.jsonl", flags.text or [work / "data" / "text.txt"]
    batch = small_or(flags, "--batch.capacity", 512, 16384)
    model = "scratch:tiny" if flags.dry else "scratch:100m"
    size = ["--samples", "120"] if flags.dry else []
    steps = []
    if not pool.exists():
        steps.append(
            Step(
                "make-pool", 60, python("-m", "lead_engine", "make-pool", "--out", work / "data", "--seed", "0", *size)
            )
        )
    if flags.dry:
        text = [work / "text.txt"]
        text[0].write_text("A few lines are enough to see that it runs.\n" * 40, encoding="utf-8")
    if not (work / "base" / "summary.json").exists():
        short = ["--vocab-size", "300", "--block", "64"] if flags.dry else ["--vocab-size", "8192"]
        made = python(
            "-m", "lead_engine", "pretrain", "--text", *text, "--model", model, "--out", work / "base", "--resume"
        )
        steps.append(Step("pretrain", 170, [*made, *short, *batch, "--optimizer.lr", "6e-4"]))
    if not (work / "prepared" / "summary.json").exists():
        short = ["--warmup-share", "0", "--max-length", "256", "--clusters", "2"] if flags.dry else []
        rate = [] if flags.dry else ["--optimizer.lr", "1e-4"]  # of the warm-up
        made = python(
            "-m", "lead_engine", "prepare", "--pool", pool, "--model", work / "base", "--out", work / "prepared"
        )
        steps.append(Step("prepare", 90, [*made, *batch, *short, *rate]))
    return steps


def small_or(flags: argparse.Namespace, name: str, dry: int, real: int) -> list[str]:
    return [name, str(dry if flags.dry else real)]


def bench(name: str, options: list[str], flags: argparse.Namespace, work: Path) -> list[str]:
    device = "cpu" if flags.dry else "cuda"
    return python(f"bench/{name}.py", "--device", device, *options, "--out", work / f"gpu-{name}.json")


def test(file: str, seconds: int, flags: argparse.Namespace) -> Step:
    """One test file in a process of its own. Dry: it is collected, no more."""
    options = ["--collect-only"] if flags.dry else ["-rs", "-o", f"timeout={seconds - 10}"]
    return Step(file, seconds, python("-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file))


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


# --- running them ---


def run_part(
    name: str, flags: argparse.Namespace, work: Path, environment: dict[str, str], left_out: list[str]
) -> dict[str, str]:
    """What became of each step. Results, a summary and the logs are then in --results, whatever happened."""
    deadline, outcome, logs = time.monotonic() + flags.seconds, {}, []
    note = {"part": name, "dry": flags.dry, "left_out": left_out, "steps": outcome}
    try:
        for step in PARTS[name](flags, work):
            left = int(deadline - time.monotonic()) - RESERVE_SECONDS
            log = work / "logs" / f"{name}-{step.name.replace('/', '.')}.log"
            if left < 5:
                outcome[step.name] = "not started: the part's time was up"
                continue
            logs.append(log)
            outcome[step.name] = run_step(step, min(step.seconds, left), log, environment)
            bring(step, work, flags.results, note)
    finally:
        (flags.results / f"summary-{name}.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        pack(logs, flags.results / f"logs-{name}.tar.gz")
    return outcome


def run_step(step: Step, limit: int, log: Path, environment: dict[str, str]) -> str:
    """Run it, its output in a log and on the screen's last lines; "done", or what went wrong."""
    print(f"== {step.name} (at most {limit} s)", flush=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        print("$", *step.command, file=file, flush=True)
        process = subprocess.Popen(
            step.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_group(process)
    took = time.monotonic() - started
    if status == 0:
        what = "done"
    elif status is None:
        what = f"stopped after {limit} s"
    else:
        what = f"exit status {status} after {took:.0f} s"
    print("".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-12:]), flush=True)
    print(f"== {step.name}: {what}, {took:.0f} s", flush=True)
    return what


def end_group(process: subprocess.Popen) -> None:
    """The process and all that it started: a contender left behind would hold the device's memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def bring(step: Step, work: Path, results: Path, note: dict) -> None:
    """Copy the step's results, within the limits; what is left out is named."""
    for name in step.results:
        source = work / name
        if not source.exists():
            note.setdefault("absent", []).append(name)
            continue
        target = results / (
            source.name if source.name.startswith("gpu-") else f"gpu-{source.parent.name}-{source.name}"
        )
        if source.stat().st_size > MOST_BYTES:
            note.setdefault("too_large", []).append(f"{name} ({source.stat().st_size} bytes)")
        elif source.resolve() != target.resolve():
            shutil.copy(source, target)


def pack(logs: list[Path], archive: Path) -> None:
    """The ends of the logs as one archive."""
    with tarfile.open(archive, "w:gz") as tar:
        for log in logs:
            if log.exists():
                text = log.read_bytes()[-LOG_BYTES:]
                entry = tarfile.TarInfo(log.name)
                entry.size = len(text)
                tar.addfile(entry, io.BytesIO(text))


# --- the environment ---


def make_environment(work: Path) -> dict[str, str]:
    """The processes' environment, with the wheels of LEAD_ENGINE_WHEELS unpacked. Kernels are not interpreted."""
    paths = [str(ROOT / "kernels"), str(ROOT), str(ROOT / "bench")]
    if folder := os.environ.get("LEAD_ENGINE_WHEELS"):
        target = work / "wheels"
        # One by one: a wheel for another Python must not lose the others.
        for wheel in sorted(Path(folder).glob("*.whl")):
            done = target / f".{wheel.name}.done"
            if not done.exists():
                command = [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    "--no-index",
                    "--no-deps",
                    "--target",
                    str(target),
                    "--upgrade",
                ]
                if subprocess.run([*command, str(wheel)]).returncode == 0:
                    done.touch()
                else:
                    print(f"{wheel.name}: could not be installed (pip's message is above)")
        paths.append(str(target))
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    environment["TRITON_INTERPRET"] = ""  # also where a container hides nvidia-smi, by which the tests look for a GPU
    environment["TOKENIZERS_PARALLELISM"] = "false"
    return environment


def missing(environment: dict[str, str]) -> list[str]:
    """A line for each package that is not there."""
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    found = []
    for names, what in (
        (NEEDED, "most steps need it; put its wheel into LEAD_ENGINE_WHEELS"),
        (OPTIONAL, "what needs it is left out"),
    ):
        found += [
            f"{package}: not installed; {what}"
            for module, package in names.items()
            if importlib.util.find_spec(module) is None
        ]
    return found


def has_gpu(environment: dict[str, str]) -> bool:
    code = "import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name(), torch.__version__)"
    return subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
