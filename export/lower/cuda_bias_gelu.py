"""The bias of a linear layer and the GELU behind it as one operator.

`BiasGelu` computes the exact GELU (by erf), `FastGelu` the approximation by tanh: each where ONNX's Gelu says so.
"""

from __future__ import annotations

import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes
from attn_deploy.export.precision.insert import replace_node

FUSED = {"none": "BiasGelu", "tanh": "FastGelu"}


def fuse_bias_gelu(model: ir.Model) -> int:
    """In place; returns how many were fused."""
    fused = 0
    for node in list(model.graph):
        if node.op_type != "Gelu" or node.domain != "":
            continue
        total = node.inputs[0]
        add = total.producer() if total is not None else None
        if total is None or add is None or add.op_type != "Add" or len(total.uses()) != 1 or total.is_graph_output():
            continue
        biases = [i for i in add.inputs if i is not None and i.is_initializer() and len(i.shape or ()) == 1]
        rest = [i for i in add.inputs if i is not None and i not in biases]
        if len(biases) != 1 or len(rest) != 1 or not _fits(rest[0], biases[0]):
            continue
        kind = node.attributes["approximate"].as_string() if "approximate" in node.attributes else "none"
        nodes = Nodes(model, node)
        result = nodes.op(FUSED[kind], [rest[0], biases[0]], domain="com.microsoft", dtype=FLOAT)
        replace_node(model, node, result)
        model.graph.remove(add, safe=True)
        fused += 1
    return fused


def _fits(x: ir.Value, bias: ir.Value) -> bool:
    """The bias has an entry for every channel: the operators do not broadcast a single one."""
    return x.shape is not None and bias.shape is not None and len(x.shape) > 1 and x.shape[-1] == bias.shape[0]
