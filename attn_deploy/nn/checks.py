"""Checks of constructor arguments and inputs: a ValueError says what, what was got, and what was expected."""

from __future__ import annotations

from torch import Tensor


def require(holds: bool, what: str, *, got: object, expected: str) -> None:
    """Raises ValueError when `holds` is false."""
    if not holds:
        raise ValueError(f"{what}: got {got}, expected {expected}")


def require_positive(**sizes: int) -> None:
    """Each size, by the name of its argument, is 1 or more."""
    for name, size in sizes.items():
        require(size >= 1, name, got=size, expected="1 or more")


def require_dropout(dropout: float) -> None:
    require(0.0 <= dropout < 1.0, "dropout", got=dropout, expected="a probability from 0 to below 1")


def require_tokens(x: Tensor, dim: int, name: str) -> None:
    """`x` is [batch, tokens, dim]."""
    require(x.dim() == 3 and x.shape[2] == dim, name, got=list(x.shape), expected=f"[batch, tokens, {dim}]")


def require_map(x: Tensor, channels: int | None = None) -> None:
    """`x` is [batch, channels, height, width]; None takes any number of channels."""
    fits = x.dim() == 4 and (channels is None or x.shape[1] == channels)
    named = "channels" if channels is None else channels
    require(fits, "feature map", got=list(x.shape), expected=f"[batch, {named}, height, width]")


def reduced(channels: int, reduction: int) -> int:
    """Width of a bottleneck: channels / reduction, rounded down."""
    require_positive(channels=channels, reduction=reduction)
    require(reduction <= channels, "reduction", got=reduction, expected=f"at most the {channels} channels")
    return channels // reduction
