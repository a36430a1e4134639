"""Where the tokens of query, key and value stand: heads, windows, and the index map into the natural order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import shape_of
from attn_deploy.export.recognize.layout import ChannelsFirst, Layout, Tokens


@dataclass(frozen=True)
class Part:
    """Query, key or value as matrices over a root: row [matrices, length] and channel [matrices, head_dim] of each of
    its vectors; row -1 is padding. `factor` is what it was multiplied by on the way."""

    root: Node
    base: Tokens
    rows: Tensor
    channels: Tensor
    root_channels: int
    factor: float
    channels_first: bool


@dataclass(frozen=True)
class Place:
    """A self-attention as windows of tokens.

    `sources` hold query, key and value: one node [..., 3 * heads * head_dim], or three of a third of it; with
    `channels_first` they are [batch, channels, ...]. `order` gives for (part, head, dim) the channel in them, joined;
    None when it is the packed order already. `index` [windows, length] numbers the tokens of one sample, of which there
    are `tokens`; -1 is padding, which reads `fill` [3 * heads * head_dim]. `natural` says that the numbers are those of
    the natural order (see Layout), not of the sources' own.
    """

    sources: tuple[Node, ...]
    heads: int
    head_dim: int
    order: Tensor | None
    index: Tensor
    tokens: int
    fill: Tensor | None
    factor: float
    natural: bool
    channels_first: bool = False

    @property
    def windowed(self) -> bool:
        """False when every token sees all tokens of its sample, in their order."""
        return not torch.equal(self.index.flatten(), torch.arange(self.tokens)) or len(self.index) != 1


def read_part(layout: Layout, node: Node, transposed: bool) -> Part | None:
    """`node` is [..., length, head_dim], or [..., head_dim, length] when `transposed`. None when its elements do not
    separate into tokens and channels."""
    found = layout.elements(node, through_scales=True)
    ids = found.ids.transpose(-2, -1) if transposed else found.ids
    ids = ids.reshape(-1, *ids.shape[-2:])
    padding = (ids == 0).all(2)
    for coordinates, base in layout.systems(found.root):
        token, channel = coordinates.token(ids - 1), coordinates.channel(ids - 1)
        seen = ~padding[..., None].expand_as(ids)
        if not torch.equal(seen, ids != 0):
            return None
        rows, channels = token[..., :1], _first_seen(channel, padding)
        if ((token == rows) | ~seen).all() and ((channel == channels[:, None]) | ~seen).all():
            rows = torch.where(padding, -1, rows[..., 0])
            first = isinstance(coordinates, ChannelsFirst)
            return Part(found.root, base, rows, channels, coordinates.channels, found.factor, first)
    return None


def _first_seen(channel: Tensor, padding: Tensor) -> Tensor:
    """Of [matrices, length, head_dim] the channels of the first row of each matrix that is no padding."""
    first = (~padding).int().argmax(1)
    return channel[torch.arange(len(channel)), first]


def head_count(part: Part) -> int | None:
    """Heads, when matrix number m is head m % heads: the period of the channels. None when there is no period."""
    channels = part.channels
    for heads in range(1, min(len(channels), part.root_channels) + 1):
        if len(channels) % heads == 0 and torch.equal(channels, channels[:heads].repeat(len(channels) // heads, 1)):
            return heads if len(torch.unique(channels[:heads], dim=0)) == heads else None
    return None


def place(parts: Sequence[Part], batch: int, *, natural: bool) -> Place | None:
    """Query, key and value as windows of one packed tensor; None when they are not. `natural`: in the natural order of
    the tokens, else in the order of the tensors that hold them."""
    heads = head_count(parts[0])
    query = parts[0]
    if heads is None or any(not torch.equal(p.rows, query.rows) for p in parts[1:]):
        return None
    head_dim = query.channels.shape[1]
    rows = query.rows.reshape(-1, heads, query.rows.shape[1])
    if any(p.channels.shape != query.channels.shape for p in parts) or (rows != rows[:, :1]).any():
        return None
    sources, order = _sources(parts, heads, head_dim)
    if sources is None:
        return None
    flat, total, fill = _numbers(parts, rows[:, 0], natural=natural)
    if flat is None or total % batch or len(flat) % batch:
        return None
    tokens = total // batch
    windows = flat.reshape(batch, -1, flat.shape[1])
    shifts = torch.arange(batch)[:, None, None] * tokens
    if not torch.equal(windows, torch.where(windows < 0, -1, windows[:1] + shifts)):
        return None
    index = windows[0]
    used = index[index >= 0]
    if len(torch.unique(used)) != len(used) or (used >= tokens).any():
        return None
    if (index < 0).any() and fill is None:
        return None
    if parts[2].factor != 1.0 or len({p.channels_first for p in parts}) != 1:
        return None
    factor = query.factor * parts[1].factor
    return Place(
        sources, heads, head_dim, order, index, tokens, fill, factor, natural, parts[0].channels_first
    )  # fmt: skip


def _sources(parts: Sequence[Part], heads: int, head_dim: int) -> tuple[tuple[Node, ...] | None, Tensor | None]:
    """The nodes that hold query, key and value, and where in them each channel is."""
    roots = list(dict.fromkeys(p.root for p in parts))
    if len(roots) not in (1, 3):
        return None, None
    size = heads * head_dim
    if any(p.root_channels != size * (3 if len(roots) == 1 else 1) for p in parts):
        return None, None
    offsets = [0, 0, 0] if len(roots) == 1 else [0, size, 2 * size]
    order = torch.cat([p.channels[:heads].flatten() + o for p, o in zip(parts, offsets, strict=True)])
    if not torch.equal(order.sort().values, torch.arange(3 * size)):
        return None, None
    return tuple(roots), None if torch.equal(order, torch.arange(3 * size)) else order


def _numbers(parts: Sequence[Part], rows: Tensor, *, natural: bool) -> tuple[Tensor | None, int, Tensor | None]:
    """Token numbers [windows of the batch, length], how many there are, and what padding holds, all parts joined."""
    bases = [p.base for p in parts]
    base = bases[0]
    if not natural:
        shape = shape_of(parts[0].root)
        return rows, math.prod(shape) // parts[0].root_channels, torch.zeros(_joined(parts))
    if any(b.total != base.total or not torch.equal(b.flat, base.flat) for b in bases[1:]):
        return None, 0, None
    flat = torch.where(rows < 0, -1, base.flat[rows])
    if not (flat < 0).any():
        return flat, base.total, None
    if (rows < 0).any():  # padded behind the projection, perhaps before it as well: only zeros are sure
        return (None, 0, None) if (base.flat < 0).any() else (flat, base.total, torch.zeros(_joined(parts)))
    fills = list({p.root: p.base.fill for p in parts}.values())
    if any(f is None for f in fills):
        return None, 0, None
    return flat, base.total, torch.cat([f for f in fills if f is not None])


def _joined(parts: Sequence[Part]) -> int:
    return sum({p.root: p.root_channels for p in parts}.values())


@dataclass(frozen=True)
class ResultCoordinates:
    """An attention's result [..., length, head_dim] whose matrix m is head m % heads; with `transposed` it is
    [..., head_dim, length]. Tokens count windows of the batch, then places in the window."""

    heads: int
    length: int
    head_dim: int
    transposed: bool

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    def token(self, places: Tensor) -> Tensor:
        matrix, inner = places // (self.length * self.head_dim), places % (self.length * self.head_dim)
        return matrix // self.heads * self.length + (inner % self.length if self.transposed else inner // self.head_dim)

    def channel(self, places: Tensor) -> Tensor:
        matrix, inner = places // (self.length * self.head_dim), places % (self.length * self.head_dim)
        dim = inner // self.length if self.transposed else inner % self.head_dim
        return matrix % self.heads * self.head_dim + dim
