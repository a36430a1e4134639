"""Lowering: CanonicalModel -> a model for one target and precision. One recipe per target."""

from __future__ import annotations

from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.target import Target

RECIPES = {Target.ONNXRUNTIME_CPU: onnxruntime_cpu}
"""Target -> the module that lowers for it, with its function `lower`."""
