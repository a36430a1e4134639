"""QuantizedFeedForward: x + activation(norm(x) @ weight1 + bias1) @ weight2 + bias2 with weights and rows in 8 bits.

The hidden layer is quantized for each token in `groups` parts of equally many neighbouring columns, each with its own
scale and zero point: a kernel can quantize a part while it is near, and add the parts' products in float32.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops import activation as activations
from attn_deploy.ops import feed_forward, layer_norm, quantized
from attn_deploy.ops.feed_forward import FORM_ACTIVATIONS
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require

MAX_GROUP = 512
"""Columns of a group at most: so many of a block of rows stay in the first cache until they are quantized."""

GROUP_MULTIPLE = 4
"""As many inputs as a lane of the dot product adds up."""

MIN_GROUP = 64
"""Below it what a group costs besides its products is no longer small."""


def groups_of(hidden: int) -> int | None:
    """The smallest number of equal groups of at most MAX_GROUP columns; None where there is none for a kernel."""
    for groups in range(-(-hidden // MAX_GROUP), hidden // MIN_GROUP + 1):
        if hidden % groups == 0 and (hidden // groups) % GROUP_MULTIPLE == 0:
            return groups
    return 1 if hidden <= MAX_GROUP and hidden % GROUP_MULTIPLE == 0 else None


def infer_shapes(
    x: Shape, norm_scale: Shape, norm_bias: Shape, weight1: Shape, weight1_scale: Shape, bias1: Shape, weight2: Shape,
    weight2_scale: Shape, bias2: Shape, *, epsilon: float, groups: int,
) -> tuple[Shape, ...]:  # fmt: skip
    """As FeedForward's, and weight1_scale [hidden], weight2_scale [channels]."""
    shapes = feed_forward.infer_shapes(x, norm_scale, norm_bias, weight1, bias1, weight2, bias2, epsilon=epsilon)
    quantized.check(weight1, weight1_scale)
    quantized.check(weight2, weight2_scale)
    require(groups > 0 and weight1[1] % groups == 0, f"weight1 {weight1} cannot be cut into {groups} equal groups")
    return shapes


def multiply_adds(x: Shape, *others: Shape, epsilon: float, groups: int) -> int:
    return feed_forward.multiply_adds(x, *others, epsilon=epsilon)


def _form(activation: str) -> Form:
    def reference(
        x: Array, norm_scale: Array, norm_bias: Array, weight1: Array, weight1_scale: Array, bias1: Array,
        weight2: Array, weight2_scale: Array, bias2: Array, *, epsilon: float, groups: int,
    ) -> tuple[Array, ...]:  # fmt: skip
        rows = layer_norm.reference(x, norm_scale, norm_bias, epsilon)
        first = quantized.product(rows, weight1, weight1_scale) + bias1.astype(np.float64)
        hidden = activations.ACTIVATIONS[activation](first)
        parts = hidden.reshape(*x.shape[:-1], groups, hidden.shape[-1] // groups)
        grouped = quantized.rows_of_levels(parts).reshape(hidden.shape)
        second = grouped @ quantized.weights(weight2, weight2_scale)
        return (x.astype(np.float64) + second + bias2.astype(np.float64),)

    names = ("x", "norm_scale", "norm_bias")
    weights = (
        part
        for number in (1, 2)
        for part in (Input(f"weight{number}", "uint8"), Input(f"weight{number}_scale"), Input(f"bias{number}"))
    )
    return Form(
        operator="QuantizedFeedForward",
        name="QuantizedFeedForward" + activation,
        inputs=(*(Input(name) for name in names), *weights),
        outputs=("output",),
        attributes={"epsilon": float, "groups": int},
        body=lines(
            *quantized.constants(),
            layer_norm.statement("x", "rows"),
            *quantized.linear_statements("rows", "weight1", "bias1", "q1", "sum1"),
            *activations.statements(activation, "sum1", "hidden"),
            *_GROUPED,
            *quantized.row_statements("hidden_groups", "q2"),
            *quantized.product_statements("weight2_groups", "q2"),
            "scaled = ReduceSum <keepdims: int = 0> (q2_scaled, first)",
            "product2 = Mul (scaled, weight2_scale)",
            "sum2 = Add (product2, bias2)",
            "shape = Shape (x)",
            "back = Reshape (sum2, shape)",
            "output = Add (back, x)",
        ),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


_GROUPED = (
    "first = Constant <value_ints: ints = [0]> ()",
    "group_count = Constant <value_int: int = @groups> ()",
    "groups_dim = Unsqueeze (group_count, first)",
    "hidden_parts = Concat <axis: int = 0> (first, groups_dim, int8_last)",
    "hidden_rows = Flatten <axis: int = -1> (hidden)",
    "hidden_cut = Reshape (hidden_rows, hidden_parts)",
    "hidden_groups = Transpose <perm: ints = [1, 0, 2]> (hidden_cut)",
    "weight2_columns = Shape <start: int = 1> (weight2)",
    "weight2_parts = Concat <axis: int = 0> (groups_dim, int8_last, weight2_columns)",
    "weight2_groups = Reshape (weight2, weight2_parts)",
)
"""hidden [..., hidden] as [groups, rows, group], and weight2 [hidden, channels] as [groups, group, channels]."""

FORMS = tuple(_form(activation) for activation in FORM_ACTIVATIONS)
