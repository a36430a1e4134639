"""Builds candidates as files, and the peers that they are measured against."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attn_deploy.built import Built
from attn_deploy.bundle import CANONICAL, PORTABLE
from attn_deploy.export.candidates import Means, Plan, Report, lowered_candidates
from attn_deploy.export.canonical import CanonicalModel, portable, save_model
from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.lower import RECIPES, Asked, pairs
from attn_deploy.export.lower.lowered import Alternative, Conditions
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.rewrite import RewrittenModel
from attn_deploy.export.site_parity import record_sites, site_cases
from attn_deploy.export.to_onnx import plain_onnx
from attn_deploy.latency import System
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target


def save_sources(canonical: CanonicalModel, folder: Path) -> None:
    """canonical.onnx and portable.onnx."""
    save_model(canonical.model, folder / CANONICAL)
    save_model(portable(canonical), folder / PORTABLE)


def build_candidates(
    rewritten: RewrittenModel,
    canonical: CanonicalModel,
    folder: Path,
    asked: Asked,
    means: Means,
    conditions: Mapping[Target, Conditions],
    planned: Mapping[Target, Mapping[str, Any]],
    report: Report,
) -> Iterator[Built]:
    """Every target x precision x lowering, written under `variants/`. `conditions`: what each target's recipe knows of
    the host; `planned`: what `auto` is lowered with, which no recipe can say."""
    records = record_sites(rewritten)
    (folder / "variants").mkdir()
    plans = [
        Plan(target, precision, alternative)
        for target, precision in pairs(asked)
        for alternative in (
            (_planned(target, canonical, conditions[target], planned[target]),)
            if precision is Precision.AUTO
            else RECIPES[target].alternatives(canonical, precision, conditions[target])
        )
    ]
    for built, lowered in lowered_candidates(canonical, plans, folder / "variants", means, report):
        yield replace(built, site_cases=partial(site_cases, canonical, lowered.model, records))


def _planned(
    target: Target, canonical: CanonicalModel, conditions: Conditions, arguments: Mapping[str, Any]
) -> Alternative:  # fmt: skip
    """As INT8 is lowered by default, but for what the plan says."""
    default = RECIPES[target].alternatives(canonical, Precision.INT8, conditions)[0]
    return replace(default, arguments={**default.arguments, **arguments})


@contextlib.contextmanager
def plain_model(captured: CapturedModel, opset: int, precision: Precision = Precision.FP32) -> Iterator[Path]:
    """What torch.onnx.export makes of the model by itself, as a file that is gone afterwards.

    In FP16 and BF16 it is typed by the same rules as a candidate, so that lowering is all that differs. (ONNX Runtime's
    own converter leaves graphs whose nodes are not in order.) Inputs and outputs stay FP32.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = plain_onnx(captured, opset=opset)
        if precision in (Precision.FP16, Precision.BF16):
            to_half(plain, precision, {})
        yield save_model(plain, Path(folder) / "plain.onnx")[0]


def eager_system(captured: CapturedModel, feeds: Mapping[str, Array], name: str, threads: int) -> System:
    """The original model in eager PyTorch, with as many threads as everything else."""
    torch.set_num_threads(threads)
    return System(name, lambda: captured.reference(feeds))
