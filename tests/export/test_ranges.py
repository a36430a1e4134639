"""Histograms over a range that grows, and the ranges that follow from them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from attn_deploy.export.precision.histogram import BINS, Histogram, empty_histogram, histogram_of
from attn_deploy.export.precision.ranges import RangeMethod, asymmetric_range, symmetric_limit

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import Array, normal

# -- histograms ------------------------------------------------------------------------------------------------------


def test_a_wider_histogram_of_the_same_values_is_the_narrower_ones_bins_in_pairs() -> None:
    x = normal(1000)
    narrow = histogram_of(x)
    for exponent in range(narrow.exponent, narrow.exponent + 16):
        wide = narrow.widened(exponent)
        bins = np.floor(x.astype(np.float64) * BINS / 2.0**exponent).astype(int) + BINS
        np.testing.assert_array_equal(wide.counts, np.bincount(bins, minlength=2 * BINS))


def test_adding_an_empty_histogram_changes_nothing() -> None:
    found = histogram_of(normal(100))
    np.testing.assert_array_equal((empty_histogram() + found).counts, found.counts)
    assert histogram_of(np.zeros(5)).total == 5


# -- ranges ----------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
KINDS = {
    "normal": RNG.standard_normal(20000),
    "heavy tails": RNG.standard_t(3, 20000),
    "uniform": RNG.uniform(-1, 1, 20000),
    "an outlier": np.append(RNG.standard_normal(20000), 12.0),
    "ReLU": np.maximum(RNG.standard_normal(20000), 0),
    "GELU-like": np.append(RNG.uniform(-0.17, 0, 10000), np.abs(RNG.standard_normal(10000))),
    "above zero": RNG.uniform(3, 4, 20000),
}


def asymmetric_error(values: Array, low: float, high: float) -> float:
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return float(np.mean((values - scale * (np.clip(np.rint(values / scale) + zero, 0, 255) - zero)) ** 2))


def symmetric_error(values: Array, limit: float) -> float:
    scale = limit / 127
    return float(np.mean((values - scale * np.clip(np.rint(values / scale), -127, 127)) ** 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_squared_error_is_less_than_at_other_asymmetric_ranges(kind: str) -> None:
    x = KINDS[kind]
    found = asymmetric_range(histogram_of(x), x.min(), x.max(), RangeMethod.MSE)
    low, high = min(x.min(), 0), max(x.max(), 0)
    shares = np.linspace(0.125, 1, 20)
    others = [asymmetric_error(x, a * low, b * high) for a in shares for b in shares if a * low < b * high]
    assert asymmetric_error(x, found.low, found.high) <= 1.03 * min(others)
    assert low <= found.low <= 0 <= found.high <= high


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_squared_error_is_less_than_at_other_symmetric_limits(kind: str) -> None:
    x = KINDS[kind]
    largest = float(np.abs(x).max())
    limit = symmetric_limit(histogram_of(x), largest, RangeMethod.MSE)
    others = [symmetric_error(x, share * largest) for share in np.linspace(0.125, 1, 40)]
    assert symmetric_error(x, limit) <= 1.03 * min(others)


@pytest.mark.parametrize("method", [m for m in RangeMethod if m is not RangeMethod.MSE])
def test_a_single_outlier_is_cut_off_by_percentile_and_entropy(method: RangeMethod) -> None:
    x = np.append(RNG.standard_normal(100_000), 40.0)
    span = asymmetric_range(histogram_of(x), x.min(), x.max(), method)
    limit = symmetric_limit(histogram_of(x), 40.0, method)
    if method is RangeMethod.MIN_MAX:
        assert (span.low, span.high, limit) == (x.min(), 40.0, 40.0)
    else:
        assert span.high < 25
        assert limit < 25


def test_entropy_keeps_all_of_what_is_spread_evenly_and_cuts_tails() -> None:
    even = KINDS["uniform"]
    assert symmetric_limit(histogram_of(even), 1.0, RangeMethod.ENTROPY) > 0.95
    tails = RNG.laplace(size=100_000)
    largest = float(np.abs(tails).max())
    assert symmetric_limit(histogram_of(tails), largest, RangeMethod.ENTROPY) < 0.95 * largest
    span = asymmetric_range(histogram_of(tails), tails.min(), tails.max(), RangeMethod.ENTROPY)
    assert span.high < 0.95 * tails.max()


def test_a_percentile_leaves_out_the_rarest_values() -> None:
    x = np.append(np.linspace(0, 1, 99_999), 4.0)
    assert symmetric_limit(histogram_of(x), 4.0, RangeMethod.PERCENTILE) == pytest.approx(1.0, abs=8 / BINS)
    assert asymmetric_range(histogram_of(x), 0.0, 4.0, RangeMethod.PERCENTILE).high == pytest.approx(1.0, abs=8 / BINS)


@pytest.mark.parametrize("method", RangeMethod)
def test_zeros_alone_have_a_range_of_nothing(method: RangeMethod) -> None:
    zeros = histogram_of(np.zeros(10))
    span = asymmetric_range(zeros, 0.0, 0.0, method)
    assert (span.low, span.high, symmetric_limit(zeros, 0.0, method)) == (0.0, 0.0, 0.0)


def test_a_histogram_does_not_shrink() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Histogram(np.ones(2 * BINS, np.int64), 3).widened(2)
