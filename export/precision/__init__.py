"""Precision: which layers are computed in what, and the graphs that do it."""

from __future__ import annotations

from attn_deploy.export.precision.plan import plan_int8

__all__ = ["plan_int8"]
