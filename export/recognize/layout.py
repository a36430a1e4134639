"""Where the elements of a tensor come from: movement is summed up by running it on numbered elements.

Two views. `elements` follows movement alone (reshape, permute, roll, slice, pad, index) and gives for every element its
place in the tensor that it was moved from. `tokens` also goes past operators that treat every token alike (LayerNorm,
Linear, activations, residual sums): a tensor behind them still holds the tokens of the natural order, in another order,
so that whatever was computed there could be computed in the natural order as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import MOVEMENT, aten, concrete, evaluate, is_constant, is_size, is_tensor, shape_of

MOVES = MOVEMENT | {
    aten.constant_pad_nd.default, aten.pad.default, aten.index.Tensor, aten.index_select.default, aten.expand.default,
    aten.cat.default, aten.stack.default, aten.unfold.default, aten.im2col.default, aten.repeat.default,
    aten.repeat_interleave.self_int, aten.tile.default, aten.rot90.default, aten.channel_shuffle.default,
    aten.flip.default, aten.pixel_shuffle.default, aten.pixel_unshuffle.default,
}  # fmt: skip
"""Operations that move, repeat, drop or pad elements and compute nothing."""

UNARY = frozenset(
    {
        aten.gelu.default, aten.relu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
        aten.hardswish.default, aten.hardsigmoid.default, aten.leaky_relu.default, aten.elu.default, aten.neg.default,
        aten.exp.default, aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sqrt.default, aten.clamp.default,
        aten.clamp_min.default, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
    }
)  # fmt: skip
BINARY = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


@dataclass(frozen=True)
class Elements:
    """`ids` has the node's shape: 1 + the place in the flattened `root`, 0 for padding (a list for nodes that give
    several tensors). Where scales were passed, the node is `factor` times what was moved."""

    root: Node
    ids: Any
    factor: float = 1.0


class Coordinates(Protocol):
    """How the elements of a root are read as tokens with channels: from places in the flattened root."""

    @property
    def channels(self) -> int: ...

    def token(self, places: Tensor) -> Tensor:
        """The token among all tokens of the batch."""

    def channel(self, places: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ChannelsLast:
    """[..., channels]."""

    channels: int

    def token(self, places: Tensor) -> Tensor:
        return places // self.channels

    def channel(self, places: Tensor) -> Tensor:
        return places % self.channels


@dataclass(frozen=True)
class ChannelsFirst:
    """[batch, channels, ...]: tokens are the positions of each sample in turn."""

    channels: int
    positions: int

    def token(self, places: Tensor) -> Tensor:
        return places // (self.channels * self.positions) * self.positions + places % self.positions

    def channel(self, places: Tensor) -> Tensor:
        return places // self.positions % self.channels


@dataclass(frozen=True)
class Tokens:
    """For every token of a [..., channels] node, flattened: its number in natural order, -1 where it is padding.

    `total` is the number of tokens of the natural order over the whole batch. `fill` is the vector that padding holds;
    None where there is no padding or it is not known.
    """

    flat: Tensor
    total: int
    fill: Tensor | None = None

    @property
    def natural(self) -> bool:
        return len(self.flat) == self.total and bool((self.flat == torch.arange(self.total)).all())


class Layout:
    """The two views on one graph, remembered node by node. Attention results that were registered continue the order
    of the tokens that went in."""

    def __init__(self, known: Mapping[str, Tensor]) -> None:
        self._known = known
        self._elements: dict[tuple[Node, bool], Elements] = {}
        self._tokens: dict[Node, Tokens | None] = {}
        self._results: dict[Node, tuple[Coordinates, Tokens]] = {}
        self._through: dict[Node, Node] = {}
        self._read: dict[Node, list[tuple[Coordinates, Tokens]]] = {}
        self._behind: dict[Node, frozenset[Node]] = {}

    def pass_through(self, node: Node, source: Node) -> None:
        """`node` has `source`'s shape and treats each head vector of it by itself: `elements` may look through it."""
        self._through[node] = source

    def register_result(self, result: Node, coordinates: Coordinates, tokens: Tokens) -> None:
        """The result of an attention whose row r holds the token `tokens.flat[r]`."""
        self._results[result] = (coordinates, tokens)
        self._behind[result] = frozenset({result})

    def results_behind(self, node: Node) -> frozenset[Node]:
        """The registered results from which the node's value in the natural order is made."""
        if node not in self._behind:
            self._behind[node] = frozenset(r for n in self._made_of(node) for r in self.results_behind(n))
        return self._behind[node]

    def _made_of(self, node: Node) -> list[Node]:
        if node.target in MOVES:
            root = self.elements(node).root
            return [] if root is node else [root]
        if node in self._results or self.tokens(node) is None:
            return []
        return [n for n in self.followed(node) if isinstance(n, Node)]

    # Movement

    def elements(self, node: Node, *, through_scales: bool = False) -> Elements:
        """Where the node's elements come from. With `through_scales` factors and passed nodes do not end the way."""
        found = self._elements.get((node, through_scales))
        if found is None:
            found = self._moved(node, through_scales) or _numbered(node)
            self._elements[node, through_scales] = found
        return found

    def _moved(self, node: Node, through: bool) -> Elements | None:
        if through:
            factor = _scalar_factor(node, self._known)
            if factor is not None:
                inner = self.elements(node.args[0], through_scales=True)  # type: ignore[arg-type]
                return Elements(inner.root, inner.ids, inner.factor * factor)
            if node in self._through:
                return self.elements(self._through[node], through_scales=True)
        if node.target not in MOVES or _pads_with_a_number(node) or _along_dynamic_axis(node):
            return None
        sources = [n for n in node.all_input_nodes if not is_size(n)]
        if node.target in (aten.index.Tensor, aten.index_select.default):
            sources = [n for n in sources if not is_constant(n, self._known)]
        if not all(is_tensor(n) or n.target in MOVES for n in sources):  # one of several results of some computation
            return None
        parts = {source: self.elements(source, through_scales=through) for source in sources}
        if len({(p.root, p.factor) for p in parts.values()}) != 1:
            return None
        first = next(iter(parts.values()))
        ids = self._run(node, {source: part.ids for source, part in parts.items()})
        return None if ids is None else Elements(first.root, ids, first.factor)

    def _run(self, node: Node, ids: Mapping[Node, Any]) -> Any:
        def value(n: Node) -> Any:
            if n in ids:
                return ids[n]
            return concrete(n.meta["val"]) if is_size(n) else evaluate(n, self._known)

        args = torch.fx.map_arg(node.args, value)
        kwargs = torch.fx.map_arg(node.kwargs, value)
        assert callable(node.target)
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, NotImplementedError):  # im2col takes floats alone; float64 holds the numbers exactly
            as_floats = torch.fx.map_arg(node.args, lambda n: value(n).double() if n in ids else value(n))
            try:
                return node.target(*as_floats, **kwargs).long()
            except (RuntimeError, NotImplementedError):
                return None

    # Tokens

    def placed(self, node: Node) -> Tokens:
        """The tokens of a [..., channels] node: its own order is the natural one unless it comes from another."""
        return self.tokens(node) or self._own(node)

    def tokens(self, node: Node) -> Tokens | None:
        """None where the node's own order is the natural one."""
        if node not in self._tokens:
            self._tokens[node] = None  # ends a search that comes back here
            found = self._find_tokens(node)
            self._tokens[node] = None if found is None or found.natural else found
        return self._tokens[node]

    def leaves(self, node: Node) -> str | None:
        """Where movement restores the natural order: `last` or `first`, the place of the channels; else None."""
        if not is_tensor(node) or sum(not isinstance(d, int) for d in node.meta["val"].shape) > 1:
            return None
        for place in ("last", "first"):
            found = self._through_movement(node, place)
            if found is not None and found.natural:
                return place
        return None

    def reads_channels_first(self, node: Node) -> bool:
        """True when a moved node's tokens were read off a root that is [batch, channels, ...]."""
        found = self.elements(node)
        ids = found.ids.reshape(-1, found.ids.shape[-1])
        ids = ids[ids[:, 0] != 0]
        coordinates = [c for c, _ in self.systems(found.root)]
        return _whole_rows(coordinates[0], ids) is None

    def _own(self, node: Node) -> Tokens:
        rows = math.prod(shape_of(node)[:-1])
        return Tokens(torch.arange(rows), rows)

    def _find_tokens(self, node: Node) -> Tokens | None:
        if not is_tensor(node) or len(shape_of(node)) < 2:
            return None
        if node.target in MOVES:
            return self._through_movement(node, "last")
        return self._past(node, self.followed(node))

    def followed(self, node: Node) -> tuple[Any, ...]:
        """The operands that hold the tokens of an operator that treats every token alike; none for any other."""
        if node.target in BINARY:
            return tuple(a for a in node.args if not self._per_channel(a))
        by_channels = (
            node.target in UNARY
            or node.target is aten.linear.default
            or (node.target is aten.layer_norm.default and len(node.args[1]) == 1)  # type: ignore[arg-type]
            or (
                node.target is aten.mean.dim
                and node.args[1] in ([-1], [len(shape_of(node)) - 1])
                and node.args[2:] == (True,)
            )
        )
        return node.args[:1] if by_channels else ()

    def _per_channel(self, operand: Any) -> bool:
        """A number, or a constant that is the same for every token."""
        if not isinstance(operand, Node):
            return True
        return is_tensor(operand) and is_constant(operand, self._known) and all(d == 1 for d in shape_of(operand)[:-1])

    def _past(self, node: Node, operands: tuple[Any, ...]) -> Tokens | None:
        """An operator that treats every token alike: the order of its operands, if they agree on one."""
        found = [self.tokens(o) if isinstance(o, Node) else None for o in operands]
        first = found[0] if found else None
        if first is None or any(
            f is None or f.total != first.total or not torch.equal(f.flat, first.flat) for f in found
        ):
            return None
        lead = shape_of(node)[:-1]
        if any(shape_of(o)[:-1] != lead for o in operands):  # tokens of one against tokens of the other
            return None
        if not (first.flat < 0).any() or any(f is None or f.fill is None for f in found):
            return Tokens(first.flat, first.total)
        values: dict[str, Any] = dict(self._known)
        for operand, tokens in zip(operands, found, strict=True):
            assert tokens is not None
            assert tokens.fill is not None
            values[operand.name] = tokens.fill.reshape([1] * len(lead) + [-1])
        return Tokens(first.flat, first.total, evaluate(node, values).reshape(-1))

    def _through_movement(self, node: Node, place: str) -> Tokens | None:
        if node.target not in MOVES:
            return None
        found = self.elements(node)
        if found.root is node or not isinstance(found.ids, Tensor):
            return None
        if found.ids.dim() < 2:
            return None
        ids = found.ids if place == "last" else found.ids.movedim(1, -1)
        ids = ids.reshape(-1, ids.shape[-1])
        padding = ids[:, 0] == 0
        if not torch.equal(padding[:, None].expand_as(ids), ids == 0):
            return None
        for coordinates, base in self.systems(found.root):
            rows = _whole_rows(coordinates, ids[~padding])
            if rows is None:
                continue
            flat = torch.full((len(ids),), -1, dtype=torch.int64)
            flat[~padding] = base.flat[rows]
            fill = base.fill if (base.flat < 0).any() else torch.zeros(coordinates.channels)
            mixed = bool(padding.any()) and bool((base.flat < 0).any())
            return None if mixed else Tokens(flat, base.total, fill)
        return None

    def systems(self, root: Node) -> list[tuple[Coordinates, Tokens]]:
        """The ways to read a root as tokens with channels, and which tokens they count."""
        if root in self._results:
            return [self._results[root]]
        if root not in self._read:
            self._read[root] = list(self._readings(root))
        return self._read[root]

    def _readings(self, root: Node) -> Iterator[tuple[Coordinates, Tokens]]:
        if not is_tensor(root) or len(shape_of(root)) < 2:
            return
        shape = shape_of(root)
        yield ChannelsLast(shape[-1]), self.placed(root)
        if len(shape) >= 3 and self.tokens(root) is None:
            positions = math.prod(shape[2:])
            total = shape[0] * positions
            yield ChannelsFirst(shape[1], positions), Tokens(torch.arange(total), total)


