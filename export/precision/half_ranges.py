"""Magnitudes of all float activations over calibration data, in one pass: what FP16 must hold."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.half_masks import MASKED_BELOW
from attn_deploy.export.precision.half_types import is_float, prepare
from attn_deploy.export.precision.observation import Wanted, observing, read
from attn_deploy.session import Array

LARGER = 100.0
"""Inputs so many times larger than the data must not overflow: 512, the largest magnitude, is 65504 / 128."""


def float_activations(model: ir.Model) -> tuple[str, ...]:
    """Names of the FP32 values that are computed or fed, in graph order; types are inferred where they are missing."""
    copy = model.clone()
    prepare(copy, ir.DataType.FLOAT16)
    values = [*copy.graph.inputs, *(o for node in copy.graph for o in node.outputs)]
    return tuple(str(v.name) for v in values if is_float(v) and v.name)


def collect_magnitudes(
    model: ir.Model,
    batches: Iterable[Mapping[str, Array]],
    open_model: OpenModel,
    names: Collection[str] | None = None,
    *,
    larger: float = LARGER,
) -> dict[str, float]:
    """max |x| by value name over all batches, infinite where a value is NaN or infinite; all float activations when no
    `names` are given.

    The first batch also runs with its float inputs `larger` times as large, and what comes out counts as the share
    1 / `larger`: a value that grows with the square of the input, as scores without a norm before them, needs more
    room than its size on the data says. 1 leaves that out. A batch returns two numbers per sample and activation.
    Raises UsageError without any batch.
    """
    wanted = [Wanted(name) for name in (float_activations(model) if names is None else names)]
    run = open_model(observing(model, wanted))
    largest = {each.name: 0.0 for each in wanted}
    batch_count = 0
    for feeds in batches:
        for name, magnitude in _magnitudes(wanted, run(feeds)):
            largest[name] = max(largest[name], magnitude) if math.isfinite(magnitude) else math.inf
        if not batch_count and larger != 1 and (stressed := _enlarged(feeds, larger)) is not None:
            for name, magnitude in _magnitudes(wanted, run(stressed)):
                if math.isfinite(magnitude):  # else FP32 has no room for such inputs either
                    largest[name] = max(largest[name], magnitude / larger)
        batch_count += 1
    if not batch_count:
        raise UsageError("calibration saw no sample", got=0, expected="at least 1")
    return largest


def _magnitudes(wanted: Sequence[Wanted], outputs: Mapping[str, Array]) -> Iterator[tuple[str, float]]:
    """max |x| by value name, infinite or NaN where a value is not finite."""
    for each in wanted:
        seen = read(each, outputs)
        yield each.name, max(float(np.abs(seen.minimum).max()), float(np.abs(seen.maximum).max()))


def _enlarged(feeds: Mapping[str, Array], factor: float) -> dict[str, Array] | None:
    """The feeds with their float inputs scaled; None when there is none. What holds a mask's numbers stays."""
    scaled = {
        name: value * np.float32(factor)
        for name, value in feeds.items()
        if value.dtype == np.float32 and value.size and float(np.abs(value).max()) < -MASKED_BELOW
    }
    return {**feeds, **scaled} if scaled else None
