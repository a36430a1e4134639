"""A lowered FP32 graph in half precision, each block of it checked against FP32: shared by the recipes for GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.lower.lowered import Batches
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.half_loss import HalfLoss, Reference, half_within
from attn_deploy.export.precision.half_ranges import collect_magnitudes
from attn_deploy.export.precision.half_rules import HalfKernels
from attn_deploy.receipt import BlockLoss
from attn_deploy.target import Precision


@dataclass(frozen=True)
class HalfGraph:
    """`blocks`: what each block loses alone, by the roundings emulated on the CPU; empty where nothing was measured."""

    model: ir.Model
    notes: tuple[str, ...]
    blocks: tuple[BlockLoss, ...] = ()


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
        return HalfGraph(model, to_half(model, precision, {}, keep=exclude, kernels=kernels).notes)
    magnitudes = {}
    if precision is Precision.FP16:
        magnitudes = collect_magnitudes(model, calibration(), open_model)
    if not emulated:
        return HalfGraph(model, to_half(model, precision, magnitudes, keep=exclude, kernels=kernels).notes)
    reference = Reference(canonical.model, portable(canonical), [site.node for site in canonical.sites])
    half, loss = half_within(
        model, precision, magnitudes, reference, calibration, open_model, keep=exclude, kernels=kernels
    )
    return HalfGraph(half, loss.plan.notes + _shortfall(loss, precision), _rows(loss))


def _shortfall(loss: HalfLoss, precision: Precision) -> tuple[str, ...]:
    if loss.holds:
        return ()
    output, db = min(loss.outputs.items(), key=lambda item: item[1], default=("", 0.0))
    return (f"{output} has {db:.1f} dB in {precision}, {loss.floor_db:g} dB or more is asked",)


def _rows(loss: HalfLoss) -> tuple[BlockLoss, ...]:
    return tuple(BlockLoss(row.module, row.value, round(row.sqnr_db, 2), row.kept, row.reason) for row in loss.rows)
