"""AttentionBlock: x + attention(norm(x) @ weight_qkv + bias_qkv) @ weight_out + bias_out, the pre-norm attention block.

Each form holds a form of PackedAttention, whose inputs behind qkv and whose attributes it takes over. Self-attention:
Vaswani et al. 2017, section 3.2.2, with the norm in front as in the Vision Transformer (Dosovitskiy et al. 2021,
equation 2). A layer scale is part of weight_out and bias_out.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from attn_deploy.ops import layer_norm, linear, packed_attention
from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require

_OWN = ("x", "norm_scale", "norm_bias", "weight_qkv", "bias_qkv", "weight_out", "bias_out")


def _form(inner: Form) -> Form:
    def infer_shapes(
        x: Shape, norm_scale: Shape, norm_bias: Shape, weight_qkv: Shape, bias_qkv: Shape, weight_out: Shape,
        bias_out: Shape, *extra: Shape, epsilon: float, heads: int, **attributes: Any,
    ) -> tuple[Shape, ...]:  # fmt: skip
        """x [batch, tokens, channels], norm_scale and norm_bias [channels], weight_qkv [channels, 3 * channels],
        bias_qkv [3 * channels], weight_out [channels, channels], bias_out [channels] -> [batch, tokens, channels]."""
        require(len(x) == 3, f"x must be [batch, tokens, channels], got {x}")
        require(heads > 0 and x[2] % heads == 0, f"channels of x {x} are no multiple of heads {heads}")
        layer_norm.check(x, norm_scale, norm_bias)
        linear.check(x, weight_qkv, bias_qkv)
        require(weight_qkv[1] == 3 * x[2], f"weight_qkv must be [{x[2]}, {3 * x[2]}], got {weight_qkv}")
        (attended,) = inner.infer_shapes(packed(x, heads), *extra, **attributes)
        linear.check(attended, weight_out, bias_out)
        require(weight_out[1] == x[2], f"weight_out must be [{x[2]}, {x[2]}], got {weight_out}")
        return (x,)

    def reference(
        x: Array, norm_scale: Array, norm_bias: Array, weight_qkv: Array, bias_qkv: Array, weight_out: Array,
        bias_out: Array, *extra: Array, epsilon: float, heads: int, **attributes: Any,
    ) -> tuple[Array, ...]:  # fmt: skip
        rows = layer_norm.reference(x, norm_scale, norm_bias, epsilon)
        qkv = rows @ weight_qkv.astype(np.float64) + bias_qkv.astype(np.float64)
        (attended,) = inner.reference(qkv.reshape(packed(x.shape, heads)), *extra, **attributes)
        return (x.astype(np.float64) + attended @ weight_out.astype(np.float64) + bias_out.astype(np.float64),)

    def multiply_adds(x: Shape, *others: Shape, epsilon: float, heads: int, **attributes: Any) -> int:
        projections = math.prod(x) * (others[2][1] + others[4][1])
        extra = others[len(_OWN) - 1 :]
        return projections + int(inner.multiply_adds(packed(x, heads), *extra, **attributes))

    return Form(
        operator="AttentionBlock",
        name=inner.name.replace("PackedAttention", "AttentionBlock", 1),
        inputs=(*(Input(name) for name in _OWN), *inner.inputs[1:]),
        outputs=("output",),
        attributes={"epsilon": float, "heads": int, **inner.attributes},
        body=_BEFORE + re.sub(r"\boutput\b", "attended", inner.body) + _AFTER,
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


def packed(x: Shape, heads: int) -> Shape:
    """Of query, key and value of rows x: [batch, tokens, 3, heads, head_dim]."""
    batch, tokens, channels = x
    return (batch, tokens, 3, heads, channels // heads)


SPLIT_INTO_HEADS = (
    "block_heads = Constant <value_int: int = @heads> ()",
    "block_first = Constant <value_ints: ints = [0]> ()",
    "block_heads_dim = Unsqueeze (block_heads, block_first)",
    "block_leading = Constant <value_ints: ints = [0, 0, 3]> ()",
    "block_rest = Constant <value_ints: ints = [-1]> ()",
    "block_shape = Concat <axis: int = 0> (block_leading, block_heads_dim, block_rest)",
    "qkv = Reshape (block_qkv, block_shape)",
)
"""Statements of a body: block_qkv [batch, tokens, 3 * channels] as `qkv`, which the body of PackedAttention reads. No
body of PackedAttention uses names that begin with block_."""

_BEFORE = lines(
    layer_norm.statement("x", "block_rows"),
    "block_product = MatMul (block_rows, weight_qkv)",
    "block_qkv = Add (block_product, bias_qkv)",
    *SPLIT_INTO_HEADS,
)

_AFTER = lines(
    "block_projected = MatMul (attended, weight_out)",
    "block_sum = Add (block_projected, bias_out)",
    "output = Add (block_sum, x)",
)

FORMS = tuple(_form(inner) for inner in packed_attention.FORMS)
