"""Means over the plane: of a blocked map they stay in the layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_deploy.runtimes.blocked.graph import NCHWC, attribute, is_a
from attn_deploy.runtimes.blocked.layout import Layout, Map

if TYPE_CHECKING:
    import onnx


def enter_pools(layout: Layout) -> int:
    """ReduceMean and GlobalAveragePool of what ReorderOutput gives, and nchwc.GlobalAveragePool -> BlockedPool."""
    if "BlockedPool" not in layout.operators:
        return 0
    replaced = 0
    for node in list(layout.graph.nodes):
        if is_a(node, NCHWC, "GlobalAveragePool"):
            replaced += _pool_inside(layout, node)
        elif is_a(node, "", "GlobalAveragePool", "ReduceMean"):
            replaced += _pool_plain(layout, node)
    return replaced


def _pool_inside(layout: Layout, node: onnx.NodeProto) -> int:
    channels = layout.channels(node.input[0])
    if channels is None:
        return 0
    value = _pool(layout, node.input[0], channels, node.name)
    layout.graph.replace(node.output[0], value)
    layout.graph.remove(node)
    return 1


def _pool_plain(layout: Layout, node: onnx.NodeProto) -> int:
    graph = layout.graph
    source, plain = layout.blocked(node.input[0]), node.output[0]
    dims = graph.shape(plain)
    if source is None or plain in graph.outputs or dims is None or not _is_plane_mean(layout, node):
        return 0
    value = _pool(layout, source.value, source.channels, node.name)
    pooled = Map(value, source.channels)
    if len(dims) == 4:
        layout.settle(plain, pooled, node.name)
    else:  # keepdims 0
        (left,) = graph.add(
            "ReorderOutput", [value], name=node.name, domain=NCHWC, shapes=[(dims[0], source.channels, 1, 1)],
            attributes={"channels": source.channels, "channels_last": 0},
        )  # fmt: skip
        (flat,) = graph.add("Flatten", [left], name=node.name, domain="", shapes=[dims], attributes={"axis": 1})
        graph.replace(plain, flat)
    graph.remove(node)
    return 1


def _pool(layout: Layout, value: str, channels: int, name: str) -> str:
    (pooled,) = layout.add(
        "BlockedPool", [value], channels=channels, name=name, shapes=[layout.vector_shape(value, channels)]
    )
    return pooled


def _is_plane_mean(layout: Layout, node: onnx.NodeProto) -> bool:
    if node.op_type == "GlobalAveragePool":
        return True
    dims = layout.graph.shape(node.input[0])
    axes = layout.graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes")
    if dims is None or len(dims) != 4 or axes is None:
        return False
    return sorted(int(a) % 4 for a in axes) == [2, 3]
