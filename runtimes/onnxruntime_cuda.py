"""Being written."""

from __future__ import annotations


def availability() -> str | None:
    return "being written"
