"""Which operands of a node may be half floats, and the types of all values: by the operators' ONNX schemas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes.common import LiftConstantsToInitializersPass, ShapeInferencePass

from attn_deploy.export.opset import raise_opset
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.session import Array
from attn_deploy.target import Precision

HALF_TYPES = {Precision.FP16: ir.DataType.FLOAT16, Precision.BF16: ir.DataType.BFLOAT16}

LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: float(np.ldexp(2 - 2**-7, 127))}
"""The largest finite value of a half type."""

MIN_BF16_OPSET = 22
"""From here on convolutions and pools have a BF16 form in ONNX; before it matrix products and norms alone."""

CONTRIB = frozenset(
    {"Attention", "MultiHeadAttention", "PackedAttention", "PackedMultiHeadAttention", "GroupQueryAttention",
     "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization",
     "BiasGelu", "FastGelu", "QuickGelu", "Gelu", "BiasSplitGelu", "BiasAdd", "FusedMatMul", "FusedConv", "NhwcConv",
     "GroupNorm", "SkipGroupNorm", "RelativePositionBias", "GatedRelativePositionBias", "BiasDropout", "MatMulNBits"}
)  # fmt: skip
"""Operators of com.microsoft (SimplifiedLayerNormalization: of ONNX Runtime's own in the ONNX domain) whose float
operands share one type, half included."""

_FP32_OPERANDS: dict[str, tuple[frozenset[int], frozenset[int]]] = {
    "LayerNormalization": (frozenset(), frozenset({1, 2})),  # mean and inverse deviation have stash_type's type
    "SkipLayerNormalization": (frozenset(), frozenset({1, 2})),
    "SkipSimplifiedLayerNormalization": (frozenset(), frozenset({1, 2})),
    "SimplifiedLayerNormalization": (frozenset(), frozenset({1})),
    "Resize": (frozenset({1, 2}), frozenset()),  # region and factors
    "GroupQueryAttention": (frozenset({12, 13}), frozenset()),  # scales of a quantized cache
}
"""Inputs and outputs that stay FP32 where the node is half."""


@dataclass(frozen=True)
class Operands:
    """Positions of the float inputs and outputs of a node that take the half type together."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def half_operands(node: ir.Node, half: ir.DataType, opset: int, own: frozenset[str]) -> Operands | None:
    """What becomes half with the node; None when the operator has no form of that type. `own`: names of operators of
    our domain with a half kernel."""
    inputs = {i for i, value in enumerate(node.inputs) if is_float(value)}
    outputs = {i for i, value in enumerate(node.outputs) if is_float(value)}
    schema = _schema(node, opset)
    if schema is not None:
        inputs = {i for i in inputs if _allows(schema, schema.inputs, i, half)}
        outputs = {i for i in outputs if _allows(schema, schema.outputs, i, half)}
    elif not (node.op_type in own if node.domain == "attn_deploy" else node.op_type in CONTRIB):
        return None
    fp32_inputs, fp32_outputs = _FP32_OPERANDS.get(node.op_type, (frozenset(), frozenset()))
    inputs, outputs = inputs - fp32_inputs, outputs - fp32_outputs
    return Operands(frozenset(inputs), frozenset(outputs)) if inputs or outputs else None


def _schema(node: ir.Node, opset: int) -> defs.OpSchema | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return defs.get_schema(node.op_type, opset, "")
    except defs.SchemaError:
        return None


def _allows(
    schema: defs.OpSchema, parameters: Sequence[defs.OpSchema.FormalParameter], index: int, half: ir.DataType
) -> bool:
    name = f"tensor({half.name.lower()})"
    kind = parameters[min(index, len(parameters) - 1)].type_str  # the last one may stand for several
    return any(c.type_param_str == kind and name in c.allowed_type_strs for c in schema.type_constraints)


def prepare(model: ir.Model, half: ir.DataType) -> int:
    """Float constants become initializers and every value gets its type, in place; returns the opset, which is raised
    for BF16 where that changes nothing but types."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    drop_unused_initializers(model)
    if half == ir.DataType.BFLOAT16 and not model.functions:
        raise_opset(model, MIN_BF16_OPSET)
    ShapeInferencePass(strict_mode=False)(model)
    opset = model.opset_imports[""]
    for value in model.graph.initializers.values():
        if value.dtype is None and value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
    for node in model.graph:
        for index, output in enumerate(node.outputs):
            if output.type is None and (dtype := _output_type(node, index, opset)) is not None:
                output.type = ir.TensorType(dtype)
    return opset


def _output_type(node: ir.Node, index: int, opset: int) -> ir.DataType | None:
    """For what ONNX's own inference left open: it knows no operator of another domain, and stops behind one."""
    stated = node.attributes.get("to") or node.attributes.get("dtype") or node.attributes.get("output_dtype")
    if stated is not None and stated.as_int():
        return ir.DataType(stated.as_int())
    if node.op_type == "QuantizeLinear":
        zero_point = node.inputs[2] if len(node.inputs) > 2 else None
        return ir.DataType.UINT8 if zero_point is None else zero_point.dtype
    if node.op_type == "DequantizeLinear":
        return node.inputs[1].dtype if node.inputs[1] is not None else None
    if node.op_type == "ConstantOfShape":
        return node.attributes["value"].as_tensor().dtype if "value" in node.attributes else ir.DataType.FLOAT
    schema = _schema(node, opset)
    if schema is None:
        return next((i.dtype for i in node.inputs if i is not None and i.dtype is not None), None)
    kind = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    if kind.startswith("tensor("):
        return ir.DataType.from_numpy(onnx.helper.tensor_dtype_to_np_dtype(_elem_type(kind)))
    for i, value in enumerate(node.inputs):
        if value is not None and schema.inputs[min(i, len(schema.inputs) - 1)].type_str == kind:
            return value.dtype
    return ir.DataType.FLOAT  # the statistics of a LayerNormalization


def _elem_type(kind: str) -> int:
    name = kind.removeprefix("tensor(").removesuffix(")")
    return int(onnx.TensorProto.DataType.Value(name.upper()))


def rounded(array: Array, half: ir.DataType) -> Array:
    """The values as the half type holds them; float32 and beyond its range infinite, as in a Cast."""
    with np.errstate(over="ignore"):
        return np.asarray(array.astype(half.numpy()))
