"""Shapes that are computed in the graph though only the batch is open, as constants; axes that are not said, said."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from attn_deploy.export.precision.insert import Inserter


def write_shapes(model: ir.Model) -> None:
    """Infers shapes and gives every Reshape whose result has one open dimension at most a constant shape, in place;
    what computed it goes. An engine builder then needs no shape tensors for it. A Squeeze gets its axes: TensorRT's
    parser asks for them before 11.5."""
    ShapeInferencePass(strict_mode=False)(model)
    for node in list(model.graph):
        dims, axes = _dims(node), _axes(node)
        if dims is not None:
            node.replace_input_with(1, Inserter(model, node).constant("shape", np.array(dims, np.int64)))
            node.attributes.pop("allowzero", None)
        if axes is not None:
            node.resize_inputs(2)
            node.replace_input_with(1, Inserter(model, node).constant("axes", np.array(axes, np.int64)))
    RemoveUnusedNodesPass()(model)


def _dims(node: ir.Node) -> list[int] | None:
    """The constant shape of a Reshape that has none yet, with -1 for the open dimension."""
    if node.op_type != "Reshape" or node.domain or node.inputs[1] is None:
        return None
    producer = node.inputs[1].producer()
    shape = node.outputs[0].shape
    if shape is None or node.inputs[1].const_value is not None or (producer and producer.op_type == "Constant"):
        return None
    dims = [d if isinstance(d, int) else -1 for d in shape]
    return dims if dims.count(-1) <= 1 and 0 not in dims else None


def _axes(node: ir.Node) -> list[int] | None:
    """The axes of a Squeeze that names none, where all lengths are known."""
    if node.op_type != "Squeeze" or node.domain or "axes" in node.attributes or len(node.inputs) > 1:
        return None
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    return [axis for axis, length in enumerate(shape) if length == 1]
