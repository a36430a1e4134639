"""QuantizedLinear: residual + activation(norm(x) @ weight + bias) with weight and rows in 8 bits.

The forms of Linear, each with a scale behind its weight. `quantized.py` says how rows are quantized; the norm is
applied before, so that what it makes larger or smaller (SmoothQuant) is what is quantized.
"""

from __future__ import annotations

import itertools

import numpy as np

from attn_deploy.ops import activation as activations
from attn_deploy.ops import layer_norm, linear, quantized
from attn_deploy.ops.form import Array, Form, Input, Shape, lines


def name_of(norm: bool, activation: str, residual: bool) -> str:
    return "Quantized" + linear.name_of(norm, activation, residual)


def multiply_adds(x: Shape, weight: Shape, *others: Shape, epsilon: float = 0.0) -> int:
    return linear.multiply_adds(x, weight)


def _form(floating: Form, norm: bool, activation: str, residual: bool) -> Form:
    def infer_shapes(
        x: Shape, weight: Shape, weight_scale: Shape, bias: Shape, *others: Shape, epsilon: float = 0.0
    ) -> tuple[Shape, ...]:
        """As Linear's, and weight_scale [out]."""
        shapes: tuple[Shape, ...] = floating.infer_shapes(x, weight, bias, *others)
        quantized.check(weight, weight_scale)
        return shapes

    def reference(
        x: Array, weight: Array, weight_scale: Array, bias: Array, *others: Array, epsilon: float = 0.0
    ) -> tuple[Array, ...]:
        rows = layer_norm.reference(x, others[0], others[1], epsilon) if norm else x
        result = quantized.product(rows, weight, weight_scale) + bias.astype(np.float64)
        result = activations.ACTIVATIONS[activation](result)
        return (result + others[-1].astype(np.float64) if residual else result,)

    x, weight, *others = floating.inputs
    steps = [layer_norm.statement("x", "rows")] if norm else []
    plain = not activation and not residual
    steps += quantized.linear_statements("rows" if norm else "x", "weight", "bias", "q", "output" if plain else "sum")
    if activation:
        steps += activations.statements(activation, "sum", "activated" if residual else "output")
    if residual:
        steps.append(f"output = Add ({'activated' if activation else 'sum'}, residual)")
    return Form(
        operator="QuantizedLinear",
        name=name_of(norm, activation, residual),
        inputs=(x, Input(weight.name, "uint8"), Input("weight_scale"), *others),
        outputs=floating.outputs,
        attributes=floating.attributes,
        body=lines(*quantized.constants(), *steps),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = tuple(
    _form(floating, *parts)
    for floating, parts in zip(
        linear.FORMS, itertools.product((False, True), activations.ACTIVATIONS, (False, True)), strict=True
    )
)
