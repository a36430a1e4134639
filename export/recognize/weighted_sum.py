"""A sum weighted by a softmax: what it weights, and along which axes.

A product with a sum behind it, a matrix product and an einsum are read alike, as a sum over some axes of one index
space: of `[..., m, k] @ [..., k, n]` the index space is [..., m, k, n], and k is summed. That the softmax is over
exactly what is summed is seen by numbering its elements and moving them as the graph does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import MOVEMENT, ancestors, aten, evaluate, is_constant, is_tensor, shape_of

SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
MATRIX_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
PRODUCTS = MATRIX_PRODUCTS | {aten.mul.Tensor, aten.einsum.default}
MOVES = MOVEMENT | {aten.expand.default}


@dataclass(frozen=True)
class Operand:
    """A tensor in an index space: its dimension i runs along axis axes[i], or is 1 and the same all along it."""

    node: Node
    axes: tuple[int, ...]

    def spans(self, axis: int) -> bool:
        """True when the operand has more than one element along the axis."""
        return axis in self.axes and shape_of(self.node)[self.axes.index(axis)] > 1

    def stored_axes(self) -> tuple[int, ...]:
        """The axes in the order that the tensor had before it was permuted, as it lies in memory."""
        node, axes = self.node, list(self.axes)
        while node.target in (aten.permute.default, aten.transpose.int):
            source = node.args[0]
            assert isinstance(source, Node)
            order = range(len(axes))
            if node.target is aten.permute.default:
                dims = [order[d] for d in node.args[1]]  # type: ignore[union-attr, index]
            else:
                first, second = (order[d] for d in node.args[1:3])  # type: ignore[index]
                dims = [second if d == first else first if d == second else d for d in order]
            axes = [axes[dims.index(d)] for d in order]
            node = source
        return tuple(axes)


@dataclass(frozen=True)
class WeightedSum:
    """result = sum over the axes `summed` of weights * values.

    `moves` lead from the softmax to the weights, and would lead from its scores to the weights' scores.
    `sizes` is the index space at the example batch; `batch` the axis of the batch.
    """

    softmax: Node
    moves: tuple[Node, ...]
    weights: Operand
    values: Operand
    sizes: tuple[int, ...]
    summed: tuple[int, ...]
    batch: int
    result: Node

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes of the result, in its order; it may also have dimensions of 1 for the summed ones."""
        return tuple(a for a in range(len(self.sizes)) if a not in self.summed)

    @property
    def shared(self) -> tuple[int, ...]:
        """Kept axes that weights and values both span, and the batch's."""
        both = (a for a in self.kept if self.weights.spans(a) and self.values.spans(a))
        return tuple(sorted({self.batch, *both}))

    @property
    def groups(self) -> tuple[int, ...]:
        """Kept axes of the weights alone: each place has weights of its own for the same values."""
        return tuple(a for a in self.kept if self.weights.spans(a) and not self.values.spans(a) and a != self.batch)

    @property
    def channels(self) -> tuple[int, ...]:
        """Kept axes of the values alone: all places have the same weights."""
        return tuple(a for a in self.kept if self.values.spans(a) and not self.weights.spans(a) and a != self.batch)


def is_softmax(node: Node) -> bool:
    """True for a softmax in float32 (a half-precision one has other numbers than our operators)."""
    if node.target not in SOFTMAX or len(shape_of(node)) < 2:
        return False
    scores = node.args[0]
    assert isinstance(scores, Node)
    return bool(node.meta["val"].dtype == scores.meta["val"].dtype == torch.float32)


def softmax_axis(node: Node) -> int:
    axis = node.args[1]
    assert isinstance(axis, int)
    return axis % len(shape_of(node))


def products_of(node: Node, moves: tuple[Node, ...] = ()) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """Every product, of matrices or elements, that `node` reaches by movement alone, and the moves that lead there."""
    for user in node.users:
        if user.target in MOVES and user.args[0] is node and not user.kwargs:
            yield from products_of(user, (*moves, user))
        elif user.target in PRODUCTS:
            yield user, moves


def weighted_sums(softmax: Node) -> Iterator[WeightedSum]:
    """Every sum over other values that the softmax weights; what it weights otherwise is left out."""
    for product, moves in products_of(softmax):
        weights = moves[-1] if moves else softmax
        for found in _sums(product, weights):
            candidate = _without_expansion(WeightedSum(softmax, moves, *found))
            if _covers(candidate) and softmax not in ancestors(candidate.values.node):
                yield candidate


_Sum = tuple[Operand, Operand, tuple[int, ...], tuple[int, ...], int, Node]


def _sums(product: Node, weights: Node) -> Iterator[_Sum]:
    """Weights, values, sizes, summed axes, batch axis and result, for every sum that the product takes part in."""
    operands = product.args[1] if product.target is aten.einsum.default else product.args[:2]
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2 or not all(is_tensor(o) for o in operands) or operands[0] is operands[1]:
        return
    space = _index_space(product, *operands)
    if space is None:
        return
    axes, sizes, summed = space
    first, second = (Operand(n, a) for n, a in zip(operands, axes, strict=True))
    if first.node is not weights:
        first, second = second, first
    if product.target is aten.mul.Tensor:
        rank = len(sizes)
        ends = [(u, _summed_axes(u, rank)) for u in product.users if u.target is aten.sum.dim_IntList]
    else:
        ends = [(product, summed)]
    for result, axes_summed in ends:
        batch = _batch_axis(second, axes_summed)
        if batch is not None:
            yield first, second, sizes, axes_summed, batch, result


