"""A canonical model whose parts can be lowered for ONNX Runtime's CPU at several levels each: what tuning measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from attn_deploy.export.alike import alike
from attn_deploy.export.canonical import CanonicalModel, save_model
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.cpu_units import BLOCK, LEVELS, LINEAR, Unit, all_units, plainer
from attn_deploy.levels import floating, in_int8, is_int8
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.session import TensorSpec
from attn_deploy.target import Precision

INT8_LEVELS = tuple(in_int8(level) for level in (LINEAR, BLOCK))


class LevelledModel:
    """`groups`: alike units together; `levels`: all that some unit has, from stock to the coarsest. `kernels`: the
    forms that the native library has.

    With `plan` those in INT8 follow, of units of which it has linear layers in INT8. Whatever else it says of layers
    needs calibration and is left out: a convolution has no level.
    """

    def __init__(self, canonical: CanonicalModel, kernels: frozenset[str], plan: PrecisionPlan | None = None) -> None:
        self._canonical = canonical
        self._kernels = kernels
        self._plan = PrecisionPlan() if plan is None else _per_token(plan)
        self.units = _units(canonical, kernels, self._plan)
        self.groups = alike(canonical.model, self.units)
        known = (*LEVELS, *INT8_LEVELS)
        self.levels = tuple(level for level in known if any(level in unit.levels for unit in self.units))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._canonical.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._canonical.outputs

    def uniform(self, level: str) -> dict[str, str]:
        """Every unit at this level, or the next plainer that it has. At a level in INT8, units that have none of these
        are at the floating-point level of that name."""
        return {unit.name: _uniform(level, unit) for unit in self.units}

    def save(self, levels: Mapping[str, str], path: Path) -> tuple[Path, ...]:
        """Lowers it to files, the model first: FP32 but for the units at a level in INT8."""
        int8 = {node for unit in self.units if is_int8(levels.get(unit.name, "")) for node in unit.nodes}
        fuse = {name: floating(level) for name, level in levels.items()}
        precision, plan = (Precision.INT8, self._plan.restricted(int8)) if int8 else (Precision.FP32, None)
        lowered = onnxruntime_cpu.lower(self._canonical, precision, native=self._kernels, fuse=fuse, plan=plan)
        return save_model(lowered.model, path)


def _per_token(plan: PrecisionPlan) -> PrecisionPlan:
    """What of it can be lowered without calibration and takes the same time."""
    return PrecisionPlan(tuple(p for p in plan.layers if p.scheme is Scheme.PER_TOKEN))


def _units(canonical: CanonicalModel, kernels: frozenset[str], plan: PrecisionPlan) -> tuple[Unit, ...]:
    """Those in floating point, with levels in INT8 where they have them; units with one level are left out."""
    layers = frozenset(plan.quantized)
    int8 = {u.name: u.levels for u in all_units(canonical, kernels, plan) if layers & set(u.nodes)} if layers else {}
    units = (
        replace(unit, levels=unit.levels + tuple(in_int8(level) for level in int8.get(unit.name, ())))
        for unit in all_units(canonical, kernels)
    )
    return tuple(unit for unit in units if len(unit.levels) > 1)


def _uniform(level: str, unit: Unit) -> str:
    int8 = [floating(found) for found in unit.levels if is_int8(found)]
    if is_int8(level) and int8:
        return in_int8(plainer(floating(level), int8))
    return plainer(floating(level), [found for found in unit.levels if not is_int8(found)])
