"""INT8 for linear layers: weights symmetric per output channel, activations per token at run time.

Published and measured (facts: precision, accuracy-baseline): with activations per token nothing of a transformer
collapses, and nothing needs calibration. The scale of a row is found while it is read; the zero point is fixed per
layer from what the layer before can give, since ONNX Runtime's integer product takes one zero point for all rows:
a GELU never goes below -0.17 and a ReLU never below 0, so they get most of the range for positive values.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.insert import Inserter, replace_node
from attn_deploy.session import Array

ZERO_POINTS = {"Gelu": 26, "Relu": 0, "Softmax": 0, "Sigmoid": 0, "HardSwish": 26}
"""By the operator that makes the activation; everything else may be as negative as it is positive: 128."""

MS = "com.microsoft"


def quantize_weight(weight: Array, axis: int, least_scale: Array | None = None) -> tuple[Array, Array]:
    """weight -> (int8 of the same shape, float32 scale [channels]), symmetric per channel of `axis`.

    Rounded to 127 levels a side, so that a negated weight quantizes to the negated value. No scale is below
    `least_scale` [channels].
    """
    rest = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=rest)
    scale = np.maximum(largest, np.finfo(np.float32).tiny * 128) / 127.0
    if least_scale is not None:
        scale = np.maximum(scale, least_scale)
    scale = scale.astype(np.float32)
    quantized = np.clip(np.rint(weight / np.expand_dims(scale, rest)), -127, 127).astype(np.int8)
    return quantized, scale


def quantize_linear(model: ir.Model, node: ir.Node) -> None:
    """Replaces a MatMul or Gemm with constant weight, in place."""
    weight_value = node.inputs[1]
    assert weight_value is not None
    assert weight_value.const_value is not None
    weight = weight_value.const_value.numpy()
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        weight = weight.T
    quantized, weight_scale = quantize_weight(np.ascontiguousarray(weight), axis=1)
    zero_point = _zero_point(node.inputs[0])
    insert = Inserter(model, node)
    x = node.inputs[0]
    assert x is not None
    rows = insert.op("Reshape", [x, insert.constant("rows", np.array([-1, weight.shape[0]], np.int64))])
    scale = _row_scale(insert, rows, zero_point)
    zero = insert.constant("zero_point", np.array(zero_point, np.uint8))
    flat_scale = insert.op("Reshape", [scale, insert.constant("flat", np.array([-1], np.int64))])
    zeros = insert.op("Expand", [zero, insert.op("Shape", [flat_scale])])
    quantized_rows = insert.op("QuantizeLinear", [rows, flat_scale, zeros], axis=0, dtype=ir.DataType.UINT8)
    product = insert.op(
        "MatMulIntegerToFloat",
        [
            quantized_rows,
            insert.constant("weight_int8", quantized),
            insert.constant("one", np.array(1.0, np.float32)),
            insert.constant("weight_scale", weight_scale),
            zero,
        ],
        domain=MS,
    )
    result = insert.op("Mul", [product, scale])
    if node.op_type == "Gemm":
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            result = insert.op("Add", [result, node.inputs[2]])
    else:
        leading = insert.op("Shape", [x], start=0, end=-1)
        columns = insert.constant("columns", np.array([weight.shape[1]], np.int64))
        result = insert.op("Reshape", [result, insert.op("Concat", [leading, columns], axis=0)])
    replace_node(model, node, result)


def _zero_point(value: ir.Value | None) -> int:
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in ("Reshape", "Transpose", "Flatten"):
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return 128 if producer is None else ZERO_POINTS.get(producer.op_type, 128)


def _row_scale(insert: Inserter, rows: ir.Value, zero_point: int) -> ir.Value:
    """The smallest scale [rows, 1] under which a whole row fits between 0 and 255 around the zero point."""
    axes = insert.constant("axes", np.array([1], np.int64))
    high = insert.op("ReduceMax", [rows, axes], keepdims=1)
    above = insert.op("Mul", [high, insert.constant("above", np.array(1.0 / (255 - zero_point), np.float32))])
    bounds = [above, insert.constant("tiny", np.array(1e-12, np.float32))]
    if zero_point:
        low = insert.op("ReduceMin", [rows, axes], keepdims=1)
        bounds.append(insert.op("Mul", [low, insert.constant("below", np.array(-1.0 / zero_point, np.float32))]))
    return insert.op("Max", bounds)
