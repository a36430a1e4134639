"""A copy of a model whose outputs are statistics of its activations: a batch returns numbers, not activations.

Stock calibrators keep the activations of all samples (onnxruntime#10503, #21979).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.append import Appender, observed_copy
from attn_deploy.export.precision.histogram import BINS, GREATEST_EXPONENT, LEAST_EXPONENT, Histogram
from attn_deploy.session import Array

EXPONENTS = np.arange(LEAST_EXPONENT, GREATEST_EXPONENT + 1)

COUNTED = 2**15
"""Elements of a sample that its histogram counts, about: a map of convolutions has up to a million, and counting all of
them costs several times as much as the model itself. Extrema are of all."""

INDEX_MASK = 4 * BINS - 1
"""Keeps an index in bounds where the value is NaN or infinite, which the extrema tell."""


@dataclass(frozen=True)
class Wanted:
    """What is collected of the value `name`: its extrema always; its `histogram`; the extrema of each channel along
    `channel_axis` (1 for what a convolution reads, -1 for what a norm writes; the value has two axes or more)."""

    name: str
    histogram: bool = False
    channel_axis: int | None = None


@dataclass(frozen=True)
class Seen:
    """Of one value in one batch: `minimum` and `maximum`, float32 [rows, channels], NaN or infinite where a value of
    the row is; channels 1 where none were wanted. A row is an entry of the value's first axis."""

    minimum: Array
    maximum: Array
    histogram: Histogram | None


def observing(model: ir.Model, wanted: Sequence[Wanted]) -> ir.Model:
    """A copy whose outputs `read` understands.

    What is seen of the last values comes first in the graph: ONNX Runtime runs what the last of a graph's ends needs
    before the others, so each value is seen, and let go, before the next one is computed.
    """
    copy, values = observed_copy(model)
    order = {name: number for number, name in enumerate(values)}
    for each in sorted(wanted, key=lambda w: order[w.name], reverse=True):
        _watch(Appender(copy, f"{each.name}/statistics"), each, values[each.name])
    return copy


def read(wanted: Wanted, outputs: Mapping[str, Array]) -> Seen:
    """One value's part of the outputs of a batch."""
    minimum, maximum = (outputs[f"{wanted.name}/{kind}"] for kind in ("minimum", "maximum"))
    histogram = None
    if wanted.histogram:
        counts = outputs[f"{wanted.name}/histogram"].astype(np.int64)
        counts[2 * BINS - 1] += counts[2 * BINS :].sum()
        exponent = int(outputs[f"{wanted.name}/exponent"]) + LEAST_EXPONENT
        histogram = Histogram(counts[: 2 * BINS], min(exponent, GREATEST_EXPONENT))
    return Seen(minimum, maximum, histogram)


def _watch(append: Appender, wanted: Wanted, value: ir.Value) -> None:
    minimum, maximum = _extrema(append, value, wanted.channel_axis)
    append.output(f"{wanted.name}/minimum", minimum, rank=2)
    append.output(f"{wanted.name}/maximum", maximum, rank=2)
    if wanted.histogram:
        counts, exponent = _histogram(append, value, minimum, maximum)
        append.output(f"{wanted.name}/histogram", counts, rank=1, dtype=ir.DataType.INT32)
        append.output(f"{wanted.name}/exponent", exponent, dtype=ir.DataType.INT32)


def _extrema(append: Appender, value: ir.Value, channel_axis: int | None) -> tuple[ir.Value, ir.Value]:
    """float32 [rows, channels] each.

    ONNX Runtime's ReduceMin and ReduceMax pass over NaN, the sum does not: it makes NaN of both. It may overflow where
    a mask holds the lowest number, so infinity in it says nothing.
    """
    scalar = value.shape is not None and len(value.shape) == 0
    dims: tuple[int, ...] = (1, 1) if scalar else (0, -1)
    axis, keep = 1, 1
    if channel_axis == 1:
        dims, axis, keep = (0, _channels(value, 1), -1), 2, 0
    elif channel_axis is not None:
        dims, axis, keep = (0, -1, _channels(value, -1)), 1, 0
    rows = append.op("Reshape", value, append.constant("rows", np.array(dims, np.int64)))
    axes = append.constant("axis", np.array([axis], np.int64))
    low, high, total = (append.op(kind, rows, axes, keepdims=keep) for kind in ("ReduceMin", "ReduceMax", "ReduceSum"))
    lost, zero = append.constant("nan", np.float32(np.nan)), append.constant("zero", np.float32(0))
    nothing = append.op("Where", append.op("IsNaN", total), lost, zero)
    return append.op("Add", low, nothing), append.op("Add", high, nothing)


def _histogram(append: Appender, value: ir.Value, minimum: ir.Value, maximum: ir.Value) -> tuple[ir.Value, ir.Value]:
    """int32 [4 * BINS], of which the first half counts, and the exponent of the range as an index into EXPONENTS: the
    number of powers of two that the largest |x| reaches, which is exact where a logarithm is not."""
    largest = append.op("ReduceMax", append.op("Max", append.op("Abs", minimum), append.op("Abs", maximum)), keepdims=0)
    powers = append.constant("powers", np.ldexp(np.float32(1), EXPONENTS[:-1]).astype(np.float32))
    reached = append.op("Cast", append.op("LessOrEqual", powers, largest), to=int(ir.DataType.INT32))
    exponent = append.op("ReduceSum", reached, keepdims=0)
    factors = append.constant("factors", np.ldexp(np.float32(BINS), -EXPONENTS).astype(np.float32))
    flat = append.op("Reshape", value, append.constant("flat", np.array([-1], np.int64)))
    if (stride := _stride(value)) > 1:
        bounds = [append.constant(n, np.array([v], np.int64)) for n, v in
                  (("first", 0), ("end", np.iinfo(np.int64).max), ("axis_0", 0), ("stride", stride))]  # fmt: skip
        flat = append.op("Slice", flat, *bounds)
    scaled = append.op("Mul", flat, append.op("Gather", factors, exponent))
    middle = append.constant("middle", np.float32(BINS))
    bins = append.op("Cast", append.op("Add", scaled, middle), to=int(ir.DataType.INT32))
    safe = append.op("BitwiseAnd", bins, append.constant("mask", np.int32(INDEX_MASK)))
    ones = append.op("Expand", append.constant("one", np.ones(1, np.int32)), append.op("Shape", safe))
    empty = append.constant("empty", np.zeros(INDEX_MASK + 1, np.int32))
    return append.op("ScatterElements", empty, safe, ones, axis=0, reduction="add"), exponent


def _stride(value: ir.Value) -> int:
    """How many elements are passed over from one that counts to the next: no divisor of a dimension, so that all rows,
    columns and channels are met alike."""
    dims = [] if value.shape is None else [dim for dim in value.shape[1:] if isinstance(dim, int)]
    stride = math.ceil(math.prod(dims) / COUNTED)
    while stride > 1 and any(math.gcd(stride, dim) > 1 for dim in dims):
        stride += 1
    return stride


def _channels(value: ir.Value, axis: int) -> int:
    assert value.shape is not None
    channels = value.shape[axis]
    assert isinstance(channels, int)
    return channels
