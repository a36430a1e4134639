"""Gates: a product of a map with something computed only from a pool of that map (SE, ECA, CBAM and their kin)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.graph import (
    ancestors,
    aten,
    constants,
    is_size,
    is_tensor,
    module_path,
    only_user,
    shape_of,
    source_line,
)
from attn_deploy.export.recognize.site import GateMatch, Kind, Reason, Site, Skipped

MEAN = frozenset({aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default})
MAXIMUM = frozenset({aten.amax.default, aten.adaptive_max_pool2d.default, aten.max.dim, aten.max_pool2d.default})
ACTIVATIONS = {aten.relu.default: "Relu", aten.relu_.default: "Relu", aten.silu.default: "Silu"}


def find(captured: CapturedModel) -> Iterator[Site | Skipped]:
    """Every product of a 4-D map with something derived from a pool of it, as a site or a skip."""
    known = constants(captured.program)
    for node in captured.program.graph.nodes:
        if node.target is not aten.mul.Tensor or not all(is_tensor(a) for a in node.args[:2]):
            continue
        if len(shape_of(node)) != 4:
            continue
        found = _match(node, known)
        if isinstance(found, Reason):
            yield Skipped(Kind.CHANNEL_GATE, module_path(node), source_line(node), found)
        elif found is not None:
            kind = Kind.CHANNEL_GATE if found.mean_pools or found.max_pools else Kind.SPATIAL_GATE
            yield Site(kind, module_path(node), source_line(node), found)


def _match(node: Node, known: Mapping[str, Tensor]) -> GateMatch | Reason | None:
    """None when the product has nothing to do with a pool of its partner."""
    for x, gate in (node.args[:2], node.args[1::-1]):
        assert isinstance(x, Node)
        assert isinstance(gate, Node)
        if shape_of(x) != shape_of(node):
            continue
        pools = _pools_of(x, gate)
        if not pools:
            continue
        if not _only_from(gate, x, pools, known):
            return Reason.GATE_OTHER_INPUTS
        gate = _unexpanded(gate)
        if len(shape_of(gate)) != 4 or not all(g in (1, d) for g, d in zip(shape_of(gate), shape_of(x), strict=True)):
            return Reason.GATE_SHAPE
        plane = [p for p in pools if _over_plane(p)]
        return _with_tail(
            GateMatch(
                x, gate, None, "", product=node, result=node,
                mean_pools=tuple(p for p in plane if p.target in MEAN),
                max_pools=tuple(p for p in plane if p.target in MAXIMUM),
            )
        )  # fmt: skip
    return None


def _pools_of(x: Node, gate: Node) -> list[Node]:
    """Pools of x, over its plane or over its channels, that the gate depends on."""
    found = []
    for node in ancestors(gate, stop=lambda n: n is x):
        if node.target in MEAN | MAXIMUM and node.args[0] is x and (_over_plane(node) or _over_channels(node)):
            found.append(node)
    return sorted(found, key=lambda n: n.name)


def _over_plane(pool: Node) -> bool:
    if pool.target in (aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default):
        size = pool.args[1]
        return size in (1, [1, 1], [1], (1, 1))
    if pool.target in (aten.avg_pool2d.default, aten.max_pool2d.default):
        return list(pool.args[1]) == list(shape_of(pool.args[0])[2:])
    return _dims(pool) == {2, 3}


def _over_channels(pool: Node) -> bool:
    return pool.target in (aten.mean.dim, aten.amax.default, aten.max.dim) and _dims(pool) == {1}


def _dims(pool: Node) -> set[int]:
    dims = pool.args[1] if len(pool.args) > 1 else []
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return {d % 4 for d in listed if isinstance(d, int)}


def _only_from(gate: Node, x: Node, pools: list[Node], known: Mapping[str, Tensor]) -> bool:
    """True when every way from the gate back ends in a pool of x or in a constant."""
    ends = set(pools)
    for node in ancestors(gate, stop=lambda n: n in ends or is_size(n)):
        if node in ends or is_size(node):
            continue
        if node is x or (node.op == "placeholder" and node.name not in known):
            return False
    return True


def _unexpanded(gate: Node) -> Node:
    while gate.target in (aten.expand.default, aten.expand_as.default):
        inner = gate.args[0]
        assert isinstance(inner, Node)
        if len(shape_of(inner)) != 4:
            break
        gate = inner
    return gate


def _with_tail(match: GateMatch) -> GateMatch:
    """The residual add and the activation that alone consume the product belong to the gate."""
    result = match.result
    residual = None
    add = only_user(result)
    if add is not None and add.target is aten.add.Tensor and not add.kwargs:
        other = add.args[1] if add.args[0] is result else add.args[0]
        if isinstance(other, Node) and other is not result and shape_of(other) == shape_of(result):
            residual, result = other, add
    tail = only_user(result)
    activation = ""
    if tail is not None and tail.target in ACTIVATIONS:
        activation, result = ACTIVATIONS[tail.target], tail
    return replace(match, residual=residual, activation=activation, result=result)


def pooled(pool: Node) -> bool:
    """True when the pool's value is the node itself, False when it is the first of a pair (value, index)."""
    return isinstance(pool.meta.get("val"), torch.Tensor)
