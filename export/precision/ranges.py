"""How far the levels of an activation should reach: MinMax, percentile, MSE, entropy, from one histogram.

Asymmetric (256 levels around a zero point) for the CPU, symmetric (127 levels on each side of zero) for TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from attn_deploy.export.precision.histogram import BINS, Histogram
from attn_deploy.session import Array

LEVELS = 127
"""On each side of zero; -128 is not used, so that a negated value quantizes to the negated number."""

UNSIGNED_LEVELS = 255
"""Steps between the 256 levels."""

SMALLEST_SCALE = float(np.finfo(np.float16).tiny)
"""Of an activation: below it FP16 loses bits of the scale; a value that small beside its level is zero anyway."""

SMALLEST_SHARE = 0.125
"""Of the largest value that a range may be cut to: below it a bin is wider than a level."""

PERCENTILE = 99.99

SHARES = np.linspace(SMALLEST_SHARE, 1.0, 113)
"""Of a range, tried for what they lose."""

ROUNDS = 2
"""How often the two ends of an asymmetric range are set in turn; a third changes nothing in the first two digits."""


class RangeMethod(StrEnum):
    """How the range of an activation follows from its histogram."""

    MIN_MAX = "the extrema"
    PERCENTILE = "99.99 % of the values"
    MSE = "the least mean squared error"
    ENTROPY = "the least divergence (KL)"


@dataclass(frozen=True)
class Range:
    """Range of an activation over all samples. Not the mean of the samples' extrema: on
    mobilenetv3_small_100 with real images that clipped what mattered (6 dB where the whole range left 21)."""

    low: float
    high: float


def symmetric_limit(histogram: Histogram, largest: float, method: RangeMethod) -> float:
    """The |x| that the last of 127 levels stands for, at most `largest`, the largest |x|."""
    if method is RangeMethod.MIN_MAX or not histogram.total or not largest:
        return largest
    width = histogram.limit / BINS
    counts = histogram.magnitudes()
    if method is RangeMethod.PERCENTILE:
        enough = np.cumsum(counts) >= counts.sum() * (PERCENTILE / 100)
        cut = (int(np.argmax(enough)) + 1) * width
        return float(np.clip(cut, SMALLEST_SHARE * largest, largest))
    centres = (np.arange(BINS) + 0.5) * width
    limits = SHARES * largest
    if method is RangeMethod.ENTROPY:
        bins = np.maximum(np.rint(limits / width).astype(int), LEVELS + 1)
        return float(limits[np.argmin([_divergence(_without_zeros(counts), 0, end, LEVELS + 1) for end in bins])])
    used = counts > 0
    return float(limits[np.argmin([_symmetric_error(centres[used], counts[used], limit) for limit in limits])])


def asymmetric_range(histogram: Histogram, low: float, high: float, method: RangeMethod) -> Range:
    """Where the first and the last of 256 levels lie, within the extrema `low` and `high`; zero is between them."""
    low, high = min(low, 0.0), max(high, 0.0)
    if method is RangeMethod.MIN_MAX or not histogram.total or low == high:
        return Range(low, high)
    if method is RangeMethod.PERCENTILE:
        return _percentile(histogram, low, high)
    if method is RangeMethod.ENTROPY:
        return _entropy(histogram, low, high)
    return _least_error(histogram, low, high)


def _percentile(histogram: Histogram, low: float, high: float) -> Range:
    """What is left out is left out in halves at both ends."""
    edges, total = histogram.edges(), np.cumsum(histogram.counts)
    rare = total[-1] * (1 - PERCENTILE / 100) / 2
    first = edges[int(np.searchsorted(total, rare, side="right"))]
    last = edges[int(np.searchsorted(total, total[-1] - rare)) + 1]
    return Range(float(np.clip(first, low, SMALLEST_SHARE * low)), float(np.clip(last, SMALLEST_SHARE * high, high)))


def _least_error(histogram: Histogram, low: float, high: float) -> Range:
    """Rounding and clipping together (Choukroun et al., Low-bit Quantization, 2019, section 3)."""
    used = histogram.counts > 0
    edges = histogram.edges()
    centres, counts = ((edges[:-1] + edges[1:]) / 2)[used], histogram.counts[used]
    return _least(lambda span: _asymmetric_error(centres, counts, span), low, high)


def _entropy(histogram: Histogram, low: float, high: float) -> Range:
    width = histogram.limit / BINS
    below, above = histogram.counts[BINS - 1 :: -1], histogram.counts[BINS:]
    counts = np.concatenate([_without_zeros(below)[::-1], _without_zeros(above)])

    def divergence(span: Range) -> float:
        start, end = BINS + int(np.floor(span.low / width)), BINS + int(np.ceil(span.high / width))
        return _divergence(counts, max(start, 0), min(end, 2 * BINS), UNSIGNED_LEVELS + 1)

    return _least(divergence, low, high)


def _least(loss: Callable[[Range], float], low: float, high: float) -> Range:
    """Each end in turn at the share of its extremum with the least loss."""
    ends = Range(low, high)
    for _ in range(ROUNDS):
        if high:
            ends = min((Range(ends.low, float(share * high)) for share in SHARES), key=loss)
        if low:
            ends = min((Range(float(share * low), ends.high) for share in SHARES), key=loss)
    return ends


def _without_zeros(counts: Array) -> Array:
    """Zero has a level of its own with any range: the many zeros behind a ReLU say nothing of how far it should
    reach."""
    rest = counts.copy()
    rest[0] = min(counts[0], counts[1])
    return rest


def _symmetric_error(centres: Array, counts: Array, limit: float) -> float:
    step = limit / LEVELS
    error = centres - step * np.minimum(np.rint(centres / step), LEVELS)
    return float((error**2) @ counts)


def _asymmetric_error(centres: Array, counts: Array, span: Range) -> float:
    step = (span.high - span.low) / UNSIGNED_LEVELS
    if step <= 0:
        return float((centres**2) @ counts)
    zero = np.rint(-span.low / step)
    error = centres - step * (np.clip(np.rint(centres / step) + zero, 0, UNSIGNED_LEVELS) - zero)
    return float((error**2) @ counts)


def _divergence(counts: Array, start: int, end: int, levels: int) -> float:
    """Kullback-Leibler divergence of the values, those outside [start, end) moved to the ends, from what `levels`
    levels inside keep of them (Migacz, 8-bit Inference with TensorRT, GTC 2017): each level spreads its count evenly
    over those of its bins that are not empty. Infinite for fewer bins than levels."""
    inside = counts[start:end].astype(np.float64)
    clipped = inside.copy()
    if end - start < levels or not inside.sum():
        return float("inf")
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[end:].sum()
    level = np.arange(end - start) * levels // (end - start)
    firsts = np.searchsorted(level, np.arange(levels))
    filled = np.add.reduceat((clipped > 0).astype(np.float64), firsts)
    kept = np.add.reduceat(inside, firsts) / np.maximum(filled, 1)
    here = clipped > 0
    spread = np.maximum(kept[level][here] / inside.sum(), SMALLEST_LIKELIHOOD)
    reference = clipped[here] / clipped.sum()
    return float(np.sum(reference * np.log(reference / spread)))


SMALLEST_LIKELIHOOD = 1e-9
"""Of a bin into which only clipped values fall: no level gives it any."""
