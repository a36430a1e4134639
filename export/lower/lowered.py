"""What a recipe hands back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from attn_deploy.export.precision.statistics import Statistics
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.receipt import BlockLoss
from attn_deploy.session import Array
from attn_deploy.target import Precision

Batches = Callable[[], Iterable[Mapping[str, Array]]]
"""Calibration feeds; called once for each pass over them."""


@dataclass(frozen=True)
class Alternative:
    """One of the ways to lower for a target and precision, between which only a measurement can decide. `suffix` ends
    the candidate's id; `arguments` are keywords of the recipe's `lower`, `options` those of the session alone: what
    differs in them has the same graph."""

    suffix: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """What recipes know of the host: `kernels` are the forms that the target's native library has there, `tensorrt`
    the version that will build the engine, None for the newest known, and `tuned` by precision the level of each
    fusible unit (lower/cpu_units.py) that tuning found fastest on the CPU. `plan`: the one that INT8 will follow;
    `blocks`: weights in blocks may stand in for its activations per token, since nobody wrote it and the runtime has
    the kernel."""

    kernels: frozenset[str] = frozenset()
    tensorrt: tuple[int, int] | None = None
    tuned: Mapping[Precision, Mapping[str, str]] = field(default_factory=dict)
    plan: PrecisionPlan | None = None
    blocks: bool = False


@dataclass(frozen=True)
class Lowered:
    """A model for one target and precision. `library` says that it holds operators of the target's native library;
    `options` are what its session must be opened with; `notes` what of the asked precision was not kept, and why;
    `blocks` what half precision costs each of them. `plan` and `statistics` (None where it needs none) make the same
    model again, without data."""

    model: ir.Model
    plan: PrecisionPlan
    library: bool
    notes: tuple[str, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    blocks: tuple[BlockLoss, ...] = ()
    statistics: Statistics | None = None
