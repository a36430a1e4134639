"""QuantizedGate: activation(x * gate + residual) on 8-bit maps; QuantizedChannelPool: the means of their channels.

The forms of Gate with a gate per channel in float32, which the pool and a few layers on one pixel make. Maps as in
quantized_map.py; the pool's result and the gate are channels first, as those layers have them.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from attn_deploy.ops import quantized_map as maps
from attn_deploy.ops.activation import ACTIVATIONS, statements
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require
from attn_deploy.ops.gate import FORM_ACTIVATIONS


def name_of(*, residual: bool, activation: str) -> str:
    return "QuantizedGate" + ("Residual" if residual else "") + activation


def _check(x: Shape, channels: int) -> None:
    require(len(x) == 4 and x[3] == channels, f"x must be [batch, height, width, {channels}], got {x}")


def _gate(residual: bool, activation: str) -> Form:
    def infer_shapes(x: Shape, gate: Shape, *others: Shape, channels: int) -> tuple[Shape, ...]:
        """x and residual [batch, height, width, channels], gate [batch, channels, 1, 1]."""
        _check(x, channels)
        require(gate == (x[0], channels, 1, 1), f"gate must be [{x[0]}, {channels}, 1, 1], got {gate}")
        maps.check("x", channels, *others[:2])
        maps.check("y", channels, *others[2:4])
        if residual:
            require(others[4] == x, f"residual must be {x}, got {others[4]}")
            maps.check("residual", channels, *others[5:7])
        return (x,)

    def reference(
        x: Array, gate: Array, x_scale: Array, x_zero: Array, y_scale: Array, y_zero: Array, *others: Array,
        channels: int,
    ) -> tuple[Array, ...]:  # fmt: skip
        total = maps.real(x, x_scale, x_zero) * gate.astype(np.float64).transpose(0, 2, 3, 1)
        if residual:
            total = total + maps.real(*others)
        return (maps.levels_of(ACTIVATIONS[activation](total), y_scale, y_zero),)

    steps = [
        *maps.constants(),
        *maps.real_statements("x", "x", "real", channels_first=False),
        "gate_last = Transpose <perm: ints = [0, 2, 3, 1]> (gate)",
        "gated = Mul (real, gate_last)",
    ]
    value = "gated"
    if residual:
        steps += maps.real_statements("residual", "residual", "residual_real", channels_first=False)
        steps.append("total = Add (gated, residual_real)")
        value = "total"
    if activation:
        steps += statements(activation, value, "activated")
        value = "activated"
    inputs = [Input("x", "uint8"), Input("gate"), *maps.inputs_of("x"), *maps.inputs_of("y")]
    inputs += [Input("residual", "uint8"), *maps.inputs_of("residual")] if residual else []
    return Form(
        operator="QuantizedGate",
        name=name_of(residual=residual, activation=activation),
        inputs=tuple(inputs),
        outputs=("output",),
        attributes={"channels": int},
        body=lines(*steps, *maps.levels_statements(value, "y", "output", channels_first=False)),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=lambda x, *others, **attributes: math.prod(x),
        output_dtype="uint8",
    )


def _pool_shapes(x: Shape, scale: Shape, zero: Shape, *, channels: int) -> tuple[Shape, ...]:
    """x [batch, height, width, channels] -> float32 [batch, channels, 1, 1]."""
    _check(x, channels)
    maps.check("x", channels, scale, zero)
    return ((x[0], channels, 1, 1),)


def _pool_reference(x: Array, scale: Array, zero: Array, *, channels: int) -> tuple[Array, ...]:
    return (maps.real(x, scale, zero).mean(axis=(1, 2))[:, :, None, None],)


POOL = Form(
    operator="QuantizedChannelPool",
    name="QuantizedChannelPool",
    inputs=(Input("x", "uint8"), *maps.inputs_of("x")),
    outputs=("output",),
    attributes={"channels": int},
    body=lines(
        *maps.constants(),
        *maps.real_statements("x", "x", "real", channels_first=False),
        "real_first = Transpose <perm: ints = [0, 3, 1, 2]> (real)",
        "output = GlobalAveragePool (real_first)",
    ),
    reference=_pool_reference,
    infer_shapes=_pool_shapes,
    multiply_adds=lambda x, *others, **attributes: math.prod(x),
)

FORMS = (*(_gate(*flags) for flags in itertools.product((False, True), FORM_ACTIVATIONS)), POOL)
