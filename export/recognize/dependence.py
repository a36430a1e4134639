"""How one value of a graph depends on another: through pools, through layers that mix, or value by value.

A gate is told from an activation, from a gated linear unit and from a normalization by this alone: names of classes
and modules are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import aten, concrete, constants, evaluate, is_size, is_tensor, shape_of


class Way(Flag):
    """What lies on the ways from a map to a value that is computed from it."""

    NONE = 0
    SAME = auto()
    """Movement alone: the same elements in another order or shape."""
    POINTWISE = auto()
    """Functions of single elements, and parts of the map."""
    MIXED = auto()
    """A convolution, a linear layer or an attention, before any pool of the map."""
    POOLED = auto()
    """A pool: mean, maximum, sum, norm, variance, or a sum weighted at run time."""
    OTHER = auto()
    """Run-time values that do not come from the map."""


RAW = Way.SAME | Way.POINTWISE

REORDERED = frozenset({
    "reshape", "view", "permute", "transpose", "t", "squeeze", "unsqueeze", "flatten", "unflatten", "movedim", "clone",
    "contiguous", "alias", "detach", "to", "_to_copy",
})  # fmt: skip
_SHAPE_ONLY = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
})  # fmt: skip
_FIRST_ONLY = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
POOLS = frozenset({
    "mean", "sum", "amax", "amin", "max", "min", "prod", "logsumexp", "median", "norm", "linalg_vector_norm",
    "var", "std", "var_mean", "std_mean", "max_pool2d_with_indices", "_adaptive_avg_pool2d",
    *(f"{kind}_pool{rank}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for rank in (1, 2, 3)),
})  # fmt: skip
_CONTRACTIONS = frozenset({"matmul", "bmm", "mm", "einsum", "baddbmm", "addmm"})
_MIXERS = frozenset({
    "linear", "convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "softmax", "_softmax", "scaled_dot_product_attention", *_CONTRACTIONS,
})  # fmt: skip


def packet(node: Node) -> str:
    """`mul` for aten.mul.Tensor; empty for what is no call of an ATen operator."""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return str(name) if node.op == "call_function" else ""


@dataclass(frozen=True)
class Dependence:
    """How `value` depends on the elements of `root`.

    `region` is what is computed between the two, in graph order, with the way from `root` to each; `elsewhere` are the
    run-time values that come into it from outside.
    """

    root: Node
    value: Node
    region: Mapping[Node, Way]
    elsewhere: tuple[Node, ...]

    @property
    def ways(self) -> Way:
        return Way.SAME if self.value is self.root else self.region[self.value]


class Dataflow:
    """The run-time part of a captured graph, and how its values depend on one another."""

    def __init__(self, captured: CapturedModel) -> None:
        nodes = list(captured.program.graph.nodes)
        self.known: dict[str, Tensor] = constants(captured.program)
        self.order = {node: place for place, node in enumerate(nodes)}
        self._runtime: set[Node] = set()
        for node in nodes:
            if node.op == "placeholder":
                if node.name not in self.known and not is_size(node):
                    self._runtime.add(node)
            elif any(n in self._runtime for n in data_inputs(node)):
                self._runtime.add(node)

    def is_runtime(self, node: object) -> bool:
        """True for a tensor that depends on what the model is fed with (sizes are not data)."""
        return isinstance(node, Node) and node in self._runtime and is_tensor(node)

    def root(self, node: Node) -> Node:
        """The node behind what only reorders elements or casts them: permutations, reshapes."""
        while packet(node) in REORDERED and isinstance(node.args[0], Node):
            node = node.args[0]
        return node

    def dependence(self, x: Node, value: Node) -> Dependence | None:
        """How `value` depends on the elements of `x`, in whatever layout; None when it does not."""
        root = self.root(x)
        region: dict[Node, Way] = {}
        elsewhere: list[Node] = []
        reached = False
        pending, seen = [value], {value}
        while pending:
            node = pending.pop()
            if node is root:
                reached = True
                continue
            # What stands before the map in the graph cannot depend on it.
            if node.op == "placeholder" or self.order[node] < self.order[root]:
                elsewhere.append(node)
                continue
            region[node] = Way.NONE
            for source in data_inputs(node):
                if source in self._runtime and source not in seen:
                    seen.add(source)
                    pending.append(source)
        if not reached:
            return None
        ordered = sorted(region, key=self.order.__getitem__)
        ways: dict[Node, Way] = {root: Way.SAME, **dict.fromkeys(elsewhere, Way.OTHER)}
        for node in ordered:
            ways[node] = self._way(node, ways)
        return Dependence(root, value, {n: ways[n] for n in ordered}, tuple(elsewhere))

    def _way(self, node: Node, ways: Mapping[Node, Way]) -> Way:
        total = Way.NONE
        for source in data_inputs(node):
            total |= ways.get(source, Way.NONE)
        name = packet(node)
        if not total & RAW or name in REORDERED:
            return total
        is_pool = name in POOLS and node.target not in (aten.max.other, aten.min.other)
        if is_pool or (name in _CONTRACTIONS and self._is_weighted_sum(node, ways)):
            through = Way.POOLED
        else:
            through = Way.MIXED if name in _MIXERS else Way.POINTWISE
        return total & ~RAW | through

    def _is_weighted_sum(self, node: Node, ways: Mapping[Node, Way]) -> bool:
        """A product of the map with run-time weights that leaves fewer elements: context pooling."""
        operands = [n for n in data_inputs(node) if is_tensor(n)]
        pooled = [n for n in operands if ways.get(n, Way.NONE) & RAW]
        return all(n in self._runtime for n in operands) and all(_count(n) > _count(node) for n in pooled)

    def probe(self, dependence: Dependence, node: Node, scale: float = 1.0) -> Tensor | None:
        """`node` as a function of the map alone, run on normal values times `scale`; None where it cannot be run.

        Run-time values from elsewhere are held at the same normal values.
        """
        values: dict[str, Any] = dict(self.known)
        generator = torch.Generator().manual_seed(0)
        values[dependence.root.name] = scale * _drawn(dependence.root.meta["val"], generator)
        for source in dependence.elsewhere:
            values[source.name] = _drawn(source.meta["val"], generator)
        try:
            result = evaluate(node, values)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None
        return result if isinstance(result, Tensor) else None


def data_inputs(node: Node) -> list[Node]:
    """The inputs whose values, and not only whose shapes, the node uses."""
    name = packet(node)
    if is_size(node) or name in _SHAPE_ONLY:
        return []
    return node.all_input_nodes[:1] if name in _FIRST_ONLY else node.all_input_nodes


def _drawn(value: Any, generator: torch.Generator) -> Any:
    """Normal values in the shape of a fake tensor; of a tuple of them, which a split or a maximum gives, for each."""
    if isinstance(value, Tensor):
        return torch.randn([concrete(d) for d in value.shape], generator=generator).to(value.dtype)
    return [_drawn(v, generator) for v in value]


def _count(node: Node) -> int:
    return math.prod(shape_of(node))


@dataclass(frozen=True)
class Product:
    """A product of two run-time maps; `addend` is there where torch.addcmul adds it at once."""

    node: Node
    factors: tuple[Node, Node]
    addend: Node | None = None

    @property
    def sides(self) -> tuple[tuple[Node, Node], tuple[Node, Node]]:
        """(map, gate) both ways round."""
        left, right = self.factors
        return (left, right), (right, left)


def products(flow: Dataflow, captured: CapturedModel) -> Iterator[Product]:
    """The products of two float maps of rank 3 and more: of [batch, features] alone nothing is pooled."""
    for node in captured.program.graph.nodes:
        if node.target is aten.mul.Tensor:
            found = Product(node, (node.args[0], node.args[1]))
        elif node.target is aten.addcmul.default and node.kwargs.get("value", 1) == 1:
            found = Product(node, (node.args[1], node.args[2]), node.args[0])
        else:
            continue
        if all(flow.is_runtime(f) for f in found.factors) and _is_map(node):
            yield found


def _is_map(node: Node) -> bool:
    return node.meta["val"].dtype.is_floating_point and len(shape_of(node)) >= 3
