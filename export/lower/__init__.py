"""Lowering: CanonicalModel -> a model for one target and precision. One recipe per target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attn_deploy.errors import UsageError
from attn_deploy.export.lower import onnxruntime_cpu, onnxruntime_cuda, tensorrt
from attn_deploy.target import Precision, Target

RECIPES = {
    Target.ONNXRUNTIME_CPU: onnxruntime_cpu,
    Target.ONNXRUNTIME_CUDA: onnxruntime_cuda,
    Target.TENSORRT: tensorrt,
}
"""Target -> the module that lowers for it: `lower`, `alternatives`, and the PRECISIONS it has, of which DEFAULTS are
built when none is named."""


class Asked(Protocol):
    """The part of the export's options that says what is built."""

    @property
    def targets(self) -> Sequence[Target]: ...
    @property
    def targets_asked(self) -> bool: ...
    @property
    def precisions(self) -> Sequence[Precision]: ...
    @property
    def precisions_asked(self) -> bool: ...


def pairs(asked: Asked) -> list[tuple[Target, Precision]]:
    """Every target with each of its precisions.

    Raises UsageError for a named precision that a named target does not have, or that none of the host's has.
    """
    found = []
    for target in asked.targets:
        recipe = RECIPES[target]
        wanted = asked.precisions if asked.precisions_asked else recipe.DEFAULTS
        lacking = [p for p in wanted if p not in recipe.PRECISIONS]
        if lacking and asked.targets_asked:
            raise _not_offered(target, lacking[0])
        found += [(target, precision) for precision in wanted if precision not in lacking]
    for precision in asked.precisions if asked.precisions_asked else ():
        if all(built is not precision for _, built in found):
            raise _not_offered(asked.targets[0], precision)
    return found


def _not_offered(target: Target, precision: Precision) -> UsageError:
    others = [str(t) for t, recipe in RECIPES.items() if precision in recipe.PRECISIONS]
    return UsageError(
        f"{target} has no {precision}",
        got=precision,
        expected=", ".join(RECIPES[target].PRECISIONS),
        next_step=f"--target {others[0]} has it; export each target with its own --precision" if others else None,
    )
