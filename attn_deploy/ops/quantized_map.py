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


def constants() -> tuple[str, ...]:
    """Statements whose results the others read: once in a body, first."""
    return (
        "map_one = Constant <value_float: float = 1.0> ()",
        "map_first = Constant <value_ints: ints = [0]> ()",
        "map_channel = Constant <value_ints: ints = [-1, 1, 1]> ()",
    )


def _scale_statements(name: str, *, channels_first: bool) -> tuple[str, ...]:
    """{name}_each, which broadcasts over a map, and {name}_zero_point, a scalar.

    Scales are multiplied beside DequantizeLinear and QuantizeLinear: ONNX Runtime makes one operator of a convolution
    between two of these, and refuses to run it where they have a scale for each channel.
    """
    each = f"Reshape ({name}_scale, map_channel)" if channels_first else f"Identity ({name}_scale)"
    return (f"{name}_each = {each}", f"{name}_zero_point = Squeeze ({name}_zero, map_first)")


def real_statements(levels: str, name: str, result: str, *, channels_first: bool) -> tuple[str, ...]:
    """`result` = what `levels` stand for, by the inputs {name}_scale and {name}_zero."""
    return (
        *_scale_statements(name, channels_first=channels_first),
        f"{name}_steps = DequantizeLinear ({levels}, map_one, {name}_zero_point)",
        f"{result} = Mul ({name}_steps, {name}_each)",
    )


def levels_statements(values: str, name: str, result: str, *, channels_first: bool) -> tuple[str, ...]:
    return (
        *_scale_statements(name, channels_first=channels_first),
        f"{name}_steps = Div ({values}, {name}_each)",
        f"{result} = QuantizeLinear ({name}_steps, map_one, {name}_zero_point)",
    )
