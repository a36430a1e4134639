"""A plan that somebody wrote, for one model: every name in it checked, every layer of the model in it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from msgspec.structs import replace

from attn_deploy.export.precision.plan import Exempt, has_kernel, plan_int8, weighted_nodes
from attn_deploy.plan_file import Layer, resolved
from attn_deploy.precision_plan import PrecisionPlan, Scheme


def given_plan(model: ir.Model, plan: PrecisionPlan, exclude: Sequence[str] = ()) -> PrecisionPlan:
    """`plan` by the nodes of `model`, the canonical one; what lies below `exclude` stays in floating point whatever the
    plan says. Raises UsageError as `resolved` and `plan_int8` do."""
    layers = [Layer(str(node.name), _schemes(node)) for node in weighted_nodes(model)]
    norms = {str(node.name) for node in model.graph if node.op_type == "LayerNormalization" and not node.domain}
    found = resolved(plan, layers, norms)
    if not exclude:
        return found
    excluded = {p.layer: p for p in plan_int8(model, exclude).layers if p.reason == Exempt.EXCLUDED}
    return replace(found, layers=tuple(excluded.get(p.layer, p) for p in found.layers))


def _schemes(node: ir.Node) -> tuple[Scheme, ...]:
    """Those that some target has a form for."""
    if not has_kernel(node):
        return (Scheme.FLOAT32,)
    on_gpu = (Scheme.STATIC, Scheme.FP8, Scheme.FLOAT32)
    return on_gpu if node.op_type == "Conv" else (Scheme.PER_TOKEN, Scheme.WEIGHT_ONLY, *on_gpu)
