"""--precision auto: parts of the model scored, timed and chosen under the budget, and the plan of it verified whole.

search_plan(subject, samples, budget) -> Searched: the plan, the level of each unit under it, the receipt's Search
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from attn_deploy import environment, runtimes
from attn_deploy.accuracy import Run, judge
from attn_deploy.choice import Budget
from attn_deploy.judged_samples import JudgedSamples
from attn_deploy.latency import System, measure
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.progress import Progress
from attn_deploy.receipt import FrontierPoint, PlanPart, Search
from attn_deploy.search import Found, Part, Plan, Verified, decibel, fastest, find, gain_us, loss, noise
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target
from attn_deploy.tuning import recorded
from attn_deploy.unit_times import QUARTILE, group_times

if TYPE_CHECKING:
    import onnx_ir as ir

    from attn_deploy.export.candidates import Means
    from attn_deploy.export.canonical import CanonicalModel
    from attn_deploy.export.precision.search import Loss
    from attn_deploy.export.precision.search import PlanPart as SearchedPart
    from attn_deploy.export.precision.statistics import Statistics

CPU = Target.ONNXRUNTIME_CPU

GAIN_SECONDS = 6.0
"""For the profile that gains are read from; 20 rounds of ViT-Tiny's two models on two cores."""

POINT_SECONDS = 2.0
"""For each point of the frontier, in turns with the plan of which nothing is quantized."""

BY_NOISE, BY_DIVERGENCE = "noise", "divergence"


@dataclass(frozen=True)
class Subject:
    """`plan` holds all that may be INT8, with `statistics` of what its layers need (None: they need none); `means` can
    collect more. `tuned`: by precision the level of each unit that tuning kept; None: the coarsest that `kernels`
    allow."""

    canonical: CanonicalModel
    plan: PrecisionPlan
    statistics: Statistics | None
    means: Means
    kernels: frozenset[str]
    tuned: Mapping[Precision, Mapping[str, str]] | None

    def levels(self, plan: PrecisionPlan) -> dict[str, str] | None:
        """Of each unit under a plan."""
        from attn_deploy.export.precision.search import levels_under

        return None if self.tuned is None else levels_under(plan, self.canonical, self.kernels, self.tuned)

    def arguments(self, plan: PrecisionPlan) -> dict[str, Any]:
        """The keywords of the recipe's `lower`."""
        found: dict[str, Any] = {"plan": plan, "statistics": self.statistics}
        return found | ({"native": self.kernels, "fuse": self.levels(plan)} if self.kernels else {})

    def lowered(self, plan: PrecisionPlan) -> ir.Model:
        from attn_deploy.export.lower import onnxruntime_cpu

        means = self.means
        return onnxruntime_cpu.lower(
            self.canonical, Precision.INT8, calibration=means.calibration, open_model=means.open_model,
            **self.arguments(plan),
        ).model  # fmt: skip


def subject_of(
    canonical: CanonicalModel, means: Means, tuned: Mapping[Precision, Mapping[str, str]] | None
) -> Subject:  # fmt: skip
    """By the user's plan where there is one, of which nothing is collected yet; else by all that can be INT8. A part of
    a CNN alone runs by ONNX Runtime's convolutions, whose ranges are of other values than those of a whole chain of
    ours: both are collected at once."""
    from attn_deploy.export.lower import onnxruntime_cpu

    kernels = frozenset(runtimes.kernel_names(CPU))
    if means.plan is not None:
        return Subject(canonical, means.plan, None, means, kernels, tuned)
    lower = functools.partial(
        onnxruntime_cpu.lower, canonical, Precision.INT8, calibration=means.calibration, open_model=means.open_model,
        exclude=means.exclude,
    )  # fmt: skip
    whole = lower(native=kernels, plan=means.prepared, statistics=means.statistics)
    if kernels and whole.plan.of(Scheme.STATIC):
        known = lower(plan=whole.plan, statistics=whole.statistics).statistics
        return Subject(canonical, whole.plan, known, means, kernels, tuned)
    return Subject(canonical, whole.plan, whole.statistics, means, kernels, tuned)


@dataclass(frozen=True)
class Samples:
    """`scoring`: batches that calibrate, for the parts. `judged`: samples that calibration did not see. `scores` names
    the output with class scores, `single` is what latency is taken on."""

    scoring: Sequence[Mapping[str, Array]]
    judged: JudgedSamples
    scores: str | None
    single: Mapping[str, Array]


@dataclass(frozen=True)
class Searched:
    """The plan, and how it was found."""

    plan: PrecisionPlan
    entry: Search


def search_plan(
    subject: Subject, samples: Samples, budget: Budget, *, threads: int, progress: Progress
) -> Searched:  # fmt: skip
    """The fastest plan for ONNX Runtime's CPU that keeps the budget; the nearest one where none does."""
    with tempfile.TemporaryDirectory() as folder:
        return _Search(subject, samples, budget, threads, progress, Path(folder)).run()


