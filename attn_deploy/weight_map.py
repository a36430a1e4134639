"""The weights of one attention site -> numbers over the image, a table, or bars.

What is shown follows from the operator:
- attention over tokens: the weight that each token receives as a key, mean over the heads; from the class token where
  the tokens are a grid and some more (the first is taken for the class token), else mean over all queries;
- the same in windows, put together to the whole image by the site's index map; without one the windows lie side by
  side in the model's order;
- a gate per pixel: its map; a gate per channel: a bar for each channel in its order; a full gate: mean over channels;
- a pool weighted by a softmax over tokens, and a choice of tokens: the map of the tokens; attention between channels
  or branches: a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MOST_PREFIX_TOKENS = 8
"""Class, distillation and register tokens that may stand before a grid."""


class Layout(Enum):
    IMAGE = auto()
    """[rows, columns] over the whole image."""
    TABLE = auto()
    """[rows, columns] that lie on no image."""
    BARS = auto()
    """[count]"""


@dataclass(frozen=True)
class WeightMap:
    """`shows` says in words what the numbers are."""

    values: Array
    shows: str
    layout: Layout


def weight_map(
    operator: str, weights: Array, index: Array | None, size: tuple[int, int] | None, batch: int
) -> WeightMap:
    """Of the first of `batch` samples. `weights` are a softmax's with its axis last, a gate as it multiplies, or 1 for
    each token chosen; `index` [windows, length] is the site's index map; `size` is the image's (height, width), None
    where the tokens are known to lie on no grid."""
    if operator == "Gate":
        return _gate(weights[0], size)
    if operator == "ChannelAttention":  # [batch, heads, head_dim, head_dim]
        return WeightMap(weights[0].mean(0), "weights between the channels of a head, mean over heads", Layout.TABLE)
    if operator == "BranchPool":  # [batch, channels, height, width, branches]
        return WeightMap(weights[0].mean((1, 2)).T, "weight of each branch (rows) by channel", Layout.TABLE)
    if operator not in ("Attention", "PackedAttention"):
        shows = "tokens chosen" if operator == "HardAttention" else "weight of each token"
        return _on_grid(weights[0].reshape(-1, weights.shape[-1]).mean(0), size, shows)
    if index is not None:  # [batch, windows, heads, length, length]
        received = _scattered(weights[0].mean((1, 2)), index)
        return _on_grid(received, size, "weight received within its window, mean over queries and heads")
    if weights.shape[0] > batch:  # windows merged into the batch: [batch * windows, heads, length, length]
        return _side_by_side(weights[: len(weights) // batch].mean((1, 2)))
    by_query = weights[0].mean(0)
    grid = token_grid(by_query.shape[1], *size) if size is not None else None
    if grid is not None and grid[0]:
        return _on_grid(by_query[0], size, "weight received from the class token, mean over heads")
    return _on_grid(by_query.mean(0), size, "weight received, mean over queries and heads")


def token_grid(tokens: int, height: int, width: int) -> tuple[int, int, int] | None:
    """(tokens before the grid, rows, columns) of the grid of square cells over [height, width] with as few tokens
    before it as possible; None when there is no such grid."""
    for prefix in range(min(MOST_PREFIX_TOKENS, tokens - 1) + 1):
        count = tokens - prefix
        rows = math.isqrt(count * height // width)
        columns = count // rows if rows else 0
        if rows * columns == count and rows * width == columns * height and rows <= height:
            return prefix, rows, columns
    return None


def _on_grid(values: Array, size: tuple[int, int] | None, shows: str) -> WeightMap:
    grid = token_grid(len(values), *size) if size is not None else None
    if grid is None:
        return WeightMap(values, f"{shows}, by token", Layout.BARS)
    return WeightMap(values[grid[0] :].reshape(grid[1:]), shows, Layout.IMAGE)


def _scattered(values: Array, index: Array) -> Array:
    """values [windows, length] at their tokens, index -1 left out; the mean where a token is in several windows."""
    inside = index >= 0
    total, count = np.zeros((2, int(index.max()) + 1))
    np.add.at(total, index[inside], values[inside])
    np.add.at(count, index[inside], 1.0)
    return np.asarray(total / np.maximum(count, 1.0))


def _side_by_side(windows: Array) -> WeightMap:
    """windows [windows, length]: each a square where its length is one."""
    count, length = windows.shape
    side = math.isqrt(length)
    rows, columns = (side, side) if side * side == length else (1, length)
    down = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    table = windows.reshape(down, count // down, rows, columns).transpose(0, 2, 1, 3).reshape(down * rows, -1)
    shows = "weight received in each window, mean over queries and heads, windows in the model's order"
    return WeightMap(table, shows, Layout.TABLE)


def _gate(gate: Array, size: tuple[int, int] | None) -> WeightMap:
    """gate [channels, height, width], or [tokens, channels]; it is shared along dimensions of 1."""
    if gate.ndim == 3 and gate.shape[1:] != (1, 1):
        shows = "gate of each pixel" + (", mean over channels" if gate.shape[0] > 1 else "")
        return WeightMap(gate.mean(0), shows, Layout.IMAGE)
    if gate.ndim == 2 and gate.shape[0] > 1:
        return _on_grid(gate.mean(1), size, "gate of each token, mean over channels")
    return WeightMap(gate.reshape(-1), "gate of each channel, in their order", Layout.BARS)
