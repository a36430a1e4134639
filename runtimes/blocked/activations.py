"""Which nodes are activations, by the suffix that our operators have for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attn_deploy.runtimes.blocked.graph import MICROSOFT, OURS, attribute, attributes, is_a
from attn_deploy.runtimes.blocked.layout import HARD_SIGMOID, Layout, Map

if TYPE_CHECKING:
    import onnx

ZERO_PRESERVING = frozenset({"Relu", "Silu", "Hardswish", "Gelu"})
"""Of 0 they give 0, so that padded channels stay 0."""


def activation(node: onnx.NodeProto | None) -> str | None:
    """The suffix of a node that is an activation of one input; None for any other."""
    if node is None:
        return None
    if is_a(node, MICROSOFT, "QuickGelu"):
        return "Silu" if attribute(node, "alpha", 1.702) == 1.0 else None
    if is_a(node, OURS, *(f"BlockedActivate{name}" for name in ZERO_PRESERVING)):
        return node.op_type.removeprefix("BlockedActivate")
    if is_a(node, "", "HardSigmoid"):
        found = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        return "HardSigmoid" if np.allclose(found, HARD_SIGMOID, rtol=1e-6) else None
    if is_a(node, "", "Gelu"):
        return "Gelu" if attribute(node, "approximate", "none") == "none" else None
    names = {"Relu": "Relu", "HardSwish": "Hardswish", "Sigmoid": "Sigmoid"}
    return names.get(node.op_type) if is_a(node, "", *names) else None


def join_hardswish(layout: Layout) -> int:
    """x * HardSigmoid(x), as older versions of ONNX Runtime write HardSwish out, is one node again: it is no gate."""
    graph = layout.graph
    joined = 0
    for node in list(graph.nodes):
        hard = next((p for p in map(graph.producer, node.input) if activation(p) == "HardSigmoid"), None)
        if hard is None or not is_a(node, "", "Mul") or set(node.input) != {hard.input[0], hard.output[0]}:
            continue
        if graph.only_consumer(hard.output[0]) is None or node.output[0] in graph.outputs:
            continue
        (value,) = graph.add(
            "HardSwish", [hard.input[0]], name=node.name, domain="", shapes=[graph.shape(node.output[0])]
        )
        graph.replace(node.output[0], value)
        graph.remove(node)
        graph.remove(hard)
        joined += 1
    return joined


def enter_activations(layout: Layout) -> int:
    """`activation(x)` on what ReorderOutput gives -> the same in front of it, where it leaves 0 as it is."""
    graph = layout.graph
    moved = 0
    for node in list(graph.nodes):
        name = activation(node)
        source = layout.blocked(node.input[0]) if name in ZERO_PRESERVING else None
        if source is None or node.output[0] in graph.outputs:
            continue
        plain = node.output[0]
        (value,) = graph.add(
            node.op_type, [source.value], name=node.name, domain=node.domain,
            shapes=[layout.shape_of(plain, source.channels)], attributes=attributes(node),
        )  # fmt: skip
        layout.settle(plain, Map(value, source.channels), node.name)
        graph.remove(node)
        moved += 1
    return moved


def activate(layout: Layout) -> int:
    """ONNX Runtime's activations of blocked maps that our library has, and that it does not fuse, become ours."""
    graph = layout.graph
    replaced = 0
    for node in list(graph.nodes):
        name = activation(node)
        if name not in ("Silu", "Gelu") or node.domain == OURS or f"BlockedActivate{name}" not in layout.operators:
            continue
        channels = layout.channels(node.input[0])
        if channels is None:
            continue
        (value,) = layout.add(
            f"BlockedActivate{name}", [node.input[0]], channels=channels, name=node.name,
            shapes=[graph.shape(node.output[0])],
        )  # fmt: skip
        graph.replace(node.output[0], value)
        graph.remove(node)
        replaced += 1
    return replaced
