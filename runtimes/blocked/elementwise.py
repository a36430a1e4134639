"""Sums that ONNX Runtime left in the plain layout, on blocked maps."""

from __future__ import annotations

from attn_deploy.runtimes.blocked.graph import is_a
from attn_deploy.runtimes.blocked.layout import Layout, Map


def enter_sums(layout: Layout) -> int:
    """Add of two values that ReorderOutput gives -> the same in front of it."""
    graph = layout.graph
    moved = 0
    for node in list(graph.nodes):
        if not is_a(node, "", "Add") or node.output[0] in graph.outputs:
            continue
        left, right = (layout.blocked(value) for value in node.input)
        if left is None or right is None or graph.shape(node.input[0]) != graph.shape(node.input[1]):
            continue
        plain = node.output[0]
        (value,) = graph.add(
            "Add", [left.value, right.value], name=node.name, domain="",
            shapes=[layout.shape_of(plain, left.channels)],
        )  # fmt: skip
        layout.settle(plain, Map(value, left.channels), node.name)
        graph.remove(node)
        moved += 1
    return moved
