"""Names of the levels that a part of a model can run at: stock, site, linear, block; with `-int8`, its linear layers in
8 bits."""

from __future__ import annotations

_INT8 = "-int8"


def in_int8(level: str) -> str:
    return level + _INT8


def is_int8(level: str) -> bool:
    return level.endswith(_INT8)


def floating(level: str) -> str:
    """The level without its precision."""
    return level.removesuffix(_INT8)
