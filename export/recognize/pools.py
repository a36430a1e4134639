"""Which values of a gate's computation are pools that ChannelPool and SpatialPool compute: found by running them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import is_tensor, shape_of
from attn_deploy.export.recognize.dependence import POOLS, REORDERED, Dataflow, Dependence, Way, packet


@dataclass(frozen=True)
class Pools:
    """Pools of `source` [batch, channels, height, width], each in graph order.

    `mean` and `maximum` hold one value for each channel, or for each pixel, in any shape. `mean_max` and `max_mean`,
    of pixels only, hold both, joined along the channel axis: [batch, 2, height, width]. `first` is the first of all.
    """

    source: Node
    first: Node
    mean: tuple[Node, ...] = ()
    maximum: tuple[Node, ...] = ()
    mean_max: tuple[Node, ...] = ()
    max_mean: tuple[Node, ...] = ()


def plane_pools(flow: Dataflow, x: Node, dependence: Dependence) -> Pools | None:
    """Means and maxima over height and width of the map that is gated."""
    return _pools(flow, x, dependence, lambda v: {"mean": v.mean((2, 3)), "maximum": v.amax((2, 3))})


def pixel_pools(flow: Dataflow, x: Node, dependence: Dependence) -> Pools | None:
    """Means and maxima over the channels of the map that is gated."""

    def expected(value: Tensor) -> dict[str, Tensor]:
        mean, maximum = value.mean(1), value.amax(1)
        both = {"mean_max": torch.stack([mean, maximum], 1), "max_mean": torch.stack([maximum, mean], 1)}
        return {"mean": mean, "maximum": maximum, **both}

    return _pools(flow, x, dependence, expected)


def _pools(
    flow: Dataflow, x: Node, dependence: Dependence, expected: Callable[[Tensor], Mapping[str, Tensor]]
) -> Pools | None:
    """The pools of the map in the layout of the root, else in that of `x`."""
    for source in dict.fromkeys((dependence.root, x)):
        value = flow.probe(dependence, source) if len(shape_of(source)) == 4 else None
        if value is None:
            continue
        wanted = expected(value)
        found: dict[str, list[Node]] = {name: [] for name in wanted}
        taken: set[Node] = set()
        for node in _pooled_alone(flow, dependence):
            if flow.order[node] < flow.order[source] or shape_of(node)[:1] != shape_of(source)[:1]:
                continue
            if packet(node) in REORDERED and node.args[0] in taken:
                taken.add(node)  # the pool before it in another shape
                continue
            got = flow.probe(dependence, node)
            name = next((n for n, w in wanted.items() if got is not None and _same(got, w)), None)
            if name is not None:
                found[name].append(node)
                taken.add(node)
        if taken:
            first = min(taken, key=flow.order.__getitem__)
            return Pools(source, first, **{name: tuple(nodes) for name, nodes in found.items()})
    return None


def _same(got: Tensor, wanted: Tensor) -> bool:
    if got.numel() != wanted.numel():
        return False
    return torch.allclose(got.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def _pooled_alone(flow: Dataflow, dependence: Dependence) -> Iterator[Node]:
    """What pools, movement and numbers alone make of the map."""
    alone = {dependence.root}
    for node, way in dependence.region.items():
        runtime = [n for n in node.all_input_nodes if n in alone or n in dependence.region]
        name = packet(node)
        moved = name in REORDERED or name in POOLS or name in ("cat", "stack") or node.target is operator.getitem
        scaled = name in ("mul", "div") and len(node.all_input_nodes) == 1
        if not (moved or scaled) or not all(n in alone for n in runtime):
            continue
        alone.add(node)
        if way is Way.POOLED and is_tensor(node):
            yield node
