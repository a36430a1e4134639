"""The 8-bit variants of TensorRT: SmoothQuant and Q/DQ pairs as a precision plan says, FP16 for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.errors import AttnDeployError, UsageError
from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.lower.half_graph import kept_in_float32
from attn_deploy.export.lower.lowered import Batches
from attn_deploy.export.opset import raise_opset
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.half_ranges import collect_magnitudes
from attn_deploy.export.precision.int8_symmetric import in_format, int8_symmetric, plan_symmetric
from attn_deploy.export.precision.smooth_quant import smooth, smoothable_norms
from attn_deploy.export.precision.statistics import Statistics, Wanted, collect_statistics
from attn_deploy.export.precision.symmetric_format import FP8, SymmetricFormat
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.target import Precision

FP8_OPSET = 19
"""The first with FLOAT8E4M3FN, and with scales in FP16."""


@dataclass(frozen=True)
class Means:
    """What ranges come from. `statistics`: collected before, from the canonical model; what is missing is collected."""

    batches: Batches
    open_model: OpenModel
    statistics: Statistics | None = None


def means(calibration: Batches | None, open_model: OpenModel | None, statistics: Statistics | None) -> Means:
    """Raises AttnDeployError without calibration data."""
    if calibration is None or open_model is None:
        raise AttnDeployError("INT8 for TensorRT has static ranges", got="no calibration data", expected="some")
    return Means(calibration, open_model, statistics)


def smooth_as_planned(
    canonical: CanonicalModel, model: ir.Model, plan: PrecisionPlan | None, means: Means
) -> tuple[str, ...]:
    """SmoothQuant with the plan's strengths, in place on a copy of the canonical model; notes."""
    if plan is None or not plan.smoothing:
        return ()
    statistics = means.statistics
    wanted = [Wanted(n.value, channel_axis=-1) for n in smoothable_norms(model) if n.name in plan.smoothing]
    if statistics is None or not statistics.hold(wanted):
        statistics = collect_statistics(portable(canonical), wanted, means.batches(), means.open_model)
    return smooth(model, plan.smoothing, statistics)


def quantize(
    canonical: CanonicalModel, model: ir.Model, form: SymmetricFormat, plan: PrecisionPlan | None, means: Means,
    *, exclude: Sequence[str], attention: bool,
) -> tuple[PrecisionPlan, tuple[str, ...]]:  # fmt: skip
    """`model`, lowered to ONNX's operators, in the format and FP16, in place; the plan as it was kept, and notes. A
    plan that is given is kept to; without one it is `plan_symmetric`'s, and layers that lose too much stay FP16.

    Raises UsageError for FP8 in a model whose opset has none.
    """
    if form is FP8 and not raise_opset(model, FP8_OPSET):
        raise UsageError(
            "FP8 is not in the opset of this model", got=model.opset_imports[""], expected=f"{FP8_OPSET} or later",
            next_step="export with --opset 23",
        )  # fmt: skip
    asked = plan_symmetric(canonical.model, exclude, form) if plan is None else in_format(plan, model, form)
    magnitudes = collect_magnitudes(model, means.batches(), means.open_model)
    kept = int8_symmetric(
        model, asked, means.batches, means.open_model, attention=attention, settled=plan is not None,
        statistics=means.statistics,
    )  # fmt: skip
    return kept, to_half(model, Precision.FP16, magnitudes, keep=kept_in_float32(model, plan)).notes
