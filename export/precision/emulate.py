"""A half graph as one that ONNX Runtime's CPU runs with the same roundings.

The CPU has few half kernels: ONNX Runtime computes a half node in FP32 there and rounds only where a half value is
stored, which its optimizer avoids. Here every node that gives a half value computes in FP32, as kernels that accumulate
in FP32 do, and its result is rounded to the half type and back by two Casts, which no optimizer of ONNX Runtime 1.32
removes (tests/export/test_emulate.py holds it to that, bit by bit).

Pairs of QuantizeLinear and DequantizeLinear to FP8 are written out with such Casts as well: ONNX Runtime rounds right
in them, but its optimizer takes a Relu away in front of one as if it were unsigned.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.half_rules import MOVEMENT
from attn_deploy.export.precision.insert import Inserter, replace_node

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

EXACT = MOVEMENT | {"Max", "Min", "Relu", "Neg", "Abs", "MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Where",
                    "Cast", "CastLike", "Sign", "Floor", "Ceil", "Round"}  # fmt: skip
"""Operators whose result needs no rounding when their operands are rounded."""


def emulate(model: ir.Model) -> ir.Model:
    """`model` in FP32 with the roundings of its half types; it is left as it is. Names of values stay."""
    copy = model.clone()
    for value in list(copy.graph.initializers.values()):
        _to_float32(value)
    for node in list(copy.graph):
        _write_out_fp8(copy, node)
    nodes = list(copy.graph)
    kinds = {o: o.dtype for node in nodes for o in node.outputs}
    kinds |= {i: i.dtype for i in (*copy.graph.inputs, *copy.graph.initializers.values())}
    for node in nodes:
        halves = [o for o in node.outputs if kinds[o] in HALVES]
        exact = node.op_type in EXACT and (node.op_type != "Cast" or _widens(node, kinds))
        for output in halves:
            half = kinds[output]
            assert half is not None
            _plain_attributes(node)
            output.type = ir.TensorType(ir.DataType.FLOAT)
            if not exact:
                _round(copy, node, output, half)
        if node.op_type == "Cast" and node.attributes["to"].as_int() in [int(h) for h in HALVES]:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return copy


FP8 = ir.DataType.FLOAT8E4M3FN
LARGEST_FP8 = 448.0


def _write_out_fp8(model: ir.Model, node: ir.Node) -> None:
    """QuantizeLinear as Div, Clip and Cast, DequantizeLinear as Cast and Mul; of a constant as a constant."""
    source, scale = (*node.inputs[:2], None, None)[:2]
    output = node.outputs[0]
    insert = Inserter(model, node, "written_out")
    if source is None or scale is None:
        return
    if node.op_type == "QuantizeLinear" and output.dtype == FP8:
        ends = [
            insert.constant("low", np.array(-LARGEST_FP8, np.float32)),
            insert.constant("high", np.array(LARGEST_FP8, np.float32)),
        ]
        levels = insert.op("Div", [source, scale], dtype=ir.DataType.FLOAT)
        levels = insert.op("Clip", [levels, *ends], dtype=ir.DataType.FLOAT)
        replace_node(model, node, insert.op("Cast", [levels], dtype=FP8, to=int(FP8)))
    elif node.op_type == "DequantizeLinear" and source.dtype == FP8:
        if source.const_value is not None:
            levels = insert.constant("levels", source.const_value.numpy().astype(np.float32))
        else:
            levels = insert.op("Cast", [source], dtype=ir.DataType.FLOAT, to=int(ir.DataType.FLOAT))
        replace_node(model, node, insert.op("Mul", [levels, _along_axis(insert, node, scale)]))


def _along_axis(insert: Inserter, node: ir.Node, scale: ir.Value) -> ir.Value:
    """The scale in a shape that multiplies the channels of the node's axis."""
    assert scale.const_value is not None
    array, source = scale.const_value.numpy(), node.inputs[0]
    assert source is not None
    if not array.ndim or source.shape is None:
        return scale
    axis, rank = node.attributes.get_int("axis", 1), len(source.shape)
    assert axis is not None
    return insert.constant("scale", array.reshape([-1 if a == axis % rank else 1 for a in range(rank)]))


def _widens(node: ir.Node, kinds: dict[ir.Value, ir.DataType | None]) -> bool:
    source = node.inputs[0]
    return source is not None and kinds.get(source) in HALVES


def _to_float32(value: ir.Value) -> None:
    if value.const_value is not None and value.const_value.dtype in HALVES:
        array = value.const_value.numpy().astype("float32")
        value.const_value = ir.tensor(array, name=value.name)
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _plain_attributes(node: ir.Node) -> None:
    for name in ("dtype", "output_dtype"):
        if name in node.attributes and node.attributes[name].as_int() in [int(h) for h in HALVES]:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    if node.op_type == "ConstantOfShape":
        tensor = node.attributes["value"].as_tensor()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype("float32")))


def _round(model: ir.Model, node: ir.Node, output: ir.Value, half: ir.DataType) -> None:
    """The node writes `output/exact`; two Casts make `output` of it."""
    uses = list(output.uses())
    exact = ir.Value(name=f"{output.name}/exact", shape=output.shape, type=ir.TensorType(ir.DataType.FLOAT))
    narrow = ir.Value(name=f"{output.name}/narrow", shape=output.shape, type=ir.TensorType(half))
    wide = ir.Value(name=output.name, shape=output.shape, type=ir.TensorType(ir.DataType.FLOAT))
    suffix = "" if output.index() == 0 else f"_{output.index()}"
    casts = [
        ir.node("Cast", [output], {"to": int(half)}, outputs=[narrow], name=f"{node.name}/rounded{suffix}"),
        ir.node("Cast", [narrow], {"to": int(ir.DataType.FLOAT)}, outputs=[wide], name=f"{node.name}/widened{suffix}"),
    ]
    model.graph.insert_after(node, casts)
    for user, index in uses:
        user.replace_input_with(index, wide)
    for index, graph_output in enumerate(list(model.graph.outputs)):
        if graph_output is output:
            model.graph.outputs[index] = wide
    output.name = exact.name
