"""What the user asked an export for; the command line makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_deploy.choice import Budget
from attn_deploy.inputs import ExampleInput
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision, Target
from attn_deploy.verdict import All

CALIBRATION_SAMPLES = 64
EVAL_SAMPLES = 200


@dataclass(frozen=True)
class ExportOptions:
    """`precisions_asked` says that they were named, so that one which fails is an error and not a row of the receipt.
    A name that stands several times in `inputs` asks for several resolutions, one graph of the bundle for each.
    `plan`: the user's, for INT8 and for `auto`, which is searched without one.
    `targets` empty: what the host has; `targets_asked` says that they were named. `tensorrt_version`: of the TensorRT
    that will build the engine, None for the newest known. `runtime_options`: of the sessions on a GPU. `tune`: measure
    each part of the model on the CPU at every level of fusion; None: where a call takes long enough for that."""

    source: str = "demo"
    weights: str | None = None
    source_args: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[ExampleInput] = ()
    dims: Mapping[str, DimBounds] = field(default_factory=lambda: {"batch": DimBounds()})
    targets: Sequence[Target] = ()
    targets_asked: bool = True
    tensorrt_version: tuple[int, int] | None = None
    runtime_options: Mapping[str, str] = field(default_factory=dict)
    precisions: Sequence[Precision] = (Precision.FP32, Precision.INT8)
    precisions_asked: bool = False
    plan: PrecisionPlan | None = None
    exclude: Sequence[str] = ()
    data: str | None = None
    preprocess: str | None = None
    calibration_samples: int = CALIBRATION_SAMPLES
    eval_samples: int = EVAL_SAMPLES
    seed: int = 0
    budget: Budget = field(default_factory=Budget)
    keep_best: bool = False
    tune: bool | None = None
    require_fused: int | All | None = None
    max_latency_ms: float | None = None
    allow_unproven: bool = False
    opset: int = 20
    threads: int | None = None
    force: bool = False
    command: str = ""
