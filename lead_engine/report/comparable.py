"""Whether evaluations are of the same held-out records and tokens, so that their losses compare."""

from __future__ import annotations

from typing import Any

from lead_engine.base import fingerprint


def not_comparable(results: dict[str, dict[str, Any]]) -> list[str]:
    """Warnings about evaluations on other records than the first one's, or on other tokens of the same records."""
    warnings: list[str] = []
    if not results:
        return warnings
    first_name, first = next(iter(results.items()))
    for name, result in list(results.items())[1:]:
        found = fingerprint.differences(_sources(first), _sources(result), f"for {first_name}", "here")
        found = found or _other_counts(first, result, first_name)
        if found:
            what = f"{name}: evaluated on other held-out records than {first_name}"
            warnings.append(f"{what} ({'; '.join(found)}); losses do not compare")
    return warnings


def _sources(result: dict[str, Any]) -> dict[str, Any]:
    """What an evaluation noted of its held-out files."""
    return {"sources": result.get(fingerprint.KEY, {}).get("sources")}


def _other_counts(first: dict[str, Any], result: dict[str, Any], first_name: str) -> list[str]:
    """If --max-length, --skip-bad or the tokenizer made other tokens of the same records: how many there are."""
    before, now = _counts(first), _counts(result)
    if before == now:
        return []
    return [f"records and response tokens: {_sums(before)} for {first_name}, {_sums(now)} here"]


def _counts(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Samples and tokens of each task."""
    return {task: (each["samples"], each["tokens"]) for task, each in result["loss"]["tasks"].items()}


def _sums(counts: dict[str, tuple[int, int]]) -> str:
    samples = sum(samples for samples, _ in counts.values())
    tokens = sum(tokens for _, tokens in counts.values())
    return f"{samples:,} and {tokens:,}"
