"""QuantizedAttentionBlock: x + attention(norm(x) @ weight_qkv + bias_qkv) @ weight_out + bias_out.

The forms of AttentionBlock with projections in 8 bits, each weight with its scale behind it. What both projections
read is quantized row by row (`quantized.py`); attention itself is in floating point.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from attn_deploy.ops import attention_block, layer_norm, packed_attention, quantized
from attn_deploy.ops.form import Array, Form, Input, Shape, lines

_OWN = (
    Input("x"), Input("norm_scale"), Input("norm_bias"),
    Input("weight_qkv", "uint8"), Input("weight_qkv_scale"), Input("bias_qkv"),
    Input("weight_out", "uint8"), Input("weight_out_scale"), Input("bias_out"),
)  # fmt: skip


def _form(floating: Form, inner: Form) -> Form:
    def infer_shapes(
        x: Shape, norm_scale: Shape, norm_bias: Shape, weight_qkv: Shape, weight_qkv_scale: Shape, bias_qkv: Shape,
        weight_out: Shape, weight_out_scale: Shape, bias_out: Shape, *extra: Shape, **attributes: Any,
    ) -> tuple[Shape, ...]:  # fmt: skip
        """As AttentionBlock's, and weight_qkv_scale [3 * channels], weight_out_scale [channels]."""
        own = (x, norm_scale, norm_bias, weight_qkv, bias_qkv, weight_out, bias_out)
        shapes: tuple[Shape, ...] = floating.infer_shapes(*own, *extra, **attributes)
        quantized.check(weight_qkv, weight_qkv_scale)
        quantized.check(weight_out, weight_out_scale)
        return shapes

    def reference(
        x: Array, norm_scale: Array, norm_bias: Array, weight_qkv: Array, weight_qkv_scale: Array, bias_qkv: Array,
        weight_out: Array, weight_out_scale: Array, bias_out: Array, *extra: Array, epsilon: float, heads: int,
        **attributes: Any,
    ) -> tuple[Array, ...]:  # fmt: skip
        rows = layer_norm.reference(x, norm_scale, norm_bias, epsilon)
        qkv = quantized.product(rows, weight_qkv, weight_qkv_scale) + bias_qkv.astype(np.float64)
        (attended,) = inner.reference(qkv.reshape(attention_block.packed(x.shape, heads)), *extra, **attributes)
        projected = quantized.product(attended, weight_out, weight_out_scale)
        return (x.astype(np.float64) + projected + bias_out.astype(np.float64),)

    def multiply_adds(
        x: Shape, norm_scale: Shape, norm_bias: Shape, weight_qkv: Shape, weight_qkv_scale: Shape, bias_qkv: Shape,
        weight_out: Shape, weight_out_scale: Shape, bias_out: Shape, *extra: Shape, **attributes: Any,
    ) -> int:  # fmt: skip
        own = (x, norm_scale, norm_bias, weight_qkv, bias_qkv, weight_out, bias_out)
        return int(floating.multiply_adds(*own, *extra, **attributes))

    return Form(
        operator="QuantizedAttentionBlock",
        name="Quantized" + floating.name,
        inputs=(*_OWN, *inner.inputs[1:]),
        outputs=("output",),
        attributes=floating.attributes,
        body=_BEFORE + re.sub(r"\boutput\b", "attended", inner.body) + _AFTER,
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


# Names that no body of PackedAttention uses; it reads `qkv`.
_BEFORE = lines(
    *quantized.constants(),
    layer_norm.statement("x", "block_rows"),
    *quantized.linear_statements("block_rows", "weight_qkv", "bias_qkv", "q_before", "block_qkv"),
    *attention_block.SPLIT_INTO_HEADS,
)

_AFTER = lines(
    *quantized.linear_statements("attended", "weight_out", "bias_out", "q_after", "block_sum"),
    "output = Add (block_sum, x)",
)

FORMS = tuple(
    _form(floating, inner) for floating, inner in zip(attention_block.FORMS, packed_attention.FORMS, strict=True)
)