def _pads_with_a_number(node: Node) -> bool:
    """Padding with anything but zeros or the tensor's own elements."""
    if node.target is aten.constant_pad_nd.default:
        return any(node.args[2:])
    return node.target is aten.pad.default and node.args[2:3] in ((), ("constant",)) and any(node.args[3:])


def _along_dynamic_axis(node: Node) -> bool:
    """Movement by fixed steps along the batch: at another batch size it is another one."""
    if node.target in (aten.roll.default, aten.flip.default):
        dims: Any = node.args[-1] if len(node.args) > 2 or node.target is aten.flip.default else None
    elif node.target in (aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.unfold.default):
        dims = [node.args[1] if len(node.args) > 1 else 0]
    elif node.target is aten.index.Tensor:
        dims = [i for i, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
    else:
        return False
    source, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if node.target is aten.slice.Tensor and str(source) == str(after) and len(node.args) < 5:
        return False
    return any(not isinstance(source[d], int) for d in (range(len(source)) if dims is None else dims))


def _numbered(node: Node) -> Elements:
    shape = shape_of(node) if is_tensor(node) else (1,)
    return Elements(node, torch.arange(1, math.prod(shape) + 1).reshape(shape))


def _whole_rows(coordinates: Coordinates, ids: Tensor) -> Tensor | None:
    """The token of every row of [rows, channels] element numbers, where each row is one token with all its channels in
    order."""
    if ids.shape[1] != coordinates.channels:
        return None
    first = ids[:, 0] - 1
    if bool(coordinates.channel(first).any()):
        return None
    tokens = coordinates.token(first)
    if isinstance(coordinates, ChannelsLast | ChannelsFirst):  # channels stand at equal distances
        step = 1 if isinstance(coordinates, ChannelsLast) else coordinates.positions
        steps = torch.arange(1, step * coordinates.channels + 1, step)
        return tokens if torch.equal(ids, first[:, None] + steps) else None
    places = ids - 1
    in_order = torch.equal(coordinates.channel(places), torch.arange(ids.shape[1]).expand_as(ids))
    return tokens if in_order and torch.equal(coordinates.token(places), tokens[:, None].expand_as(ids)) else None


def _scalar_factor(node: Node, known: Mapping[str, Tensor]) -> float | None:
    """The number by which the node multiplies its first operand; None for anything else."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return None
    source, factor = node.args[:2]
    if not isinstance(source, Node) or not is_tensor(source):
        return None
    if isinstance(factor, Node):
        if not is_tensor(factor) or math.prod(shape_of(factor)) != 1 or not is_constant(factor, known):
            return None
        factor = float(evaluate(factor, known))
    assert isinstance(factor, (int, float))
    return float(factor) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / float(factor)


__all__ = ["MOVES", "ChannelsFirst", "ChannelsLast", "Coordinates", "Elements", "Layout", "Tokens"]
