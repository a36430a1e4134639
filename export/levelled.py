"""A canonical model whose parts can be lowered for ONNX Runtime's CPU at several levels each: what tuning measures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attn_deploy.export.alike import alike
from attn_deploy.export.canonical import CanonicalModel, save_model
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.cpu_units import LEVELS, fusible_units
from attn_deploy.session import TensorSpec
from attn_deploy.target import Precision


class LevelledModel:
    """`groups`: alike units together; `levels`: all that some unit has, from stock to the coarsest. `kernels`: the
    forms that the native library has."""

    def __init__(self, canonical: CanonicalModel, kernels: frozenset[str]) -> None:
        self._canonical = canonical
        self._kernels = kernels
        self.units = fusible_units(canonical, kernels)
        self.groups = alike(canonical.model, self.units)
        self.levels = tuple(level for level in LEVELS if any(level in unit.levels for unit in self.units))

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._canonical.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._canonical.outputs

    def uniform(self, level: str) -> dict[str, str]:
        """Every unit at this level, or the next plainer that it has."""
        plainer = LEVELS[: LEVELS.index(level) + 1]
        return {unit.name: next(found for found in reversed(plainer) if found in unit.levels) for unit in self.units}

    def save(self, levels: Mapping[str, str], path: Path) -> tuple[Path, ...]:
        """Lowers it to FP32 files, the model first."""
        lowered = onnxruntime_cpu.lower(self._canonical, Precision.FP32, native=self._kernels, fuse=levels)
        return save_model(lowered.model, path)
