"""Options of earlier versions: what each is called now, and saved configs read under today's names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

LEADS = ("lead", "rescore")
HAS = {
    "lead": (
        *("loss_change", "sketch_dim", "calibrate_every", "smoothing", "bandit", "gamma", "draw", "ranking", "unseen"),
        *("drop_misaligned", "task_quotas", "max_visits"),
    ),
    "rescore": ("smoothing", "bandit", "gamma", "draw", "ranking", "drop_misaligned", "task_quotas", "max_visits"),
    "iterit": ("epochs", "candidates", "decay"),
    "random-matched": ("match",),
}
"""Method -> those of its options that once stood under `selection`."""
REPLACED = {
    "inner_form": "part of --lead.sketch-dim, where 0 is the exact form",
    "use_tasks": "part of --lead.task-quotas, where none is without",
    "task_power": "--lead.task-quotas: sqrt, proportional or equal",
}
FOLLOWS = {
    "exp3s_alpha": "0.01 with --lead.bandit exp3s",
    "prior": "uniform with --lead.draw cluster, size with mixture",
    "soft_power": "2 with --lead.ranking soft",
    "rank_by": "utility with --lead.ranking hard, density with soft",
    "optimism": "1 with --lead.unseen estimate",
}
"""Options that are none now: the value that holds."""
GONE = {
    "optimizer.eps": (1e-8, "1e-8"),
    "optimizer.final_lr": (0.1, "a tenth of the peak"),
    "runtime.head_chunk_mib": (0, "64 MiB on a CPU, a 32nd of the memory on a GPU"),
    "runtime.peak_tflops": (0.0, "the figures of lead_engine/training/flops.py"),
}
"""Options of other groups that are none now: (the default that they had, what holds)."""
QUOTAS = {0.5: "sqrt", 1.0: "proportional", 0.0: "equal"}


def moved_option(option: str, *, as_key: bool = False) -> str | None:
    """What to tell about an option, with dots, that has another name now or is gone; None for any other.

    as_key: name options as in YAML and not as flags.
    """
    told = _told(option)
    return told and (re.sub(r"--([\w-]+\.)([\w-]+)", _flag_as_key, told) if as_key else told)


def _flag_as_key(flag: re.Match[str]) -> str:
    return flag[1] + flag[2].replace("-", "_")


def _told(option: str) -> str | None:
    group, _, name = option.replace("-", "_").rpartition(".")
    if option == "epochs":
        return "is now --full.epochs"
    if f"{group}.{name}" in GONE:
        return f"is no option any more: {GONE[f'{group}.{name}'][1]}"
    if group != "selection":
        return None
    if name in REPLACED:
        return f"is now {REPLACED[name]}"
    if name in FOLLOWS:
        return f"is no option any more: {FOLLOWS[name]}"
    home = next((method for method, names in HAS.items() if name in names), None)
    return home and f"is now --{home}.{name.replace('_', '-')}"


def flat_options(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The options that a mapping gives, with dots."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_options(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key)


def under_new_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved config as today's version would have written it.

    An option that is gone and had another value than holds now stays under its old name: such a run cannot go on here.
    """
    saved = {key: _without_gone(key, value) for key, value in saved.items()}
    old = saved.get("selection")
    if not isinstance(old, Mapping) or set(old) <= {"round_steps"}:
        return saved
    values = {key: value for key, value in saved.items() if key not in ("selection", "epochs")}
    values["selection"] = {"round_steps": old["round_steps"]} if "round_steps" in old else {}
    method = saved.get("method", "lead")
    own = {name: value for name, value in _renamed(old) if name in HAS.get(method, ())}
    if method in LEADS:
        values["selection"] |= _not_as_now(old, own)
    if method == "full" and "epochs" in saved:
        own["epochs"] = saved["epochs"]
    return {**values, method: own} if own else values


def _without_gone(group: str, values: Any) -> Any:
    """A group of options without those that are none now and had their default, or that decide nothing."""
    if not isinstance(values, Mapping):
        return values
    gone = {name for name in values if f"{group}.{name}" in GONE}
    kept = {name for name in gone if group != "runtime" and values[name] != GONE[f"{group}.{name}"][0]}
    return {name: value for name, value in values.items() if name in kept or name not in gone}


def _renamed(old: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in old.items():
        if name == "sketch_dim" and old.get("inner_form") == "exact":
            yield name, 0
        elif name == "use_tasks":
            power = old.get("task_power", 0.5)
            yield "task_quotas", QUOTAS.get(power, f"a power of {power}") if value else "none"
        else:
            yield name, value


def _not_as_now(old: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `FOLLOWS` that were read and had another value than the one that holds now."""
    now = {
        "exp3s_alpha": 0.01 if own.get("bandit") == "exp3s" else None,
        "prior": None
        if own.get("bandit") == "none"
        else {"cluster": "uniform", "mixture": "size"}.get(own.get("draw", "")),
        "soft_power": 2.0 if own.get("ranking") == "soft" else None,
        "rank_by": {"hard": "utility", "soft": "density"}.get(own.get("ranking", "")),
        "optimism": 1.0 if own.get("unseen") == "estimate" else None,
    }
    return {name: old[name] for name, value in now.items() if value is not None and old.get(name, value) != value}
