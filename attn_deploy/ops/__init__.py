"""The operators of the ONNX domain `attn_deploy`, version 1: one file per operator, one name per form."""

from __future__ import annotations

from attn_deploy.ops import (
    attention,
    attention_block,
    branch_pool,
    channel_attention,
    channel_pool,
    context_pool,
    feed_forward,
    gate,
    hard_attention,
    linear,
    packed_attention,
    quantized_attention_block,
    quantized_conv,
    quantized_feed_forward,
    quantized_gate,
    quantized_linear,
    rotary_embedding,
    spatial_pool,
)
from attn_deploy.ops.form import DOMAIN, VERSION, Form, Input

__all__ = ["BLOCK_FORMS", "DOMAIN", "FORMS", "VERSION", "Form", "Input"]

_OPERATORS = (
    attention,
    packed_attention,
    rotary_embedding,
    channel_attention,
    context_pool,
    branch_pool,
    hard_attention,
    channel_pool,
    spatial_pool,
    gate,
)

_BLOCKS = (linear, feed_forward, attention_block)

_QUANTIZED = (quantized_linear, quantized_feed_forward, quantized_attention_block, quantized_conv, quantized_gate)

BLOCK_FORMS: dict[str, Form] = {form.name: form for module in (*_BLOCKS, *_QUANTIZED) for form in module.FORMS}
"""Those that hold what stands around a site: lowering makes them, no canonical model has one."""

FORMS: dict[str, Form] = {form.name: form for module in _OPERATORS for form in module.FORMS} | BLOCK_FORMS
"""Every form by its ONNX operator name."""
