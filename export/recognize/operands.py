"""What query and key go through between their projection and their product: normalization, rotary embedding, repeated
heads. Each is found by running it on random numbers and comparing with the formula."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import (
    ancestors,
    aten,
    depends_on_data,
    evaluate,
    is_constant,
    is_size,
    is_tensor,
    shape_of,
)
from attn_deploy.export.recognize.layout import MOVES, Layout

TURNS = MOVES | {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.neg.default, aten.to.dtype, aten._to_copy.default,
}  # fmt: skip
"""What a rotary embedding is made of."""


class Spread(StrEnum):
    """How a run-time table [length, columns] gives an entry to every channel."""

    NONE = "as it is"
    HALVES = "once for each half of the channels"
    PAIRS = "once for each of two neighbours"

    def __call__(self, table: Tensor) -> Tensor:
        if self is Spread.HALVES:
            return torch.cat([table, table], -1)
        return table.repeat_interleave(2, -1) if self is Spread.PAIRS else table


@dataclass(frozen=True)
class Table:
    """Cosines or sines that are made at run time, for the length of the sequence."""

    node: Node
    spread: Spread


@dataclass(frozen=True)
class Rotary:
    """source [..., length, head_dim] becomes source * cos + rotated(source) * sin, with cos and sin [length, head_dim].

    `interleaved` rotates pairs of neighbours, else the two halves (Su et al. 2021, equation 34).
    """

    source: Node
    cos: Tensor | Table
    sin: Tensor | Table
    interleaved: bool


def without_scales(node: Node, known: Mapping[str, Tensor]) -> tuple[Node, float]:
    """The node behind multiplications by a number, and their product."""
    factor = 1.0
    while node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        source, other = node.args[:2]
        if isinstance(other, Node) and (shape_of(other) or not is_constant(other, known)):
            break
        if not isinstance(source, Node) or not is_tensor(source) or (isinstance(other, Node) and is_size(other)):
            break
        number = float(evaluate(other, known)) if isinstance(other, Node) else float(other)  # type: ignore[arg-type]
        factor = factor * number if "mul" in str(node.target) else factor / number
        node = source
    return node, factor


def normalized_source(node: Node, known: Mapping[str, Tensor]) -> Node | None:
    """What `node` [..., head_dim] is the unit vectors of; None when it is not."""
    if node.target is not aten.div.Tensor or not all(is_tensor(a) for a in node.args[:2]):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    if source not in set(ancestors(node.args[1], stop=lambda n: n is source)):  # type: ignore[arg-type]
        return None
    values = torch.randn(shape_of(source), generator=torch.Generator().manual_seed(0))
    try:
        found = evaluate(node, {**known, source.name: values})
    except (KeyError, RuntimeError, TypeError):
        return None
    return source if torch.allclose(found, F.normalize(values, dim=-1), atol=1e-6) else None


def rotary_source(node: Node, layout: Layout, known: Mapping[str, Tensor]) -> Rotary | None:
    """The rotary embedding that ends in `node` [batch, heads, length, head_dim]; None when there is none."""
    if len(shape_of(node)) != 4 or node.target not in TURNS or shape_of(node)[-1] % 2:
        return None
    inner = [n for n in ancestors(node, stop=lambda n: _outside(n, known)) if not _outside(n, known)]
    edge = dict.fromkeys(s for n in inner for s in n.all_input_nodes if _outside(s, known) and not is_size(s))
    frontier = [s for s in edge if depends_on_data(s, known)]
    tables = [s for s in edge if s not in frontier and not is_constant(s, known)]
    if len(frontier) != 1 or len(tables) not in (0, 2) or not any(n.target is aten.mul.Tensor for n in inner):
        return None
    for source in inner:
        moved = source.target in MOVES and layout.elements(source).root in frontier
        if moved and is_tensor(source) and shape_of(source) == shape_of(node):
            found = _as_rotation(node, source, known) if not tables else _by_tables(node, source, known, tables)
            if found is not None:
                return found
    return None


def _by_tables(node: Node, source: Node, known: Mapping[str, Tensor], tables: Sequence[Node]) -> Rotary | None:
    """A rotation whose cosines and sines are two run-time tables: tried with random numbers in them."""
    generator = torch.Generator().manual_seed(1)
    values = {table: torch.randn(shape_of(table), generator=generator) for table in tables}
    found = _as_rotation(node, source, {**known, **{table.name: value for table, value in values.items()}})
    if found is None:
        return None
    assert isinstance(found.cos, Tensor)
    assert isinstance(found.sin, Tensor)
    for cos, sin in (tables, tables[::-1]):
        made = _table_like(cos, values[cos], found.cos), _table_like(sin, values[sin], found.sin)
        if made[0] is not None and made[1] is not None:
            return Rotary(source, made[0], made[1], found.interleaved)
    return None


def _table_like(node: Node, value: Tensor, wanted: Tensor) -> Table | None:
    """The table as the one that gives `wanted` [length, head_dim]; None when it does not."""
    if value.numel() not in (wanted.numel(), wanted.numel() // 2):
        return None
    rows = value.reshape(len(wanted), -1)
    for spread in Spread:
        spreaded = spread(rows)
        if spreaded.shape == wanted.shape and torch.allclose(spreaded, wanted, rtol=1e-3, atol=1e-3):
            return Table(node, spread)
    return None


def _outside(node: Node, known: Mapping[str, Tensor]) -> bool:
    return node.target not in TURNS or is_size(node) or not depends_on_data(node, known)


def rotated(x: Tensor, interleaved: bool) -> Tensor:
    """Each pair (a, b) as (-b, a)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _as_rotation(node: Node, source: Node, known: Mapping[str, Tensor]) -> Rotary | None:
    generator = torch.Generator().manual_seed(0)
    probes = [torch.randn(shape_of(source), generator=generator) for _ in range(3)]
    try:
        turned = [evaluate(node, {**known, source.name: p}) for p in probes]
    except (KeyError, RuntimeError, TypeError):
        return None
    for interleaved in (False, True):
        sides = [rotated(p, interleaved) for p in probes]
        determinant = probes[0] * sides[1] - probes[1] * sides[0]
        cos = (turned[0] * sides[1] - turned[1] * sides[0]) / determinant
        sin = (probes[0] * turned[1] - probes[1] * turned[0]) / determinant
        # Of all samples and heads the best conditioned one says cos and sin.
        best = determinant.abs().flatten(0, 1).argmax(0)
        cos, sin = (t.flatten(0, 1).gather(0, best[None])[0] for t in (cos, sin))
        if torch.allclose(probes[2] * cos + sides[2] * sin, turned[2], rtol=1e-4, atol=1e-4):
            return Rotary(source, cos, sin, interleaved)
    return None


