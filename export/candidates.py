"""Candidates as files: every alternative of a recipe, lowered and saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from attn_deploy.built import Built
from attn_deploy.export.canonical import CanonicalModel, save_model
from attn_deploy.export.lower import RECIPES
from attn_deploy.export.lower.lowered import Alternative, Lowered
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.statistics import Statistics, save_statistics
from attn_deploy.plan_file import encode_plan
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target

BYTES_PER_MB = 1_000_000


@dataclass(frozen=True)
class Means:
    """What lowering to INT8 calibrates with, and the modules whose layers it leaves alone. `plan`: the user's own, by
    the nodes of the model; `prepared`: without one what INT8 for the CPU follows. `statistics`: of what that needs."""

    calibration: Callable[[], Iterable[Mapping[str, Array]]] | None = None
    open_model: OpenModel | None = None
    exclude: Sequence[str] = ()
    plan: PrecisionPlan | None = None
    prepared: PrecisionPlan | None = None
    statistics: Statistics | None = None

    def given(self, target: Target, precision: Precision) -> dict[str, Any]:
        """Keywords of a recipe's `lower`."""
        found: dict[str, Any] = {}
        if target is Target.ONNXRUNTIME_CPU and precision.quantized:
            found = {"plan": self.prepared, "statistics": self.statistics}
        if self.plan is not None and (precision.quantized or target.on_gpu):
            found["plan"] = self.plan
        return found


@dataclass(frozen=True)
class Plan:
    """One candidate before it is made."""

    target: Target
    precision: Precision
    alternative: Alternative

    @property
    def id(self) -> str:
        return f"{self.target}-{self.precision}{self.alternative.suffix}"


class Report(Protocol):
    def step(self, done: int, total: int) -> None: ...


def lowered_candidates(
    canonical: CanonicalModel, plans: Sequence[Plan], folder: Path, means: Means, report: Report
) -> Iterator[tuple[Built, Lowered]]:
    """Writes each plan into `folder`. Neighbours that differ in nothing but the options of their session share a
    lowering."""
    before: tuple[Any, Lowered] | None = None
    for done, plan in enumerate(plans):
        report.step(done, len(plans))
        target, precision, alternative = plan.target, plan.precision, plan.alternative
        asked = (target, precision, alternative.arguments)
        if before is None or before[0] != asked:
            lowered = RECIPES[target].lower(
                canonical, Precision.INT8 if precision is Precision.AUTO else precision, calibration=means.calibration,
                open_model=means.open_model, exclude=means.exclude,
                **{**means.given(target, precision), **alternative.arguments},
            )  # fmt: skip
            before = (asked, lowered)
            if target is Target.ONNXRUNTIME_CPU and lowered.statistics is not None:
                means = replace(means, statistics=lowered.statistics)
        lowered = replace(before[1], options={**before[1].options, **alternative.options})
        yield _built(plan, folder, lowered, canonical), lowered


def _built(plan: Plan, folder: Path, lowered: Lowered, canonical: CanonicalModel) -> Built:
    """The model, and beside it the plan with the statistics that it was lowered by, where it has one."""
    files = save_model(lowered.model, folder / f"{plan.id}.onnx")
    plan_file = statistics_file = None
    if lowered.plan.layers:
        plan_file = folder / f"{plan.id}.plan.json"
        plan_file.write_bytes(encode_plan(lowered.plan))
    if lowered.statistics is not None:
        statistics_file = folder / f"{plan.id}.statistics.safetensors"
        save_statistics(lowered.statistics, statistics_file)
    return Built(
        id=plan.id,
        target=plan.target,
        precision=plan.precision,
        files=files,
        library=lowered.library,
        sites=tuple((s.module, s.node) for s in canonical.sites),
        exempt=lowered.plan.exempt + lowered.notes,
        storage=_storage_mb(lowered.model),
        options=lowered.options,
        blocks=lowered.blocks,
        plan=lowered.plan if lowered.plan.layers else None,
        plan_file=plan_file,
        statistics_file=statistics_file,
    )


def _storage_mb(model: ir.Model) -> dict[str, float]:
    """Megabytes of weights by stored type."""
    count: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            count[str(value.const_value.dtype.numpy())] += value.const_value.nbytes
    return {kind: round(size / BYTES_PER_MB, 6) for kind, size in count.most_common()}
