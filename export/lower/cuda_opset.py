"""The opset at which a model's operators have CUDA kernels.

A kernel is registered for the version of the operator that the opset means: where an operator got a new version and the
kernel did not, the node runs on the CPU. So the opset is raised for ai.onnx Attention only where that loses nothing.
"""

from __future__ import annotations

import onnx_ir as ir

from attn_deploy.export.lower.cuda_operator import STANDARD_OPSET
from attn_deploy.export.opset import raise_opset

NO_KERNEL_AT_22 = frozenset(
    {"MaxPool", "InstanceNormalization", "Dropout", "Elu", "Selu", "EyeLike", "ThresholdedRelu"}
)
"""Operators that have a CUDA kernel at opset 20 and none at 22 and later (onnxruntime-gpu 1.31.1, kernel table)."""


def raise_for_attention(model: ir.Model) -> bool:
    """To STANDARD_OPSET, in place, where every operator keeps its kernel and its meaning; says whether it is there."""
    if model.opset_imports[""] >= STANDARD_OPSET:
        return True
    if any(node.domain == "" and node.op_type in NO_KERNEL_AT_22 for node in model.graph.all_nodes()):
        return False
    if not raise_opset(model, STANDARD_OPSET):
        return False
    for function in model.functions.values():  # their bodies are written for any opset from 20 on
        function.opset_imports[""] = STANDARD_OPSET
    return True
