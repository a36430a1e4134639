"""The plan that INT8 follows unless somebody says otherwise: all that can be INT8, prepared on calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from msgspec.structs import replace

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.plan import plan_int8
from attn_deploy.export.precision.smooth_quant import wanted_for_smoothing
from attn_deploy.export.precision.smoothing_choice import choose_strengths
from attn_deploy.export.precision.statistics import Statistics, collect_statistics
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.session import Array


def full_plan(
    canonical: CanonicalModel,
    exclude: Sequence[str],
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    open_model: OpenModel,
    *,
    asked: int | None = None,
) -> tuple[PrecisionPlan, Statistics | None]:
    """`plan_int8` with the strength of SmoothQuant for each norm, and the statistics that those need; None where the
    model has no norm to smooth. `asked`: how many samples were to be seen. Raises UsageError as both do."""
    plan = plan_int8(canonical.model, exclude)
    wanted = wanted_for_smoothing(canonical.model) if plan.of(Scheme.PER_TOKEN) else []
    if not wanted:
        return plan, None
    model = canonical.model.clone()
    inline_functions(model)
    statistics = collect_statistics(model, wanted, batches(), open_model, asked=asked)
    smoothing = choose_strengths(model, plan.of(Scheme.PER_TOKEN), statistics, batches, open_model)
    return replace(plan, smoothing=smoothing), statistics