_Axes = tuple[int, ...]


def _index_space(product: Node, first: Node, second: Node) -> tuple[tuple[_Axes, _Axes], _Axes, _Axes] | None:
    """The axes of both operands, the size of each axis, and the axes that the product itself sums over."""
    ranks, rank = (len(shape_of(first)), len(shape_of(second))), len(shape_of(product))
    if product.target is aten.mul.Tensor:
        return (tuple(range(rank - ranks[0], rank)), tuple(range(rank - ranks[1], rank))), shape_of(product), ()
    if product.target is aten.einsum.default:
        return _letters(str(product.args[0]).replace(" ", ""), first, second)
    if min(ranks) < 2:
        return None
    rows = rank - 2
    axes = (*range(rank - ranks[0], rows), rows, rows + 1), (*range(rank - ranks[1], rows), rows + 1, rows + 2)
    return axes, (*shape_of(product)[:-1], shape_of(first)[-1], shape_of(product)[-1]), (rows + 1,)


def _letters(equation: str, first: Node, second: Node) -> tuple[tuple[_Axes, _Axes], _Axes, _Axes] | None:
    """Of an einsum: an axis for every letter, those of the result first, in its order."""
    names, arrow, result = equation.partition("->")
    one, other = names.split(",")
    if not arrow or "." in equation or len(set(one)) < len(one) or len(set(other)) < len(other):
        return None
    order = list(dict.fromkeys(result + one + other))
    size = dict(zip(one + other, shape_of(first) + shape_of(second), strict=True))
    axes = tuple(map(order.index, one)), tuple(map(order.index, other))
    return axes, tuple(size[n] for n in order), tuple(range(len(result), len(order)))


def _summed_axes(node: Node, rank: int) -> tuple[int, ...]:
    dims = node.args[1]
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return tuple(sorted(int(d) % rank for d in listed))  # type: ignore[arg-type]


def _batch_axis(values: Operand, summed: tuple[int, ...]) -> int | None:
    """The axis of a dynamic batch, of a fixed one the first that is kept; None when it is summed or there are two."""
    dims = values.node.meta["val"].shape
    symbolic = [axis for axis, size in zip(values.axes, dims, strict=True) if isinstance(size, torch.SymInt)]
    if not symbolic:
        return next((a for a in values.axes if a not in summed), None)
    return symbolic[0] if len(symbolic) == 1 and symbolic[0] not in summed else None


def _without_expansion(found: WeightedSum) -> WeightedSum:
    """The weights before they were expanded to the size of the values."""
    moves, weights = found.moves, found.weights
    while moves and moves[-1].target is aten.expand.default:
        source = moves[-1].args[0]
        assert isinstance(source, Node)
        weights = Operand(source, weights.axes[len(weights.axes) - len(shape_of(source)) :])
        moves = moves[:-1]
    return WeightedSum(
        found.softmax, moves, weights, found.values, found.sizes, found.summed, found.batch, found.result
    )


def _covers(found: WeightedSum) -> bool:
    """True when each sum takes every weight of one group of the softmax exactly once, and each sample its own."""
    if not found.weights.spans(found.batch) and found.sizes[found.batch] > 1:
        return False
    if any(a not in found.weights.axes or not found.values.spans(a) for a in found.summed if found.sizes[a] > 1):
        return False
    group, place = numbered(found.softmax, found.weights.node)
    dims = [found.weights.axes.index(a) for a in found.summed if a in found.weights.axes]
    group, place = (torch.movedim(t, dims, list(range(-len(dims), 0))).flatten(-len(dims)) for t in (group, place))
    length = shape_of(found.softmax)[softmax_axis(found.softmax)]
    same_group = bool((group == group[..., :1]).all())
    return same_group and group.shape[-1] == length and torch.equal(place.sort(-1).values, _counted(place))


def _counted(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1]).expand(like.shape)


def numbered(softmax: Node, moved: Node) -> tuple[Tensor, Tensor]:
    """For every element of `moved`, that only moves what the softmax gives: its group, which sums to 1, and its place
    in it. Both of moved's shape, int64."""
    shape, axis = shape_of(softmax), softmax_axis(softmax)
    count, length = math.prod(shape), shape[axis]
    place = torch.arange(length).reshape([-1 if d == axis else 1 for d in range(len(shape))]).expand(shape)
    group = torch.arange(count // length).reshape([1 if d == axis else s for d, s in enumerate(shape)]).expand(shape)
    numbers = evaluate(moved, {softmax.name: torch.arange(count).reshape(shape).double()}).long()
    return group.flatten()[numbers], place.flatten()[numbers]


def between_tokens(softmax: Node, known: Mapping[str, Tensor]) -> bool:
    """True when the scores are a product of two things that the input decides, as those of query and key are: that is
    attention between tokens, whatever else keeps it from being recognized."""
    count = math.prod(shape_of(softmax))
    pending, seen = list(softmax.all_input_nodes), set()
    while pending:
        node = pending.pop()
        if node in seen or not is_tensor(node) or math.prod(shape_of(node)) != count:
            continue
        seen.add(node)
        if node.target in MATRIX_PRODUCTS:
            return not any(is_constant(n, known) for n in node.all_input_nodes)
        pending.extend(node.all_input_nodes)
    return False
