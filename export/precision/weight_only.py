"""Linear layers whose weights are INT8 in blocks of inputs: com.microsoft's MatMulNBits with 8 bits.

Each output has a scale for every BLOCK inputs, so that an outlier spoils its own block alone, and nothing needs
calibration. With accuracy level 4 ONNX Runtime quantizes the activations by the same blocks (symmetric, at run time)
and multiplies integers; the file holds floats nowhere but in scales and biases. vit_tiny with its trained weights, 96
photographs: 32.7 dB, and a third of the file. On two cores with AVX-512 VNNI it takes as long as ONNX Runtime's FP32
(0.99 of its speed; in blocks of 64 1.12 with 4 dB less, with products in FP32, level 1, 0.74).

On x86 the kernel for 8 bits came with ONNX Runtime 1.22 (microsoft/onnxruntime#24491): 1.21.1 and older refuse the
model when it is opened.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from msgspec.structs import replace

from attn_deploy.export.precision.insert import Inserter, replace_node
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.session import Array

BITS = 8
BLOCK = 32
"""Inputs: larger blocks are faster by a tenth at most, and lose 3 to 4 dB."""

LARGEST = 127
ZERO_POINT = 128
"""What MatMulNBits takes 8 bits to be stored around when it is given no zero points."""

MULTIPLY_INTEGERS = 4
"""`accuracy_level`: activations are rounded to 8 bits, sums are int32."""

MS = "com.microsoft"


def weight_only_plan(plan: PrecisionPlan) -> PrecisionPlan:
    """The plan with weights in blocks wherever it has activations per token."""
    layers = tuple(replace(p, scheme=Scheme.WEIGHT_ONLY) if p.scheme is Scheme.PER_TOKEN else p for p in plan.layers)
    return replace(plan, layers=layers)


def quantize_in_blocks(weight: Array, block: int = BLOCK) -> tuple[Array, Array]:
    """float32 [in, out] -> (uint8 [out, blocks, block], float32 scale [out, blocks]), symmetric around 128.

    The last block is filled up with zeros; a block of zeros has scale 1.
    """
    rows, columns = weight.shape
    blocks = -(-rows // block)
    padded = np.zeros((columns, blocks * block), np.float32)
    padded[:, :rows] = weight.T
    padded = padded.reshape(columns, blocks, block)
    largest = np.abs(padded).max(axis=2)
    scale = np.where(largest > 0, np.maximum(largest / LARGEST, np.finfo(np.float32).tiny), 1).astype(np.float32)
    levels = np.clip(np.rint(padded / scale[..., None]), -LARGEST, LARGEST)
    return (levels + ZERO_POINT).astype(np.uint8), scale


def quantize_blocks(model: ir.Model, node: ir.Node) -> None:
    """Replaces a MatMul or plain Gemm with a constant weight [in, out] (transB: [out, in]), in place; a constant bias
    behind it goes into the operator."""
    weight_value = node.inputs[1]
    assert weight_value is not None
    assert weight_value.const_value is not None
    weight = weight_value.const_value.numpy()
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
        weight = weight.T
    levels, scale = quantize_in_blocks(weight)
    insert = Inserter(model, node)
    inputs: list[ir.Value | None] = [
        node.inputs[0], insert.constant("weight_blocks", levels), insert.constant("weight_scale", scale.ravel()),
    ]  # fmt: skip
    added, last = _bias(node, weight.shape[1])
    if added is not None and _is_vector(added, weight.shape[1]):
        inputs += [None, None, added]  # no zero points, no permuted inputs
        added = None
    result = insert.op(
        "MatMulNBits", inputs, domain=MS, dtype=ir.DataType.FLOAT, K=weight.shape[0], N=weight.shape[1], bits=BITS,
        block_size=BLOCK, accuracy_level=MULTIPLY_INTEGERS,
    )  # fmt: skip
    if added is not None:
        result = insert.op("Add", [result, added], dtype=ir.DataType.FLOAT)
    replace_node(model, last, result)
    if last is not node:
        model.graph.remove(node, safe=True)


def _bias(node: ir.Node, width: int) -> tuple[ir.Value | None, ir.Node]:
    """The bias, and the node that adds it: Gemm itself, or the only reader of a product."""
    if node.op_type == "Gemm":
        return node.inputs[2] if len(node.inputs) > 2 else None, node
    output = node.outputs[0]
    readers = [user for user, _ in output.uses()]
    if len(readers) != 1 or output.is_graph_output() or readers[0].op_type != "Add" or readers[0].domain:
        return None, node
    other = next((i for i in readers[0].inputs if i is not None and i is not output), None)
    return (other, readers[0]) if other is not None and _is_vector(other, width) else (None, node)


def _is_vector(value: ir.Value, width: int) -> bool:
    return value.const_value is not None and tuple(value.const_value.shape) == (width,)