def upright(node: Node, transposed: bool) -> tuple[Node, bool]:
    """The node before its last two axes were exchanged, where that is how it came to be transposed."""
    rank = len(shape_of(node))
    if (
        transposed
        and node.target is aten.transpose.int
        and {int(d) % rank for d in node.args[1:]} == {rank - 2, rank - 1}
    ):  # type: ignore[call-overload]
        return node.args[0], False  # type: ignore[return-value]
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if transposed and node.target is aten.permute.default and [int(d) % rank for d in node.args[1]] == swapped:  # type: ignore[union-attr]
        return node.args[0], False  # type: ignore[return-value]
    return node, transposed


def unrepeated(node: Node, layout: Layout) -> tuple[Node, int, bool] | None:
    """Where the heads of `node` [batch, heads, ...] stand several times in a row: the node before they were repeated,
    how many heads that has, and whether its last two axes are exchanged since."""
    if len(shape_of(node)) != 4 or node.target not in MOVES:
        return None
    ids = layout.elements(node).ids
    heads = ids.shape[1]
    for kv_heads in (h for h in range(1, heads) if heads % h == 0):
        first = ids[:, :: heads // kv_heads]
        if torch.equal(first.repeat_interleave(heads // kv_heads, 1), ids):
            source = _before_expansion(node)
            if source is None:
                return None
            kept = layout.elements(source).ids
            if kept.numel() != first.numel():
                return None
            same, exchanged = kept.reshape(first.shape), first.transpose(-2, -1)
            if torch.equal(same, first):
                return source, kv_heads, False
            flipped = torch.equal(kept.reshape(exchanged.shape), exchanged)
            return (source, kv_heads, True) if flipped else None
    return None


def _before_expansion(node: Node) -> Node | None:
    if node.target is aten.repeat_interleave.self_int:
        return node.args[0]  # type: ignore[return-value]
    while node.target is not aten.expand.default:
        sources = [n for n in node.all_input_nodes if is_tensor(n)]
        if node.target not in MOVES or len(sources) != 1:
            return None
        node = sources[0]
    source = node.args[0]
    assert isinstance(source, Node)
    while source.target in (aten.unsqueeze.default, aten.reshape.default, aten.slice.Tensor):
        inner = source.args[0]
        if not isinstance(inner, Node) or math.prod(shape_of(inner)) != math.prod(shape_of(source)):
            break
        source = inner
        if len(shape_of(source)) == 4:
            break
    return source
