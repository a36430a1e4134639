"""Attention over branches: maps summed with weights that a softmax over the maps gives.

Selective kernels and split attention. The maps are one tensor with an axis of branches, or separate tensors whose
weighted ones are added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import (
    aten,
    constants,
    is_constant,
    is_tensor,
    module_path,
    only_user,
    shape_of,
    source_line,
)
from attn_deploy.export.recognize.site import Kind, Site, Skipped
from attn_deploy.export.recognize.weighted_sum import (
    WeightedSum,
    is_softmax,
    numbered,
    products_of,
    softmax_axis,
    weighted_sums,
)


@dataclass(frozen=True)
class BranchMatch:
    """The branches are the one summed axis of `pool`, whose index space has five."""

    pool: WeightedSum

    @property
    def result(self) -> Node:
        return self.pool.result


@dataclass(frozen=True)
class Branch:
    """One map [batch, channels, height, width]; `moves` lead from the softmax to its weights."""

    x: Node
    moves: tuple[Node, ...]


@dataclass(frozen=True)
class BranchesMatch:
    """result = the sum of the branches, each times its own part of the softmax."""

    softmax: Node
    branches: tuple[Branch, ...]
    result: Node


def weights_branches(pool: WeightedSum) -> bool:
    """True for maps [.., height, width] with one more axis, the summed one: a sum over pixels leaves no map."""
    axes = pool.values.axes
    return len(axes) == len(pool.sizes) == 5 and len(pool.summed) == 1 and axes.index(pool.summed[0]) < 3


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every sum of maps that a softmax over the maps weights."""
    known = constants(captured.program)
    for node in captured.program.graph.nodes:
        if not is_softmax(node) or is_constant(node, known):
            continue
        match: BranchMatch | BranchesMatch
        for pool in weighted_sums(node):
            if weights_branches(pool):
                match = BranchMatch(pool)
                yield Site(Kind.BRANCH_ATTENTION, module_path(match.result), source_line(match.result), match, node)
        separate = _separate_branches(node, known)
        if separate is not None:
            yield Site(
                Kind.BRANCH_ATTENTION, module_path(separate.result), source_line(separate.result), separate, node
            )


def _separate_branches(softmax: Node, known: Mapping[str, Tensor]) -> BranchesMatch | None:
    """The maps that are multiplied with the parts of the softmax, when their products are all added up."""
    branches: dict[Node, Branch] = {}
    for product, moves in products_of(softmax):
        if product.target is not aten.mul.Tensor or len(shape_of(product)) != 4 or product in branches:
            return None
        weights = moves[-1] if moves else softmax
        x = product.args[1] if product.args[0] is weights else product.args[0]
        if not isinstance(x, Node) or not is_tensor(x) or shape_of(x) != shape_of(product):
            return None
        branches[product] = Branch(x, _unexpanded(moves))
    length = shape_of(softmax)[softmax_axis(softmax)]
    if len(branches) != length or len(branches) < 2 or not _partition(softmax, list(branches.values())):
        return None
    total = _total(list(branches))
    return None if total is None else BranchesMatch(softmax, tuple(branches.values()), total)


def _unexpanded(moves: tuple[Node, ...]) -> tuple[Node, ...]:
    while moves and moves[-1].target is aten.expand.default:
        moves = moves[:-1]
    return moves


def _partition(softmax: Node, branches: list[Branch]) -> bool:
    """True when each branch's weights are one place of every group, all of them in the same order of groups."""
    parts = [numbered(softmax, b.moves[-1]) for b in branches if b.moves]
    if len(parts) != len(branches) or any(len(group.shape) != 4 for group, _ in parts):
        return False
    groups, places = zip(*parts, strict=True)
    same = all(g.shape == groups[0].shape and torch.equal(g, groups[0]) for g in groups)
    return same and {int(p.flatten()[0]) for p in places if bool((p == p.flatten()[0]).all())} == set(range(len(parts)))


def _total(products: list[Node]) -> Node | None:
    """The sum of exactly these nodes, added up in any order; None when something else is added, or they part."""
    parts = {product: 1 for product in products}  # node -> how many products are in it
    while len(parts) > 1:
        for node in parts:
            user = only_user(node)
            if user is not None and user.target is aten.add.Tensor and not user.kwargs:
                first, second = user.args[:2]
                if first is not second and first in parts and second in parts:
                    parts[user] = parts.pop(first) + parts.pop(second)  # type: ignore[arg-type]
                    break
        else:
            return None
    return next(iter(parts))
