"""A sum's operands in the layout that an operator reads, and the operator's result in the layout of the sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import aten, shape_of
from attn_deploy.export.recognize.weighted_sum import WeightedSum
from attn_deploy.export.rewrite.editor import Editor

Groups = Sequence[Sequence[int]]
"""For each dimension of a tensor the axes of the index space that are merged in it; none for a dimension of 1."""


def replayed(editor: Editor, softmax: Node, moves: Sequence[Node]) -> Node:
    """The scores of the softmax, moved as the moves do with what the softmax gives."""
    scores = softmax.args[0]
    assert isinstance(scores, Node)
    node = editor.at(scores)
    for move in moves:
        args = torch.fx.map_arg(move.args[1:], editor.at)
        assert callable(move.target)
        node = editor.call(move.target, node, *args)
    return node


def arranged(editor: Editor, node: Node, axes: Sequence[int], groups: Groups, batch: int) -> Node:
    """`node`, whose dimensions run along `axes`, permuted and reshaped so that each of its dimensions is a group."""
    sizes = dict(zip(axes, shape_of(node), strict=True))
    shape: list[int | Node] = [math.prod(sizes.get(a, 1) for a in group) for group in groups]
    wanted = [axes.index(a) for group in groups for a in group if a in axes and (a == batch or sizes[a] > 1)]
    if wanted != sorted(wanted):  # what is of size 1 can stay where it is
        order = wanted + [d for d in range(len(axes)) if d not in wanted]
        node = editor.call(aten.permute.default, node, order)
        axes = [axes[d] for d in order]
    return _reshaped(editor, node, shape, axes, groups, batch)


def _reshaped(
    editor: Editor, node: Node, shape: list[int | Node], axes: Sequence[int], groups: Groups, batch: int
) -> Node:
    """A reshape to `shape`, whose batch is taken from the node so that it stays dynamic."""
    place = next((i for i, group in enumerate(groups) if batch in group), None)
    if place is not None and batch in axes and isinstance(_size(node, axes.index(batch)), torch.SymInt):
        alone = len(groups[place]) == 1
        shape[place] = editor.call(aten.sym_size.int, node, axes.index(batch)) if alone else -1
    return node if _unchanged(node, shape) else editor.call(aten.reshape.default, node, shape)


def _unchanged(node: Node, shape: Sequence[int | Node]) -> bool:
    sizes = node.meta["val"].shape
    return len(sizes) == len(shape) and all(
        isinstance(s, torch.SymInt) if isinstance(d, Node) else d == s for d, s in zip(shape, sizes, strict=True)
    )


def _size(node: Node, dim: int) -> int | torch.SymInt:
    size: int | torch.SymInt = node.meta["val"].shape[dim]
    return size


def restored(editor: Editor, node: Node, groups: Groups, pool: WeightedSum) -> Node:
    """The operator's result, whose dimensions are `groups` of kept axes, in the layout and shape of the sum's own."""
    axes = [a for group in groups for a in group]
    single = [[a] for a in axes]
    shape: list[int | Node] = [pool.sizes[a] for a in axes]
    batch_dim = next(i for i, group in enumerate(groups) if pool.batch in group)
    if isinstance(_size(node, batch_dim), torch.SymInt):
        alone = len(groups[batch_dim]) == 1
        shape[axes.index(pool.batch)] = editor.call(aten.sym_size.int, node, batch_dim) if alone else -1
    if not _unchanged(node, shape):
        node = editor.call(aten.reshape.default, node, shape)
    return _as_result(editor, arranged(editor, node, axes, sorted(single), pool.batch), sorted(axes), pool)


def _as_result(editor: Editor, node: Node, axes: Sequence[int], pool: WeightedSum) -> Node:
    """Axes of size 1 that no group held, and summed ones that are kept, become dimensions of the result again."""
    shape: list[int | Node] = list(shape_of(pool.result))
    kept = pool.kept if len(shape) == len(pool.kept) else tuple(range(len(pool.sizes)))
    dim = axes.index(pool.batch)
    if isinstance(_size(node, dim), torch.SymInt):
        shape[kept.index(pool.batch)] = editor.call(aten.sym_size.int, node, dim)
    return node if _unchanged(node, shape) else editor.call(aten.reshape.default, node, shape)


def laid_out(value: Tensor, groups: Groups, pool: WeightedSum, like: Tensor) -> Tensor:
    """A value of the sum's result in the operator's layout."""
    held = sorted(a for group in groups for a in group)
    value = value.reshape([-1 if a == pool.batch else pool.sizes[a] for a in held])
    return value.permute([held.index(a) for group in groups for a in group]).reshape(like.shape)
