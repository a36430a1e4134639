"""Nodes that copy a tensor and change nothing: a Pad by nothing, a Transpose that moves axes of length 1 alone.

Packages write them for sizes that happen not to need them (Swin's last stage is one window, and divides evenly).
"""

from __future__ import annotations

import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import Nodes, constant_of, dims
from attn_deploy.export.precision.insert import replace_node


def drop_idle_movement(model: ir.Model) -> int:
    """In place; returns how many there were. A Transpose leaves a Reshape, which copies nothing."""
    dropped = 0
    for node in list(model.graph):
        if node.domain != "" or node.outputs[0].is_graph_output():
            continue
        if node.op_type == "Pad" and _adds_nothing(node):
            assert node.inputs[0] is not None
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
            dropped += 1
        elif node.op_type == "Transpose" and (shape := _shape_behind(node)) is not None:
            assert node.inputs[0] is not None
            replace_node(model, node, Nodes(model, node).reshape(node.inputs[0], *shape))
            dropped += 1
    return dropped


def _adds_nothing(node: ir.Node) -> bool:
    pads = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    return pads is not None and not pads.any()


def _shape_behind(node: ir.Node) -> list[int] | None:
    """The result's shape with -1 for the one symbol, where the axes longer than 1 keep their order."""
    source = node.inputs[0]
    if source is None or source.shape is None or "perm" not in node.attributes:
        return None
    before, perm = dims(source), node.attributes["perm"].as_ints()
    moved = [axis for axis in perm if before[axis] != 1]
    after = [before[axis] for axis in perm]
    numbers = [d if isinstance(d, int) else -1 for d in after]
    return numbers if moved == sorted(moved) and numbers.count(-1) <= 1 and 0 not in numbers else None
