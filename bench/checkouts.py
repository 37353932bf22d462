"""The head and a training step of this checkout against another one's: two processes that take turns.

    git worktree add ../before COMMIT
    python bench/checkouts.py --before ../before         # bench/results/checkouts-cpu.json
    python bench/checkouts.py --before ../before --quick # whether it runs; its figures are no measurement

The head: loss and its gradients at one shape, in fp32 and bf16, a call a turn. The step: the engine of
`bench/training.py` with each checkout's own code, two rounds a turn, plain fine-tuning and LEAD, on samples that the
older code wrote. One thread. Ratios are this checkout's time over the other's within a turn, so that other work hits
both; the order alternates.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from head import summary
from machine import RESULTS, describe

HERE = Path(__file__).resolve().parent
STEPS = {"mini": 4096, "small": 2048}
"""Models of bench/training.py and the tokens of a step."""
DATA = """
import sys, training
from pathlib import Path
training.make_data(Path(sys.argv[1]), training.Setting(sys.argv[2], int(sys.argv[3]), 1, 1, 1))
"""


class Side:
    """A process that works with one checkout's code and answers each line with one line."""

    def __init__(self, checkout: Path, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=environment(checkout),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.answer()  # it is ready

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args)[:200]} ended; its message is above")
        return json.loads(line)

    def seconds(self) -> float:
        self.process.stdin.write("run 2\n")
        self.process.stdin.flush()
        return self.answer()["seconds"]

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate("stop\n", timeout=60)


def environment(checkout: Path) -> dict[str, str]:
    places = (checkout, checkout / "kernels", checkout / "bench")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def compare(before: Path, command: Sequence[str], contender: bool, turns: int) -> dict[str, Any]:
    """Times and ratios of `command`, with both checkouts. `contender`: a script of the checkout's bench folder."""
    times: dict[str, list[float]] = {"before": [], "after": []}
    with ExitStack() as stack:
        sides = {}
        for name, checkout in (("before", before), ("after", HERE.parent)):
            script = [str(checkout / "bench" / command[0]), *command[1:]] if contender else list(command)
            sides[name] = stack.enter_context(Side(checkout, script))
        for turn in range(-1, turns):  # the first warms up
            for name in list(sides)[:: 1 if turn % 2 else -1]:
                took = sides[name].seconds()
                if turn >= 0:
                    times[name].append(took)
    return {"before": summary(times["before"], {}), "after": summary(times["after"], {"before": times["before"]})}


def head(rows: int, hidden: int, vocabulary: int, dtype: str) -> None:
    """A worker: each line read is a call of the head."""
    from head import DTYPES, Shape, forward_backward
    from head_peers import make_inputs, ours

    torch.set_num_threads(1)
    inputs = make_inputs(Shape(rows, hidden, vocabulary), DTYPES[dtype], "cpu")
    run = forward_backward(ours(inputs), inputs)
    print("{}", flush=True)
    for line in sys.stdin:
        if line.startswith("stop"):
            return
        inputs.drop_gradients()
        started = time.perf_counter()
        run()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


def contender(data: Path, kind: str, capacity: int) -> str:
    """`bench/training_contenders.py`'s argument: an engine with rounds of one step."""
    return json.dumps(
        {
            "name": kind,
            "kind": kind,
            "form": "packed",
            "grouped": False,
            "liger": False,
            "data": str(data),
            "capacity": capacity,
            "micro_batches": 1,
            "round_steps": 1,
            "precision": "fp32",
            "lr": 1e-4,
        }
    )


def save(result: dict[str, Any], path: Path) -> None:
    """After every comparison: one that takes too long does not lose the others."""
    result["load"].append(os.getloadavg()[0])
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}", flush=True)


def commit(checkout: Path) -> str:
    found = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def main() -> None:
    if sys.argv[1:2] == ["--head"]:
        rows, hidden, vocabulary = map(int, sys.argv[2].split("x"))
        head(rows, hidden, vocabulary, sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="another checkout of this repository")
    parser.add_argument("--shape", default="1024x576x49152", help="of the head, as TxHxV (default: SmolLM2-135M's)")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small shapes, two turns")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkouts-cpu.json")
    flags = parser.parse_args()
    before, turns = flags.before.resolve(), 2 if flags.quick else flags.turns
    shape, steps = ("64x32x512", {"mini": 1024}) if flags.quick else (flags.shape, STEPS)
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "bench": "checkouts",
        **describe(),
        "before": commit(before),
        "after": commit(HERE.parent),
        "quick": flags.quick,
        "turns": turns,
        "load": [os.getloadavg()[0]],
        "head": {},
        "step": {},
    }
    for dtype in ("fp32", "bf16"):
        name = f"{shape} {dtype}"
        result["head"][name] = compare(before, [str(HERE / "checkouts.py"), "--head", shape, dtype], False, turns)
        save(result, flags.out)
    for model, capacity in steps.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-c", DATA, folder, model, str(capacity)], env=environment(before), check=True
            )
            for kind in ("random", "lead"):
                command = ["training_contenders.py", contender(Path(folder), kind, capacity)]
                name = f"{model}, {capacity} tokens, fp32, {kind}"
                result["step"][name] = compare(before, command, True, turns)
                save(result, flags.out)


if __name__ == "__main__":
    main()
