"""Linear layers in 8 bits, as parts of operators: what their references and bodies share.

Weights are symmetric per output channel, stored as unsigned levels around 128. Activations are quantized row by row at
run time: scale = (high - low) / 255 and zero = round(-low / scale) over the row and 0 (Jacob et al. 2018, section 2.1,
per row; DynamicQuantizeLinear of ONNX is the same for a whole tensor). Integer sums are exact.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Shape, require

WEIGHT_ZERO = 128
"""What a weight of 0 is stored as. So that a body can use MatMulInteger on unsigned operands, whose kernels of ONNX
Runtime saturate on no CPU; those of unsigned by signed ones do without VNNI."""

LEVELS = 255
"""The largest level of an activation."""

MAX_INPUTS = 65_536
"""Of one product: its sum, of terms up to 255 x 127, fits into 32 bits."""


def rows_of_levels(rows: Array) -> Array:
    """Rows [..., in] as a product reads them: scale * (level - zero), in float64. A row that holds NaN or infinity is
    NaN."""
    low = np.minimum(rows.min(axis=-1, keepdims=True), 0.0)
    high = np.maximum(rows.max(axis=-1, keepdims=True), 0.0)
    finite = np.isfinite(rows).all(axis=-1, keepdims=True)
    scale = np.where(finite, (high - low) / LEVELS, 0.0)
    steps = np.where(scale > 0, scale, 1.0)
    zero = np.rint(-np.where(finite, low, 0.0) / steps)
    levels = np.clip(np.rint(np.where(finite, rows, 0.0) / steps) + zero, 0, LEVELS)
    return np.where(finite, scale * (levels - zero), np.nan)


def product(rows: Array, weight: Array, weight_scale: Array) -> Array:
    """rows [..., in], weight uint8 [in, out], weight_scale [out] -> [..., out] in float64."""
    return rows_of_levels(rows.astype(np.float64)) @ weights(weight, weight_scale)


def stored(quantized: Array) -> Array:
    """Signed levels, -127 to 127, as the operators take them."""
    return (quantized.astype(np.int16) + WEIGHT_ZERO).astype(np.uint8)


def weights(weight: Array, weight_scale: Array) -> Array:
    """What the stored levels stand for, in float64."""
    return (weight.astype(np.float64) - WEIGHT_ZERO) * weight_scale.astype(np.float64)


def check(weight: Shape, weight_scale: Shape) -> None:
    """weight [in, out], weight_scale [out]."""
    require(weight_scale == weight[1:], f"weight_scale must be [{weight[1]}] for weight {weight}, got {weight_scale}")
    require(weight[0] <= MAX_INPUTS, f"a weight has at most {MAX_INPUTS} inputs, got {weight}")


def constants() -> tuple[str, ...]:
    """Statements whose results the others read: once in a body, first."""
    return (
        "int8_none = Constant <value_float: float = 0.0> ()",
        "int8_one = Constant <value_float: float = 1.0> ()",
        f"int8_levels = Constant <value_float: float = {LEVELS}.0> ()",
        "int8_last = Constant <value_ints: ints = [-1]> ()",
        "int8_none_u8 = Cast <to: int = 2> (int8_none)",
        f"int8_weight_zero = Constant <value_int: int = {WEIGHT_ZERO}> ()",
        "int8_weight_zero_u8 = Cast <to: int = 2> (int8_weight_zero)",
        "int8_weight_zero_i32 = Cast <to: int = 6> (int8_weight_zero)",
    )


def row_statements(rows: str, tag: str) -> tuple[str, ...]:
    """Of `rows` [..., in]: {tag}_levels uint8 [..., in], {tag}_scale float32 and {tag}_zero int32, both [..., 1].

    Rows are flattened for QuantizeLinear, which takes a scale for each along one axis. The sum of a row times 0 makes
    NaN of its scale where it holds NaN or infinity: ONNX Runtime's ReduceMin and ReduceMax pass over NaN.
    """
    return (
        f"{tag}_min = ReduceMin <keepdims: int = 1> ({rows}, int8_last)",
        f"{tag}_max = ReduceMax <keepdims: int = 1> ({rows}, int8_last)",
        f"{tag}_low = Min ({tag}_min, int8_none)",
        f"{tag}_high = Max ({tag}_max, int8_none)",
        f"{tag}_span = Sub ({tag}_high, {tag}_low)",
        f"{tag}_step = Div ({tag}_span, int8_levels)",
        f"{tag}_nothing = Mul ({rows}, int8_none)",
        f"{tag}_finite = ReduceSum <keepdims: int = 1> ({tag}_nothing, int8_last)",
        f"{tag}_scale = Add ({tag}_step, {tag}_finite)",
        f"{tag}_some = Greater ({tag}_scale, int8_none)",
        f"{tag}_divisor = Where ({tag}_some, {tag}_scale, int8_one)",
        f"{tag}_below = Div ({tag}_low, {tag}_divisor)",
        f"{tag}_above = Neg ({tag}_below)",
        f"{tag}_middle = Round ({tag}_above)",
        f"{tag}_zero = Cast <to: int = 6> ({tag}_middle)",
        f"{tag}_zero_u8 = Cast <to: int = 2> ({tag}_zero)",
        f"{tag}_divisors = Reshape ({tag}_divisor, int8_last)",
        f"{tag}_zeros = Reshape ({tag}_zero_u8, int8_last)",
        f"{tag}_flat = Flatten <axis: int = -1> ({rows})",
        f"{tag}_flat_levels = QuantizeLinear <axis: int = 0> ({tag}_flat, {tag}_divisors, {tag}_zeros)",
        f"{tag}_shape = Shape ({rows})",
        f"{tag}_levels = Reshape ({tag}_flat_levels, {tag}_shape)",
    )


def product_statements(weight: str, tag: str) -> tuple[str, ...]:
    """{tag}_scaled [..., out]: scale * (levels - zero) @ (weight - 128), of the rows that `row_statements` named `tag`;
    the weight's own scale is left out. `weight` is [in, out], or [groups, in, out] for rows [groups, rows, in].

    The zero points of rows are taken out behind the product, by the sums of the weight's columns: MatMulInteger of ONNX
    Runtime has one zero point for all rows.
    """
    return (
        f"{tag}_inputs = Constant <value_ints: ints = [-2]> ()",
        f"{tag}_integers = MatMulInteger ({tag}_levels, {weight}, int8_none_u8, int8_weight_zero_u8)",
        f"{tag}_stored = Cast <to: int = 6> ({weight})",
        f"{tag}_weight = Sub ({tag}_stored, int8_weight_zero_i32)",
        f"{tag}_sums = ReduceSum <keepdims: int = 1> ({tag}_weight, {tag}_inputs)",
        f"{tag}_of_zero = Mul ({tag}_zero, {tag}_sums)",
        f"{tag}_exact = Sub ({tag}_integers, {tag}_of_zero)",
        f"{tag}_real = Cast <to: int = 1> ({tag}_exact)",
        f"{tag}_scaled = Mul ({tag}_real, {tag}_scale)",
    )


def linear_statements(rows: str, weight: str, bias: str, tag: str, result: str) -> tuple[str, ...]:
    """`result` = rows @ weight + bias; the scale of `weight` is named {weight}_scale."""
    return (
        *row_statements(rows, tag),
        *product_statements(weight, tag),
        f"{tag}_product = Mul ({tag}_scaled, {weight}_scale)",
        f"{result} = Add ({tag}_product, {bias})",
    )
