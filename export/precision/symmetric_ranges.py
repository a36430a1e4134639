"""Symmetric ranges of activations from streamed histograms: how far 127 levels on each side of zero should reach.

Two passes over the calibration data: the largest |x|, then a histogram of |x| up to it, which the graph itself counts,
so that a batch returns the counts and not the activations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.precision.calibration import OpenModel, observed_copy
from attn_deploy.export.precision.half_ranges import collect_magnitudes
from attn_deploy.session import Array

BINS = 2048
LEVELS = 127
"""On each side of zero; -128 is not used, so that a negated value quantizes to the negated number."""

SMALLEST_SCALE = float(np.finfo(np.float16).tiny)
"""Of an activation: below it FP16 loses bits of the scale; a value that small beside its level is zero anyway."""

SMALLEST_SHARE = 0.125
"""Of the largest value that a range may be cut to: below it a bin is wider than half of a level."""

PERCENTILE = 99.99


def activation_scale(limit: float) -> Array:
    """The scale of one level, float32 [], where `limit` is the |x| of the last one."""
    return np.array(max(limit / LEVELS, SMALLEST_SCALE), np.float32)


class RangeMethod(StrEnum):
    MAX = "the largest value"
    PERCENTILE = "99.99 % of the values"
    MSE = "the least mean squared error"


@dataclass(frozen=True)
class Histogram:
    """`counts` [BINS]: how many |x| fall between k / BINS and (k + 1) / BINS of `largest`."""

    counts: Array
    largest: float

    def limit(self, method: RangeMethod) -> float:
        """The |x| that the last level stands for. MSE: of all shares of the largest value the one that loses least,
        rounding and clipping together (Choukroun et al., Low-bit Quantization, 2019, section 3)."""
        total = float(self.counts.sum())
        if method is RangeMethod.MAX or not total:
            return self.largest
        if method is RangeMethod.PERCENTILE:
            enough = np.cumsum(self.counts) >= total * PERCENTILE / 100
            return float(self.largest * max((int(np.argmax(enough)) + 1) / BINS, SMALLEST_SHARE))
        centres = (np.arange(BINS) + 0.5) / BINS
        limits = np.linspace(SMALLEST_SHARE, 1.0, 113)
        steps = limits[:, None] / LEVELS
        error = centres - steps * np.minimum(np.rint(centres / steps), LEVELS)
        return float(self.largest * limits[np.argmin((error**2) @ self.counts)])


def collect_largest(
    model: ir.Model, names: Collection[str], batches: Iterable[Mapping[str, Array]], open_model: OpenModel
) -> dict[str, float]:
    """max |x| by value name. Raises AttnDeployError where a value is not finite, or without any sample."""
    largest = collect_magnitudes(model, batches, open_model, names, larger=1)
    for name, magnitude in largest.items():
        if not np.isfinite(magnitude):
            raise AttnDeployError("an activation is not finite on the calibration data", where=name)
    return largest


def collect_histograms(
    model: ir.Model, largest: Mapping[str, float], batches: Iterable[Mapping[str, Array]], open_model: OpenModel
) -> dict[str, Histogram]:
    """Histograms of |x| by value name; `largest` are the magnitudes on the same batches."""
    run = open_model(_with_histograms(model, largest))
    counts = {name: np.zeros(BINS, np.int64) for name in largest}
    for feeds in batches:
        outputs = run(feeds)
        for name in largest:
            counts[name] += outputs[f"{name}/histogram"]
    return {name: Histogram(counts[name], largest[name]) for name in largest}


def _with_histograms(model: ir.Model, largest: Mapping[str, float]) -> ir.Model:
    """A copy whose outputs are the histograms, each int64 [BINS]."""
    copy, values = observed_copy(model)

    def constant(label: str, array: Array) -> ir.Value:
        name = f"calibration/{label}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        copy.graph.register_initializer(value)
        return value

    empty = constant("empty", np.zeros(BINS, np.int64))
    one = constant("one", np.ones(1, np.int64))
    flat = constant("flat", np.array([-1], np.int64))
    last = constant("last", np.array(BINS - 1, np.float32))
    for name, magnitude in largest.items():
        factor = constant(f"{name}/bins", np.array(BINS / max(magnitude, 1e-30), np.float32))

        def op(operator: str, *inputs: ir.Value, **attributes: int | str) -> ir.Value:
            node = ir.node(operator, list(inputs), attributes, name=f"{name}/{operator}")  # noqa: B023
            copy.graph.append(node)
            return node.outputs[0]

        scaled = op("Min", op("Mul", op("Abs", values[name]), factor), last)
        bins = op("Reshape", op("Cast", scaled, to=int(ir.DataType.INT64)), flat)
        ones = op("Expand", one, op("Shape", bins))
        output = op("ScatterElements", empty, bins, ones, axis=0, reduction="add")
        output.name, output.shape = f"{name}/histogram", ir.Shape([BINS])
        output.type = ir.TensorType(ir.DataType.INT64)
        copy.graph.outputs.append(output)
    return copy
