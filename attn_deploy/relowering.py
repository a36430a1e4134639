"""A bundle's variants that follow a precision plan, lowered again on this host from the canonical model and the plan.

Neither data nor PyTorch is needed: the ranges of activations lie beside the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attn_deploy.bundle import Bundle
from attn_deploy.plan_file import read_plan
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.target import Precision, Target
from attn_deploy.tuning import NATIVE_SUFFIX, TUNED_SUFFIX

if TYPE_CHECKING:
    from attn_deploy.export.candidates import Plan
    from attn_deploy.export.canonical import CanonicalModel
    from attn_deploy.export.lower.lowered import Conditions
    from attn_deploy.export.precision.statistics import Statistics

CPU = Target.ONNXRUNTIME_CPU


@dataclass(frozen=True)
class PlannedVariant:
    """`name` is the variant's in the bundle."""

    name: str
    precision: Precision
    plan: PrecisionPlan
    statistics: Statistics | None


def planned_variants(bundle: Bundle, graph: str) -> list[PlannedVariant]:
    """Those for the CPU with a plan beside them, their files checked."""
    from attn_deploy.export.precision.statistics import load_statistics

    return [
        PlannedVariant(
            name,
            Precision(variant.precision),
            read_plan(bundle.check(variant.plan)),
            None if variant.statistics is None else load_statistics(bundle.check(variant.statistics), None),
        )
        for name, variant in bundle.manifest.graphs[graph].variants.items()
        if variant.target == CPU and variant.plan is not None
    ]


def lowerings(
    variant: PlannedVariant, canonical: CanonicalModel, conditions: Conditions,
    levels: Mapping[Precision, Mapping[str, str]] | None,
) -> list[Plan]:  # fmt: skip
    """The ways in which to lower it here: for INT8 bodies, the levels that tuning kept, and the coarsest; for `auto`
    each part at the level that tuning kept for its precision."""
    from attn_deploy.export.candidates import Plan
    from attn_deploy.export.lower import RECIPES
    from attn_deploy.export.lower.lowered import Alternative
    from attn_deploy.export.precision.search import levels_under

    given = {"plan": variant.plan, "statistics": variant.statistics}
    if variant.precision is Precision.AUTO:
        found = None if levels is None else levels_under(variant.plan, canonical, conditions.kernels, levels)
        offered = [Alternative(arguments={"native": conditions.kernels, "fuse": found, **given})]
    else:
        conditions = replace(conditions, plan=variant.plan)
        offered = [
            replace(alternative, arguments={**alternative.arguments, **given})
            for alternative in RECIPES[CPU].alternatives(canonical, variant.precision, conditions)
            if alternative.suffix in ("", NATIVE_SUFFIX, TUNED_SUFFIX) and "plan" not in alternative.arguments
        ]
    return [Plan(CPU, variant.precision, alternative) for alternative in offered]
