"""Builds candidates as files, and the peers that they are measured against."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir
import torch

from attn_deploy.built import Built
from attn_deploy.bundle import CANONICAL, PORTABLE
from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.lower import RECIPES, Asked, pairs
from attn_deploy.export.lower.lowered import Conditions, Lowered
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.rewrite import RewrittenModel
from attn_deploy.export.site_parity import SiteRecord, record_sites, site_cases
from attn_deploy.export.to_onnx import CanonicalModel, plain_onnx, portable, save_model
from attn_deploy.latency import System
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target

BYTES_PER_MB = 1_000_000


class Options(Asked, Protocol):
    """The part of the export's options that building reads."""

    @property
    def exclude(self) -> Sequence[str]: ...
    @property
    def tensorrt_version(self) -> tuple[int, int] | None: ...


class Report(Protocol):
    def step(self, done: int, total: int) -> None: ...


def save_sources(canonical: CanonicalModel, folder: Path) -> None:
    """canonical.onnx and portable.onnx."""
    save_model(canonical.model, folder / CANONICAL)
    save_model(portable(canonical), folder / PORTABLE)


def build_candidates(
    rewritten: RewrittenModel,
    canonical: CanonicalModel,
    folder: Path,
    options: Options,
    calibration: Callable[[], Iterable[Mapping[str, Array]]],
    open_model: OpenModel,
    kernels: Mapping[Target, Sequence[str]],
    report: Report,
) -> Iterator[Built]:
    """Every target x precision x lowering, written under `variants/`. `kernels`: the forms that a target's native
    library has."""
    records = record_sites(rewritten)
    (folder / "variants").mkdir()
    plans = []
    for target, precision in pairs(options):
        conditions = Conditions(frozenset(kernels.get(target, ())), options.tensorrt_version)
        found = RECIPES[target].alternatives(canonical, precision, conditions)
        plans += [(target, precision, alternative) for alternative in found]
    before: tuple[Any, Lowered] | None = None
    for done, (target, precision, alternative) in enumerate(plans):
        report.step(done, len(plans))
        asked = (target, precision, alternative.arguments)
        if before is None or before[0] != asked:
            lowered = RECIPES[target].lower(
                canonical, precision, calibration=calibration, open_model=open_model, exclude=options.exclude,
                **alternative.arguments,
            )  # fmt: skip
            before = (asked, lowered)
        lowered = replace(before[1], options={**before[1].options, **alternative.options})
        name = f"{target}-{precision}{alternative.suffix}"
        files = save_model(lowered.model, folder / "variants" / f"{name}.onnx")
        yield _built(name, target, precision, files, lowered, canonical, records)


def _built(
    name: str, target: Target, precision: Precision, files: tuple[Path, ...], lowered: Lowered,
    canonical: CanonicalModel, records: Mapping[str, SiteRecord],
) -> Built:  # fmt: skip
    return Built(
        id=name,
        target=target,
        precision=precision,
        files=files,
        library=lowered.library,
        sites=tuple((s.module, s.node) for s in canonical.sites),
        exempt=lowered.plan.exempt + lowered.notes,
        storage=_storage_mb(lowered.model),
        options=lowered.options,
        blocks=lowered.blocks,
        site_cases=partial(site_cases, canonical, lowered.model, records),
    )


def _storage_mb(model: ir.Model) -> dict[str, float]:
    """Megabytes of weights by stored type."""
    count: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            count[str(value.const_value.dtype.numpy())] += value.const_value.nbytes
    return {kind: round(size / BYTES_PER_MB, 6) for kind, size in count.most_common()}


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
