"""Texts of the command line -> values: what typer has no type for."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from attn_deploy.errors import UsageError
from attn_deploy.session import BATCH, SEQUENCE, DimBounds
from attn_deploy.target import Precision, parse_precision

if TYPE_CHECKING:
    from attn_deploy.verdict import All


def split_values(values: list[str] | None) -> list[str]:
    """Options may be repeated, or hold several values with commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def precisions_of(values: list[str] | None, plan: str | None) -> tuple[Precision, ...]:
    """Those that were named; without any FP32 and INT8, or beside a plan FP32 and what the plan says."""
    named = tuple(parse_precision(p) for p in split_values(values))
    return named or (Precision.FP32, Precision.INT8 if plan is None else Precision.AUTO)


def batch_sizes(text: str) -> list[int]:
    parts = split_values([text])
    if not parts or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise UsageError("batch sizes are not understood", got=text, expected="positive numbers, for example 1,8")
    return [int(p) for p in parts]


def fused_sites(text: str | None) -> int | All | None:
    """`all`, or how many."""
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not text.isdigit() or not int(text):
        raise UsageError("--require-fused is not understood", got=text, expected="all, or a positive number of sites")
    return int(text)


def source_arguments(values: list[str] | None) -> dict[str, Any]:
    """`k=v` pairs; v is a Python literal where it is one, else text."""
    arguments: dict[str, Any] = {}
    for text in values or ():
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError("a source argument is not understood", got=text, expected="NAME=VALUE")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            arguments[key] = {"true": True, "false": False, "none": None}.get(value.lower(), value)
    return arguments


MINIMA = {BATCH: 1, SEQUENCE: 2}
"""The least size of a dynamic dimension unless the user says so: a sequence of one token has nothing to attend to."""


def dynamic_dims(values: list[str] | None) -> dict[str, DimBounds]:
    """`batch`, `sequence`, each with `=MIN:MAX` where it is bounded, or `none` alone; without any, `batch`."""
    given = split_values(values) or [BATCH]
    if given == ["none"]:
        return {}
    dims: dict[str, DimBounds] = {}
    for text in given:
        name, _, bounds = text.partition("=")
        low, _, high = bounds.partition(":")
        try:
            found = DimBounds(int(low or MINIMA.get(name, 1)), int(high) if high else None)
        except ValueError:
            found = DimBounds(0)
        sound = found.min >= 1 and (found.max is None or found.max >= max(2, found.min))
        if name not in MINIMA or name in dims or not sound:
            raise UsageError(
                "the dynamic dimension is not understood", got=text,
                expected="batch and sequence, each once at most and perhaps as batch=MIN:MAX with 1 <= MIN <= MAX and "
                "MAX of at least 2; or none",
            )  # fmt: skip
        dims[name] = found
    return dims


def runtime_options(values: list[str] | None) -> dict[str, str]:
    """`NAME=VALUE` pairs, as text: the runtime reads them."""
    options = {}
    for text in values or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError("a runtime option is not understood", got=text, expected="NAME=VALUE")
        options[name] = value
    return options


def tensorrt_version_of(text: str | None) -> tuple[int, int] | None:
    """`10.3` or `10.3.0` -> (10, 3)."""
    if text is None:
        return None
    parts = text.split(".")
    if not 2 <= len(parts) <= 4 or not all(p.isascii() and p.isdigit() for p in parts):
        raise UsageError("--tensorrt-version is not understood", got=text, expected="MAJOR.MINOR, for example 10.3")
    return int(parts[0]), int(parts[1])
