"""FeedForward: x + activation(norm(x) @ weight1 + bias1) @ weight2 + bias2, the pre-norm feed-forward block.

Vaswani et al., Attention Is All You Need, 2017, equation 2, with the norm in front (Xiong et al., On Layer
Normalization in the Transformer Architecture, 2020, figure 1b). A layer scale is part of weight2 and bias2.
"""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.ops import activation as activations
from attn_deploy.ops import layer_norm, linear
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require

FORM_ACTIVATIONS = ("Gelu", "Relu", "Silu", "GeluTanh")


def infer_shapes(
    x: Shape, norm_scale: Shape, norm_bias: Shape, weight1: Shape, bias1: Shape, weight2: Shape, bias2: Shape,
    *, epsilon: float,
) -> tuple[Shape, ...]:  # fmt: skip
    """x [..., channels], norm_scale and norm_bias [channels], weight1 [channels, hidden], bias1 [hidden],
    weight2 [hidden, channels], bias2 [channels] -> [..., channels]."""
    linear.check(x, weight1, bias1)
    linear.check((*x[:-1], weight1[1]), weight2, bias2)
    layer_norm.check(x, norm_scale, norm_bias)
    require(weight2[1] == x[-1], f"weight2 must be [{weight1[1]}, {x[-1]}] for x {x}, got {weight2}")
    return (x,)


def multiply_adds(x: Shape, *others: Shape, epsilon: float) -> int:
    return 2 * math.prod(x) * others[2][1]


def _form(activation: str) -> Form:
    def reference(
        x: Array, norm_scale: Array, norm_bias: Array, weight1: Array, bias1: Array, weight2: Array, bias2: Array,
        *, epsilon: float,
    ) -> tuple[Array, ...]:  # fmt: skip
        rows = layer_norm.reference(x, norm_scale, norm_bias, epsilon)
        hidden = activations.ACTIVATIONS[activation](rows @ weight1.astype(np.float64) + bias1.astype(np.float64))
        return (x.astype(np.float64) + hidden @ weight2.astype(np.float64) + bias2.astype(np.float64),)

    return Form(
        operator="FeedForward",
        name="FeedForward" + activation,
        inputs=tuple(Input(n) for n in ("x", "norm_scale", "norm_bias", "weight1", "bias1", "weight2", "bias2")),
        outputs=("output",),
        attributes={"epsilon": float},
        body=lines(
            layer_norm.statement("x", "rows"),
            "product1 = MatMul (rows, weight1)",
            "sum1 = Add (product1, bias1)",
            *activations.statements(activation, "sum1", "hidden"),
            "product2 = MatMul (hidden, weight2)",
            "sum2 = Add (product2, bias2)",
            "output = Add (sum2, x)",
        ),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = tuple(_form(activation) for activation in FORM_ACTIVATIONS)
