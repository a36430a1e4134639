"""The operators of the ONNX domain `attn_deploy`, version 1: one file per operator, one name per form."""

from __future__ import annotations

from attn_deploy.ops import (
    attention,
    branch_pool,
    channel_attention,
    channel_pool,
    context_pool,
    gate,
    hard_attention,
    packed_attention,
    rotary_embedding,
    spatial_pool,
)
from attn_deploy.ops.form import DOMAIN, VERSION, Form, Input

__all__ = ["DOMAIN", "FORMS", "VERSION", "Form", "Input"]

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

FORMS: dict[str, Form] = {form.name: form for module in _OPERATORS for form in module.FORMS}
"""Every form by its ONNX operator name."""
