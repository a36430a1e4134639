"""A matched gate -> ChannelPool, SpatialPool and Gate."""

from __future__ import annotations

import operator

from torch import Tensor
from torch import ops as torch_namespace
from torch.fx import Node

from attn_deploy.export import torch_ops  # noqa: F401  (registers the operators)
from attn_deploy.export.graph import aten, shape_of
from attn_deploy.export.recognize.gate import GateMatch
from attn_deploy.export.recognize.pools import Pools
from attn_deploy.export.rewrite.editor import Editor

ops = torch_namespace.attn_deploy


def rewrite(editor: Editor, match: GateMatch) -> Node:
    """Replaces pools and product, and returns the Gate node."""
    if match.plane is not None:
        _rewrite_plane_pools(editor, match.plane)
    if match.pixels is not None:
        _rewrite_pixel_pools(editor, match.pixels)
    with editor.at_site(match.result, origin=match.product):
        first, *others = (broadcast(editor, editor.at(g), match.x) for g in match.gates)
        for other in others:
            first = editor.call(aten.mul.Tensor, first, other)
        residual = None if match.residual is None else editor.at(match.residual)
        node = editor.call(ops.gate.default, editor.at(match.x), first, residual, match.activation)
        editor.replace(match.result, node)
    return node


def original_layout(match: GateMatch, value: Tensor, like: Tensor) -> Tensor:
    """The operator keeps the map's layout."""
    return value


def broadcast(editor: Editor, gate: Node, x: Node) -> Node:
    """The gate with x's rank, which the operator asks for."""
    for _ in range(len(shape_of(x)) - len(shape_of(gate))):
        gate = editor.call(aten.unsqueeze.default, gate, 0)
    return gate


def _rewrite_plane_pools(editor: Editor, pools: Pools) -> None:
    """Mean and maximum of one map come from one operator."""
    with editor.at_site(pools.first):
        x = editor.at(pools.source)
        if pools.mean and pools.maximum:
            both = editor.call(ops.channel_pool_mean_max.default, x)
            mean = editor.call(operator.getitem, both, 0)
            maximum = editor.call(operator.getitem, both, 1)
        elif pools.mean:
            mean = maximum = editor.call(ops.channel_pool_mean.default, x)
        else:
            mean = maximum = editor.call(ops.channel_pool_max.default, x)
        for pool, value in [(p, mean) for p in pools.mean] + [(p, maximum) for p in pools.maximum]:
            _replace(editor, pool, value)


def _rewrite_pixel_pools(editor: Editor, pools: Pools) -> None:
    """Mean and maximum of one map come from one operator, joined as the model joins them."""
    with editor.at_site(pools.first):
        x = editor.at(pools.source)
        if pools.max_mean and not pools.mean_max:
            order, mean_at = "MaxMean", 1
        elif pools.mean and pools.maximum:
            order, mean_at = "MeanMax", 0
        else:
            order, mean_at = ("Mean", 0) if pools.mean else ("Max", 1)
        pooled = editor.call(ops.spatial_pool.default, x, order)
        for pool in pools.max_mean if order == "MaxMean" else pools.mean_max:
            _replace(editor, pool, pooled)
        is_pair = order in ("MeanMax", "MaxMean")
        for part, at in [(p, mean_at) for p in pools.mean] + [(p, 1 - mean_at) for p in pools.maximum]:
            value = editor.call(aten.slice.Tensor, pooled, 1, at, at + 1) if is_pair else pooled
            _replace(editor, part, value)


def _replace(editor: Editor, original: Node, value: Node) -> None:
    """`value` in the shape of the original pool."""
    shape = shape_of(original)
    if shape_of(value) != shape:
        batch = editor.call(aten.sym_size.int, value, 0)
        value = editor.call(aten.reshape.default, value, [batch, *shape[1:]])
    editor.replace(original, value)
