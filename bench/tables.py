"""Parts of the pages below bench/results/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def against(value: float, goal: float | None, digits: int = 2) -> str:
    """A figure with its goal behind it, bold where it is reached."""
    if goal is None:
        return f"{value:.{digits}f}"
    text = f"{value:.{digits}f}"
    return f"**{text}** ({goal:.{digits}f})" if value >= goal else f"{text} ({goal:.{digits}f})"


def taken(models: dict[str, Any]) -> str:
    """From when to when the cases of all models were measured."""
    times = sorted(case["taken"] for model in models.values() for case in model.values())
    return times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"


def share_of_ceiling(flops: float, p50_ms: float, ceilings: Sequence[float | None], unit: str) -> str:
    """Of the higher of the ceilings before and after; empty without any."""
    known = [c for c in ceilings if c]
    return f"{flops / p50_ms / 1e6 / max(known):.0%} of {max(known):.0f} {unit}" if known else ""