class _Search:
    def __init__(
        self, subject: Subject, samples: Samples, budget: Budget, threads: int, progress: Progress, folder: Path
    ) -> None:
        self.subject = subject
        self.samples = samples
        self.budget = budget
        self.threads = threads
        self.progress = progress
        self.folder = folder
        self.layers: dict[str, tuple[str, ...]] = {}
        self.files: dict[Plan, Path] = {}
        self.verified = 0
        self.call_us = 1.0
        """Of the model of which nothing is quantized, in the run that gains come from."""

    def run(self) -> Searched:
        from attn_deploy.export.precision.search import part_losses, plan_parts

        subject, samples = self.subject, self.samples
        searched = plan_parts(subject.canonical, subject.plan, subject.kernels)
        self.layers = {part.name: part.layers for part in searched}
        self.progress.stage("search: gains")
        gains = self._gains(searched)
        self.progress.stage("search: parts alone")
        losses = part_losses(
            subject.plan, searched, subject.lowered, self._open, samples.scoring, samples.scores, self.progress.step
        )
        by_noise = samples.scores is None or self.budget.min_sqnr_db is not None or not self.budget.asked
        parts = [_part(p, found, gains[p.name], by_noise) for p, found in zip(searched, losses, strict=True)]
        noises = [Part(p.name, noise(found.sqnr_db), 0.0) for p, found in zip(searched, losses, strict=True)]
        self.progress.stage("search: plans")
        capacity = noise(self.budget.tolerance(Precision.AUTO).min_sqnr_db) if by_noise else None
        found = find(parts, capacity, self._verify)
        measured_ms = self._measured(found)
        chosen = fastest(found.holding, measured_ms) if found.best is not None else found.nearest
        plan = self._plan(chosen.plan, {p.name: p for p in parts}, dict(zip(self.layers, losses, strict=True)))
        entry = Search(
            cpu=str(environment.host()["cpu"]),
            threads=self.threads,
            budget=self.budget.describe(),
            ranked_by=BY_NOISE if by_noise else BY_DIVERGENCE,
            scored=sum(len(next(iter(feeds.values()))) for feeds in samples.scoring),
            verified=self.verified,
            parts=tuple(
                PlanPart(p.name, len(p.layers), lost.sqnr_db, lost.divergence, gains[p.name], p.name in chosen.plan)
                for p, lost in zip(searched, losses, strict=True)
            ),
            frontier=tuple(self._point(v, parts, noises, measured_ms, chosen) for v in found.tried),
            reverted=found.reverted.get(chosen.plan, ()),
            met=found.best is not None,
        )
        return Searched(plan, entry)

    # -- what parts gain ----------------------------------------------------------------------------------------------

    def _gains(self, parts: Sequence[SearchedPart]) -> dict[str, float]:
        """Microseconds of one call, by part: its time in floating point less its time in INT8, each inside the whole
        model at the levels that were tuned for it, profiled in turns. Alike parts are averaged."""
        from attn_deploy.export.alike import alike
        from attn_deploy.export.precision.search import FLOAT, QUANTIZED
        from attn_deploy.runtimes.onnxruntime_profile import ProfiledSession

        plan = self.subject.plan
        plans = {FLOAT: plan.restricted(()), QUANTIZED: plan}
        with contextlib.ExitStack() as stack:
            sessions = {
                form: stack.enter_context(
                    ProfiledSession(self._save(plans[form], form), threads=self.threads, library=self._library)
                )
                for form in plans
            }
            systems = [System(form, _call(session.run, self.samples.single)) for form, session in sessions.items()]
            measurement = measure(systems, max_total_s=GAIN_SECONDS, progress=self.progress.step)
            calls = {form: session.finish() for form, session in sessions.items()}
        rounds, per_round = measurement.samples_ms[FLOAT].shape
        self.call_us = 1000 * float(np.quantile(measurement.samples_ms[FLOAT], QUARTILE))
        profiled = {form: recorded(of_form, rounds, per_round) for form, of_form in calls.items()}
        groups = group_times(alike(self.subject.canonical.model, parts), profiled, rounds)
        return {unit: g.time_us(FLOAT) - g.time_us(QUANTIZED) for g in groups for unit in g.units}

    # -- plans whole --------------------------------------------------------------------------------------------------

    def _verify(self, plan: Plan) -> Verified:
        """On the judged samples; the model stays as a file to be timed."""
        self.files[plan] = self._save(self._restricted(plan), f"plan{len(self.files)}")
        with self._opened(self.files[plan]) as run:
            judged = self.samples.judged
            found = judge(judged.batches(), judged.reference, {"plan": run}, self.samples.scores)["plan"]
        self.verified = found.samples
        self.progress.step(len(self.files), 0)
        tolerance = self.budget.tolerance(Precision.AUTO)
        worst_db = min((f.sqnr_db for f in found.fidelity.values()), default=0.0)
        missed = [f"{name}: {f.sqnr_db:.1f} dB" for name, f in found.fidelity.items() if not tolerance.holds(f)]
        fault = f"{missed[0]}, budget {tolerance.describe()}" if missed else None
        fault = fault or self.budget.accuracy_fault(found.agreement, found.accuracy)
        accuracy = None if found.accuracy is None else found.accuracy.value
        return Verified(plan, worst_db, found.agreement, accuracy, fault)

    def _measured(self, found: Found) -> dict[Plan, float]:
        """Milliseconds of each plan. Two sessions at a time, each plan in turns with the one of which nothing is
        quantized: of that one all times are the same, so that plans of different runs compare."""
        self.progress.stage("search: times")
        nothing: Plan = frozenset()
        ratios: dict[Plan, float] = {nothing: 1.0}
        base_ms: list[float] = []
        for done, verified in enumerate(found.tried):
            self.progress.step(done, len(found.tried))
            if verified.plan == nothing:
                continue
            with self._opened(self.files[nothing]) as one, self._opened(self.files[verified.plan]) as other:
                systems = [
                    System("none", _call(one, self.samples.single)),
                    System("plan", _call(other, self.samples.single)),
                ]
                run = measure(systems, max_total_s=POINT_SECONDS)
            ratios[verified.plan] = run.compare("plan", "none").ratio
            base_ms.append(run.latency("none", 1, self.threads).p50_ms)
        if not base_ms:
            with self._opened(self.files[nothing]) as one:
                run = measure([System("none", _call(one, self.samples.single))], max_total_s=POINT_SECONDS)
            base_ms.append(run.latency("none", 1, self.threads).p50_ms)
        base = sorted(base_ms)[len(base_ms) // 2]
        return {plan: base / ratio for plan, ratio in ratios.items()}

    def _point(
        self, verified: Verified, parts: Sequence[Part], noises: Sequence[Part], measured_ms: Mapping[Plan, float],
        chosen: Verified,
    ) -> FrontierPoint:  # fmt: skip
        plan = verified.plan
        return FrontierPoint(
            parts=len(plan),
            layers=len(self._restricted(plan).quantized),
            predicted_sqnr_db=round(decibel(loss(noises, plan)), 2),
            sqnr_db=verified.sqnr_db,
            agreement=verified.agreement,
            accuracy=verified.accuracy,
            predicted_ms=measured_ms[frozenset()] * max(1 - gain_us(parts, plan) / self.call_us, 0.0),
            measured_ms=measured_ms[plan],
            fault=verified.fault,
            chosen=verified is chosen,
        )

    # -- models -------------------------------------------------------------------------------------------------------

    def _restricted(self, plan: Plan) -> PrecisionPlan:
        return self.subject.plan.restricted({layer for name in plan for layer in self.layers[name]})

    def _plan(self, chosen: Plan, parts: Mapping[str, Part], losses: Mapping[str, Loss]) -> PrecisionPlan:
        """With the reason for each layer that search decided about."""
        reasons: dict[str, str] = {}
        for name, layers in self.layers.items():
            said = f"{losses[name].sqnr_db:.1f} dB alone, gains {parts[name].gain_us:.0f} us"
            word = "searched" if name in chosen else "no gain" if parts[name].gain_us <= 0 else "not worth its loss"
            reasons |= dict.fromkeys(layers, f"{word}: {said}")
        plan = self._restricted(chosen)
        said_of = tuple(LayerPlan(p.layer, p.scheme, reasons.get(p.layer, p.reason)) for p in plan.layers)
        return replace(plan, layers=said_of)

    @property
    def _library(self) -> bool:
        return bool(self.subject.kernels)

    def _save(self, plan: PrecisionPlan, name: str) -> Path:
        from attn_deploy.export.canonical import save_model

        return save_model(self.subject.lowered(plan), self.folder / f"{name}.onnx")[0]

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[Run]:
        session = runtimes.open_session(CPU, file, threads=self.threads, library=self._library)
        try:
            yield session.run
        finally:
            session.close()

    def _open(self, model: ir.Model) -> Run:
        from attn_deploy.export.canonical import save_model

        file = save_model(model, self.folder / "part.onnx")[0]
        return runtimes.open_session(CPU, file, threads=self.threads, library=self._library).run


def _part(part: SearchedPart, found: Loss, gain: float, by_noise: bool) -> Part:
    lost = noise(found.sqnr_db) if by_noise or found.divergence is None else found.divergence
    return Part(part.name, lost, gain)


def _call(run: Callable[[Mapping[str, Array]], object], feeds: Mapping[str, Array]) -> Callable[[], object]:
    return lambda: run(feeds)
