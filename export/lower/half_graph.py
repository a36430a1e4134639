"""A lowered FP32 graph in half precision, each block of it checked against FP32: shared by the recipes for GPUs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.lower.lowered import Batches
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.half import HalfPlan, KeptNode, to_half
from attn_deploy.export.precision.half_loss import HalfLoss, Reference, half_within
from attn_deploy.export.precision.half_ranges import collect_magnitudes
from attn_deploy.export.precision.half_rules import HalfKernels
from attn_deploy.export.precision.plan import weighted_nodes
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.receipt import BlockLoss
from attn_deploy.target import Precision


@dataclass(frozen=True)
class HalfGraph:
    """`blocks`: what each block loses alone, by the roundings emulated on the CPU; empty where nothing was measured.
    `kept`: nodes of `model` that stay FP32."""

    model: ir.Model
    notes: tuple[str, ...]
    blocks: tuple[BlockLoss, ...] = ()
    kept: tuple[KeptNode, ...] = ()


def half_graph(
    canonical: CanonicalModel,
    model: ir.Model,
    precision: Precision,
    calibration: Batches | None,
    open_model: OpenModel | None,
    *,
    exclude: Sequence[str],
    kernels: HalfKernels | None = None,
    emulated: bool = True,
) -> HalfGraph:
    """`model` in FP16 or BF16. Ranges (FP16) and losses come from `calibration`; without it, only the rules that need
    no data hold. `emulated` False: blocks are not measured, since the graph has operators that no CPU kernel knows."""
    if calibration is None or open_model is None:
        return _of(model, to_half(model, precision, {}, keep=exclude, kernels=kernels))
    magnitudes = {}
    if precision is Precision.FP16:
        magnitudes = collect_magnitudes(model, calibration(), open_model)
    if not emulated:
        return _of(model, to_half(model, precision, magnitudes, keep=exclude, kernels=kernels))
    reference = Reference(canonical.model, portable(canonical), [site.node for site in canonical.sites])
    half, loss = half_within(
        model, precision, magnitudes, reference, calibration, open_model, keep=exclude, kernels=kernels
    )
    return HalfGraph(half, loss.plan.notes + _shortfall(loss, precision), _rows(loss), loss.plan.kept)


def half_plan(canonical: ir.Model, kept: Collection[KeptNode]) -> PrecisionPlan:
    """The weighted layers that stay FP32, with their reasons; all others are what the variant is."""
    reasons = {node.node: node.reason + (f" ({node.detail})" if node.detail else "") for node in kept}
    names = (str(node.name) for node in weighted_nodes(canonical))
    return PrecisionPlan(tuple(LayerPlan(name, Scheme.FLOAT32, reasons[name]) for name in names if name in reasons))


def kept_in_float32(model: ir.Model, plan: PrecisionPlan | None) -> tuple[str, ...]:
    """Nodes of `model` that the plan keeps in FP32."""
    named = {str(node.name) for node in model.graph}
    return () if plan is None else tuple(layer for layer in plan.of(Scheme.FLOAT32) if layer in named)


def _of(model: ir.Model, plan: HalfPlan) -> HalfGraph:
    return HalfGraph(model, plan.notes, kept=plan.kept)


def _shortfall(loss: HalfLoss, precision: Precision) -> tuple[str, ...]:
    if loss.holds:
        return ()
    output, db = min(loss.outputs.items(), key=lambda item: item[1], default=("", 0.0))
    return (f"{output} has {db:.1f} dB in {precision}, {loss.floor_db:g} dB or more is asked",)


def _rows(loss: HalfLoss) -> tuple[BlockLoss, ...]:
    return tuple(BlockLoss(row.module, row.value, round(row.sqnr_db, 2), row.kept, row.reason) for row in loss.rows)
