"""8-bit maps [batch, height, width, channels]: what the operators on them share.

A level stands for scale * (level - zero), with one zero point and a scale for all channels or for each: static, found
by calibration (Jacob et al. 2018, section 2.1). Channels are last, so that a pixel's are one run of bytes.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Input, Shape, require

WEIGHT_ZERO = 128
"""What a weight of 0 is stored as, as in quantized.py."""

LEVELS = 255

Levels = tuple[Array, Array]
"""scale float32 [1] or [channels], zero uint8 [1]."""


def real(levels: Array, scale: Array, zero: Array) -> Array:
    """What a map stands for, in float64."""
    return (levels.astype(np.float64) - zero.astype(np.float64)) * scale.astype(np.float64)


def levels_of(values: Array, scale: Array, zero: Array) -> Array:
    """The nearest level of each number, uint8."""
    levels = np.rint(values / scale.astype(np.float64)) + zero.astype(np.float64)
    return np.clip(levels, 0, LEVELS).astype(np.uint8)


def inputs_of(name: str) -> tuple[Input, Input]:
    return Input(f"{name}_scale"), Input(f"{name}_zero", "uint8")


def check(name: str, channels: int, scale: Shape, zero: Shape) -> None:
    require(scale in ((1,), (channels,)), f"{name}_scale must be [1] or [{channels}], got {scale}")
    require(zero == (1,), f"{name}_zero must be [1], got {zero}")


def zeros_statements(name: str) -> tuple[str, ...]:
    """{name}_zeros: the zero point once for each scale, as QuantizeLinear and DequantizeLinear of ONNX have them."""
    return (f"{name}_count = Shape ({name}_scale)", f"{name}_zeros = Expand ({name}_zero, {name}_count)")


def real_statements(levels: str, name: str, axis: int, result: str) -> tuple[str, ...]:
    """`result` = what `levels` stand for, by the inputs {name}_scale and {name}_zero."""
    return (
        *zeros_statements(name),
        f"{result} = DequantizeLinear <axis: int = {axis}> ({levels}, {name}_scale, {name}_zeros)",
    )


def levels_statements(values: str, name: str, axis: int, result: str) -> tuple[str, ...]:
    return (
        *zeros_statements(name),
        f"{result} = QuantizeLinear <axis: int = {axis}> ({values}, {name}_scale, {name}_zeros)",
    )
