"""Gate: activation(x * gate + residual), the tail of SE, ECA, CBAM, coordinate, pixel and residual attention.

Squeeze-and-excitation: Hu et al. 2018, equation 4 (scale), followed by the residual add and ReLU of its ResNet.
"""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.ops.activation import ACTIVATIONS
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require

FORM_ACTIVATIONS = ("", "Relu", "Silu")

_ACTIVATION_STATEMENTS = {
    "": ("output = Identity (sum)",),
    "Relu": ("output = Relu (sum)",),
    "Silu": ("sigmoid = Sigmoid (sum)", "output = Mul (sum, sigmoid)"),
}


def infer_shapes(x: Shape, gate: Shape, *residual: Shape) -> tuple[Shape, ...]:
    """gate has x's rank and broadcasts to it: per channel, per pixel or full; residual has x's shape."""
    fits = len(gate) == len(x) and all(g in (1, d) for g, d in zip(gate, x, strict=True))
    require(fits, f"gate {gate} does not broadcast to x {x}")
    require(all(r == x for r in residual), f"residual {residual} differs from x {x}")
    return (x,)


def multiply_adds(x: Shape, gate: Shape, *residual: Shape) -> int:
    return math.prod(x)


def _form(with_residual: bool, activation: str) -> Form:
    def reference(x: Array, gate: Array, *residual: Array) -> tuple[Array, ...]:
        total = x.astype(np.float64) * gate.astype(np.float64)
        if residual:
            total = total + residual[0].astype(np.float64)
        return (ACTIVATIONS[activation](total),)

    if with_residual:
        statements = ("gated = Mul (x, gate)", "sum = Add (gated, residual)", *_ACTIVATION_STATEMENTS[activation])
    else:
        statements = ("sum = Mul (x, gate)", *_ACTIVATION_STATEMENTS[activation])
    if not activation:  # no Identity at the end
        statements = (*statements[:-2], statements[-2].replace("sum =", "output ="))
    return Form(
        operator="Gate",
        name="Gate" + ("Residual" if with_residual else "") + activation,
        inputs=(Input("x"), Input("gate"), *((Input("residual"),) if with_residual else ())),
        outputs=("output",),
        attributes={},
        body=lines(*statements),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = tuple(_form(residual, activation) for residual in (False, True) for activation in FORM_ACTIVATIONS)
