"""Does the host wait for the device inside a round? Read off a trace of torch's profiler.

A round's steps lie between two marks: after the read of the plan's header, which may wait, and after `learn`. In
between there may be no synchronising call of the CUDA runtime and no operator that reads a tensor's value to the host.
"""

from __future__ import annotations

from typing import Any

from torch.profiler import record_function

MARKS = ("a round's steps begin", "a round's steps end")
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "hipStreamSynchronize",
    "hipDeviceSynchronize",
    "hipEventSynchronize",
    "hipMemcpy",
    "aten::item",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
)


def mark_rounds(trainer: Any) -> None:
    """Let a trainer's rounds leave the marks in whatever profiler runs."""
    from lead_engine.training import trainer as loop

    read, finish = loop.read_header, trainer.selector.learn

    def read_header(*arguments: Any) -> Any:
        header = read(*arguments)
        with record_function(MARKS[0]):
            return header

    def learn(plan: Any) -> Any:
        stats = finish(plan)
        with record_function(MARKS[1]):
            return stats

    loop.read_header, trainer.selector.learn = read_header, learn


def synchronisations(events: list[dict[str, Any]]) -> list[str]:
    """Names of the events of a trace that make the host wait inside a round, in order, each as often as it occurred.

    ValueError unless the trace holds both marks, in pairs: a check that looks at nothing must not pass.
    """
    timed = sorted((event for event in events if "ts" in event and "name" in event), key=lambda event: event["ts"])
    begins, ends = ([event["ts"] for event in timed if event["name"] == mark] for mark in MARKS)
    if not begins or len(begins) != len(ends) or any(end < begin for begin, end in zip(begins, ends, strict=True)):
        raise ValueError(f"the trace has {len(begins)} begins and {len(ends)} ends of rounds")
    inside = [e["name"] for e in timed for begin, end in zip(begins, ends, strict=True) if begin < e["ts"] < end]
    return [name for name in inside if name in WAITS]
