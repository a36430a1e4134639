"""The operators of the ONNX domain `attn_deploy`, version 1: one file per operator, one name per form."""

from __future__ import annotations

from attn_deploy.ops import attention, channel_pool, gate, packed_attention
from attn_deploy.ops.form import DOMAIN, VERSION, Form, Input

__all__ = ["DOMAIN", "FORMS", "VERSION", "Form", "Input"]

FORMS: dict[str, Form] = {
    form.name: form for module in (attention, packed_attention, channel_pool, gate) for form in module.FORMS
}
"""Every form by its ONNX operator name."""
