"""Histograms with a fixed number of bins over a range that grows by powers of two.

The bins of a wider histogram are pairs of a narrower one's, so batches whose ranges differ add up exactly, one pass
over the data is enough, and more samples can be added later to what a file holds. The price is at most one of the
twelve bits: the largest value lies in the upper half of the range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attn_deploy.session import Array

BINS = 2048
"""On each side of zero."""

LEAST_EXPONENT, GREATEST_EXPONENT = -100, 127
"""2**-100 beside any value that matters is zero; beyond 2**127 float32 ends."""


@dataclass(frozen=True)
class Histogram:
    """`counts` int64 [2 * BINS]: how many values fall into each bin of [-limit, limit), limit = 2**exponent. A value
    at or beyond an end counts in the last bin."""

    counts: Array
    exponent: int

    @property
    def limit(self) -> float:
        return float(np.ldexp(1.0, self.exponent))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def edges(self) -> Array:
        """float64 [2 * BINS + 1]."""
        return np.arange(-BINS, BINS + 1) * (self.limit / BINS)

    def magnitudes(self) -> Array:
        """Counts of |x|, int64 [BINS], from zero on."""
        return np.asarray(self.counts[BINS:] + self.counts[BINS - 1 :: -1])

    def widened(self, exponent: int) -> Histogram:
        """The same values over a range of 2**exponent, which is no narrower. Bins meet at zero, so nothing is split."""
        if exponent < self.exponent:
            raise ValueError(f"a histogram up to 2**{self.exponent} does not fit into 2**{exponent}")
        factor = 1 << min(exponent - self.exponent, BINS.bit_length() - 1)  # beyond that all lies in the middle two
        merged = self.counts.reshape(-1, factor).sum(axis=1)
        counts = np.zeros_like(self.counts)
        start = BINS - len(merged) // 2
        counts[start : start + len(merged)] = merged
        return Histogram(counts, exponent)

    def __add__(self, other: Histogram) -> Histogram:
        exponent = max(self.exponent, other.exponent)
        return Histogram(self.widened(exponent).counts + other.widened(exponent).counts, exponent)


def empty_histogram() -> Histogram:
    return Histogram(np.zeros(2 * BINS, np.int64), LEAST_EXPONENT)


def histogram_of(values: Array) -> Histogram:
    """Of an array of finite values, as the observed graph counts them."""
    largest = float(np.abs(values).max(initial=0.0))
    exponent = int(np.frexp(largest)[1]) if largest else LEAST_EXPONENT
    exponent = max(LEAST_EXPONENT, min(exponent, GREATEST_EXPONENT))
    bins = np.floor(values.ravel().astype(np.float64) * (BINS / np.ldexp(1.0, exponent)) + BINS)
    counts = np.bincount(np.clip(bins, 0, 2 * BINS - 1).astype(np.int64), minlength=2 * BINS)
    return Histogram(counts, exponent)
