"""Which precision plan each candidate of a graph follows: the user's, all that can be INT8, or a searched one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attn_deploy.options import ExportOptions
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.progress import Progress
from attn_deploy.receipt import Search
from attn_deploy.searching import Samples, search_plan, subject_of
from attn_deploy.target import Precision, Target

if TYPE_CHECKING:
    from attn_deploy.export.candidates import Means
    from attn_deploy.export.canonical import CanonicalModel

CPU = Target.ONNXRUNTIME_CPU


@dataclass
class Planner:
    """Of one graph. `warnings` grow."""

    canonical: CanonicalModel
    options: ExportOptions
    threads: int
    progress: Progress
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def given(self) -> PrecisionPlan | None:
        """The user's plan by the nodes of this model."""
        from attn_deploy.export.precision.given_plan import given_plan

        options = self.options
        return None if options.plan is None else given_plan(self.canonical.model, options.plan, options.exclude)

    @cached_property
    def int8(self) -> PrecisionPlan:
        """What INT8 means for this model: the user's plan, or all that may be INT8."""
        from attn_deploy.export.precision import plan_int8

        return self.given or plan_int8(self.canonical.model, self.options.exclude)

    def precisions(self, target: Target) -> set[Precision]:
        """Those that are asked for."""
        from attn_deploy.export.lower import pairs

        return {precision for found, precision in pairs(self.options) if found is target}

    def prepared(self, means: Means, samples: int | None) -> Means:
        """With the user's plan, or with all that can be INT8, prepared on the calibration data. `samples`: how many of
        these there are, where that is known."""
        from attn_deploy.export.precision.full_plan import full_plan

        if self.given is not None:
            return replace(means, plan=self.given)
        if not any(precision.quantized for precision in self.precisions(CPU)):
            return means
        assert means.calibration is not None
        assert means.open_model is not None
        self.progress.stage("calibration")
        plan, statistics = full_plan(
            self.canonical, self.options.exclude, means.calibration, means.open_model, asked=samples
        )
        return replace(means, prepared=plan, statistics=statistics)

    def auto(
        self, means: Means, tuned: Mapping[Precision, Mapping[str, str]] | None, samples: Callable[[], Samples]
    ) -> tuple[dict[Target, dict[str, Any]], Search | None]:
        """How `auto` is lowered for each target that it is asked for, as keywords of the recipe's `lower`, and how that
        was found, where it was searched: on the CPU, whose plan then serves all."""
        targets = [target for target in self.options.targets if Precision.AUTO in self.precisions(target)]
        if not targets:
            return {}, None
        subject = subject_of(self.canonical, means, tuned)
        plan, search = means.plan, None
        if plan is None:
            found = search_plan(
                subject, samples(), self.options.budget, threads=self.threads, progress=self.progress
            )  # fmt: skip
            plan, search = found.plan, found.entry
            if not plan.quantized:
                self.warnings.append("no part of the model gains by INT8 on this host: the candidate `auto` is FP32")
        return {t: {"plan": plan} if t.on_gpu else subject.arguments(plan) for t in targets}, search
