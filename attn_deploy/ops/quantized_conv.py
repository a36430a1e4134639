"""QuantizedConv and QuantizedDepthwise: activation(conv(x) + residual) from 8-bit maps to 8-bit maps.

Maps as in quantized_map.py; weights symmetric per output channel, stored as unsigned levels around 128. The stride is
in the name and paddings are single numbers, since attributes of an operator's form are numbers.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from attn_deploy.ops import quantized_map as maps
from attn_deploy.ops.activation import ACTIVATIONS, statements
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require

FORM_ACTIVATIONS = ("", "Relu", "Silu", "Hardswish")
STRIDES = (1, 2)
PADS = ("pad_top", "pad_left", "pad_bottom", "pad_right")
MOST_TAPS = 15
"""Of a depthwise window, each way."""


def name_of(*, depthwise: bool, stride: int, residual: bool, activation: str) -> str:
    operator = "QuantizedDepthwise" if depthwise else "QuantizedConv"
    return operator + ("Stride2" if stride == 2 else "") + ("Residual" if residual else "") + activation


def _form(depthwise: bool, stride: int, residual: bool, activation: str) -> Form:
    def infer_shapes(x: Shape, weight: Shape, *others: Shape, **attributes: int) -> tuple[Shape, ...]:
        """x [batch, height, width, in], weight [out, kernel_height, kernel_width, in] (depthwise: 1 for in), per output
        weight_scale and bias, scales and zero points of x and y, and the residual [batch, out_height, out_width, out]
        with its own -> [batch, out_height, out_width, out]."""
        require(len(x) == 4 and len(weight) == 4, f"x and weight must have rank 4, got {x} and {weight}")
        inputs = 1 if depthwise else x[3]
        require(weight[3] == inputs, f"weight must be [out, height, width, {inputs}] for x {x}, got {weight}")
        require(not depthwise or weight[0] == x[3], f"a depthwise weight must be [{x[3]}, ...], got {weight}")
        out = weight[0]
        require(others[0] == (out,) and others[1] == (out,), f"weight_scale and bias must be [{out}]")
        maps.check("x", x[3] if depthwise else 1, *others[2:4])
        maps.check("y", out, *others[4:6])
        pads = [attributes[name] for name in PADS]
        height = (x[1] + pads[0] + pads[2] - weight[1]) // stride + 1
        width = (x[2] + pads[1] + pads[3] - weight[2]) // stride + 1
        require(height > 0 and width > 0, f"weight {weight} does not fit into x {x} with padding {pads}")
        shape = (x[0], height, width, out)
        if residual:
            require(others[6] == shape, f"residual must be {shape}, got {others[6]}")
            maps.check("residual", out, *others[7:9])
        return (shape,)

    def reference(
        x: Array, weight: Array, weight_scale: Array, bias: Array, x_scale: Array, x_zero: Array, y_scale: Array,
        y_zero: Array, *others: Array, **attributes: int,
    ) -> tuple[Array, ...]:  # fmt: skip
        pads = [attributes[name] for name in PADS]
        values = np.pad(maps.real(x, x_scale, x_zero), ((0, 0), (pads[0], pads[2]), (pads[1], pads[3]), (0, 0)))
        weights = (weight.astype(np.float64) - maps.WEIGHT_ZERO) * weight_scale.astype(np.float64)[:, None, None, None]
        windows = np.lib.stride_tricks.sliding_window_view(values, weight.shape[1:3], axis=(1, 2))
        windows = windows[:, ::stride, ::stride]  # [batch, out_height, out_width, in, kernel_height, kernel_width]
        result = (
            np.einsum("bhwckl,ckl->bhwc", windows, weights[..., 0])
            if depthwise
            else np.einsum("bhwckl,oklc->bhwo", windows, weights, optimize=True)
        )
        result = result + bias.astype(np.float64)
        if residual:
            result = result + maps.real(*others)
        return (maps.levels_of(ACTIVATIONS[activation](result), y_scale, y_zero),)

    inputs = [Input("x", "uint8"), Input("weight", "uint8"), Input("weight_scale"), Input("bias")]
    inputs += [*maps.inputs_of("x"), *maps.inputs_of("y")]
    inputs += [Input("residual", "uint8"), *maps.inputs_of("residual")] if residual else []
    return Form(
        operator="QuantizedDepthwise" if depthwise else "QuantizedConv",
        name=name_of(depthwise=depthwise, stride=stride, residual=residual, activation=activation),
        inputs=tuple(inputs),
        outputs=("output",),
        attributes=dict.fromkeys((*PADS, "channels") if depthwise else PADS, int),
        body=_body(depthwise, stride, residual, activation),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=lambda x, weight, *others, **attributes: (
            math.prod(infer_shapes(x, weight, *others, **attributes)[0]) * math.prod(weight[1:])
        ),
        output_dtype="uint8",
    )


def _body(depthwise: bool, stride: int, residual: bool, activation: str) -> str:
    """Convolution of ONNX on what the levels stand for, channels first. Padding is done on the levels."""
    pads = [f"{name} = Constant <value_int: int = @{name}> ()" for name in PADS]
    groups = ", group: int = @channels" if depthwise else ""  # as many groups as channels
    return lines(
        *maps.constants(),
        "x_first = Transpose <perm: ints = [0, 3, 1, 2]> (x)",
        *pads,
        "none = Constant <value_int: int = 0> ()",
        *(f"{name}_1 = Unsqueeze ({name}, map_first)" for name in ("none", *PADS)),
        "pads = Concat <axis: int = 0> (none_1, none_1, pad_top_1, pad_left_1, none_1, none_1, pad_bottom_1, "
        "pad_right_1)",
        "padding = Squeeze (x_zero, map_first)",
        "padded = Pad (x_first, pads, padding)",
        *maps.real_statements("padded", "x", "real", channels_first=True),
        "weight_first = Transpose <perm: ints = [0, 3, 1, 2]> (weight)",
        f"weight_zero = Constant <value_int: int = {maps.WEIGHT_ZERO}> ()",
        "weight_zero_u8 = Cast <to: int = 2> (weight_zero)",
        "weight_count = Shape (weight_scale)",
        "weight_zeros = Expand (weight_zero_u8, weight_count)",
        "weights = DequantizeLinear <axis: int = 0> (weight_first, weight_scale, weight_zeros)",
        f"sum = Conv <strides: ints = [{stride}, {stride}]{groups}> (real, weights, bias)",
        *_end_statements(residual, activation),
        "output = Transpose <perm: ints = [0, 2, 3, 1]> (levels)",
    )


def _end_statements(residual: bool, activation: str) -> tuple[str, ...]:
    """From `sum` to `levels`, channels first."""
    steps: list[str] = []
    value = "sum"
    if residual:
        steps.append("residual_first = Transpose <perm: ints = [0, 3, 1, 2]> (residual)")
        steps += maps.real_statements("residual_first", "residual", "residual_real", channels_first=True)
        steps.append("total = Add (sum, residual_real)")
        value = "total"
    if activation:
        steps += statements(activation, value, "activated")
        value = "activated"
    return (*steps, *maps.levels_statements(value, "y", "levels", channels_first=True))


FORMS = tuple(
    _form(depthwise, stride, residual, activation)
    for depthwise, stride, residual, activation in itertools.product(
        (False, True), STRIDES, (False, True), FORM_ACTIVATIONS
    )
    if stride == 1 or not residual
)
