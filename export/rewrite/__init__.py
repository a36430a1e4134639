"""Rewriting: CapturedModel and Findings -> RewrittenModel, compared with the original in PyTorch, site by site."""

from __future__ import annotations

from attn_deploy.export.rewrite.apply import OperatorSite, RewrittenModel, rewrite

__all__ = ["OperatorSite", "RewrittenModel", "rewrite"]
