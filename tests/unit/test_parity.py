"""Distances and tolerances: streamed sums equal NumPy's, and nothing that proves nothing passes."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest

from attn_deploy.inputs import ExampleInput
from attn_deploy.parity import (
    EXACT_DB,
    Case,
    Moments,
    Tolerance,
    case_row,
    compare,
    parity_cases,
    parity_fault,
    sqnr_db,
    summarize,
)
from attn_deploy.receipt import CaseParity, Fidelity, SiteParity
from attn_deploy.session import DimBounds

FP32 = Tolerance(60.0, 1e-4)


def noisy(*shape: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    reference = rng.standard_normal(shape).astype(np.float32) + 0.5
    return reference, reference + rng.standard_normal(shape).astype(np.float32) * np.float32(noise)


def directly(reference: np.ndarray, value: np.ndarray) -> Fidelity:
    """The definitions of receipt.Fidelity, on everything at once."""
    r, v = reference.astype(np.float64), value.astype(np.float64)
    largest = np.abs(r - v).max()
    return Fidelity(
        max_abs=largest,
        max_rel=largest / max(np.abs(r).max(), r.max() - r.min()),
        cosine=(r * v).sum() / math.sqrt((r**2).sum() * (v**2).sum()),
        sqnr_db=10 * math.log10((r**2).sum() / ((r - v) ** 2).sum()),
    )


def streamed(reference: np.ndarray, value: np.ndarray, batch: int) -> Moments:
    moments = Moments()
    for start in range(0, len(reference), batch):
        moments.add(reference[start : start + batch], value[start : start + batch])
    return moments


def assert_same(got: Fidelity, expected: Fidelity) -> None:
    assert msgspec.structs.astuple(got) == pytest.approx(msgspec.structs.astuple(expected), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 3, 8, 32], ids="batches of {}".format)
def test_streaming_gives_what_numpy_gives_at_once(batch: int) -> None:
    reference, value = noisy(32, 3, 5)
    moments = streamed(reference, value, batch)
    assert_same(moments.fidelity(), directly(reference, value))
    assert moments.inputs == 32


@pytest.mark.parametrize("shift", [-100.0, 100.0], ids=["all below zero", "all above zero"])
def test_range_is_never_less_than_the_largest_magnitude(shift: float) -> None:
    reference, value = noisy(8, 5)
    assert_same(streamed(reference + shift, value + shift, 2).fidelity(), directly(reference + shift, value + shift))


def test_memory_does_not_grow_with_the_samples() -> None:
    reference, value = noisy(4, 1000)
    moments = Moments()
    peaks = []
    tracemalloc.start()
    for rounds in (2, 20):
        tracemalloc.reset_peak()
        for _ in range(rounds):
            moments.add(reference, value)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_equal_tensors_score_the_highest_and_it_is_finite() -> None:
    reference, _ = noisy(4, 5)
    assert msgspec.structs.astuple(streamed(reference, reference, 2).fidelity()) == pytest.approx((0, 0, 1, EXACT_DB))


def test_sqnr_is_that_of_the_formula() -> None:
    # signal 100, noise 1: 20 dB
    assert sqnr_db(np.array([10.0, 0.0]), np.array([9.0, 0.0])) == pytest.approx(20.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=repr)
def test_one_value_that_is_not_finite_scores_the_lowest_and_stays_so(bad: float) -> None:
    reference, value = noisy(4, 5)
    broken = value.copy()
    broken[2, 3] = bad
    moments = streamed(reference, broken, 4)
    moments.add(reference, reference)
    fidelity = moments.fidelity()
    assert fidelity.sqnr_db == -EXACT_DB
    assert all(math.isfinite(x) for x in msgspec.structs.astuple(fidelity))
    assert not Tolerance(-EXACT_DB + 1, None).holds(fidelity)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf], ids=repr)
def test_what_the_reference_has_not_finite_the_value_must_have_too(special: float) -> None:
    reference, value = noisy(4, 5)
    reference[1, 1] = special
    assert sqnr_db(reference, value) == -EXACT_DB
    value[1, 1] = special
    rest = np.ones_like(reference, bool)
    rest[1, 1] = False
    assert sqnr_db(reference, value) == pytest.approx(directly(reference[rest], value[rest]).sqnr_db)


def test_a_signal_of_zeros_is_matched_by_zeros_alone() -> None:
    zeros = np.zeros((2, 3))
    assert sqnr_db(zeros, zeros) == EXACT_DB
    assert sqnr_db(zeros, zeros + 1e-9) == -EXACT_DB


def test_shapes_that_differ_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"reference \(2, 3\), value \(2, 4\)"):
        Moments().add(np.zeros((2, 3)), np.zeros((2, 4)))


def test_integers_and_booleans_are_compared_as_numbers() -> None:
    assert sqnr_db(np.array([10, 0]), np.array([9, 0])) == pytest.approx(20.0)
    assert sqnr_db(np.array([True, False]), np.array([True, False])) == EXACT_DB


# -- verdicts --------------------------------------------------------------------------------------------------------


def rows_of(reference: Any, value: Any, tolerance: Tolerance = FP32) -> list[CaseParity]:
    case = Case("normal", {"x": np.zeros((2, 3), np.float32)}, typical=True)
    return compare(case, {"y": np.asarray(reference)}, {"y": np.asarray(value)}, tolerance, judged=True)


@pytest.mark.parametrize(
    ("error", "passes"), [(0.0, True), (1e-6, True), (2e-4, False), (0.1, False)], ids=["0", "1e-6", "2e-4", "0.1"]
)
def test_an_output_passes_within_its_tolerance_alone(error: float, passes: bool) -> None:
    reference, _ = noisy(2, 50)
    (row,) = rows_of(reference, reference * (1 + error))
    assert row.passed is passes
    assert (row.output, row.inputs) == ("y", 2)


def test_one_element_far_off_fails_by_the_range_where_the_sqnr_is_still_good() -> None:
    reference, _ = noisy(2, 100_000)
    value = reference.copy()
    value[1, 7] += 0.01
    (row,) = rows_of(reference, value)
    assert row.sqnr_db > 60
    assert not row.passed
    assert rows_of(reference, value, Tolerance(60.0, None))[0].passed


def test_a_constant_reference_proves_nothing() -> None:
    (row,) = rows_of(np.full((2, 5), 3.0), np.full((2, 5), 3.0))
    assert row.sqnr_db == EXACT_DB
    assert not row.passed
    fault = parity_fault(summarize([row], [], None), FP32)
    assert fault is not None
    assert "a reference that varies" in fault


def test_a_reference_without_one_finite_value_proves_nothing() -> None:
    assert not rows_of(np.full((2, 5), np.nan), np.full((2, 5), np.nan))[0].passed


def test_an_output_of_one_element_may_be_any_number() -> None:
    assert rows_of([[3.0]], [[3.0]])[0].passed


def test_a_tolerance_says_what_it_asks() -> None:
    assert FP32.describe() == "60 dB or more and an error of 0.0001 of the range at most"
    assert Tolerance(20.0, None).describe() == "20 dB or more"


def row(name: str, sqnr: float, *, judged: bool = True, passed: bool = True) -> CaseParity:
    return case_row(name, 2, "y", Fidelity(1 / sqnr, 1 / sqnr, sqnr / 100, sqnr), judged=judged, passed=passed)


def test_the_worst_of_the_judged_cases_stands_for_the_candidate() -> None:
    cases = [row("normal", 50), row("odd batch", 40), row("large values", 5, judged=False, passed=False)]
    parity = summarize(cases, [], 0.75)
    assert (parity.max_abs, parity.max_rel, parity.cosine, parity.sqnr_db) == (1 / 40, 1 / 40, 0.4, 40)
    assert (parity.inputs, parity.top1_agreement, len(parity.cases)) == (4, 0.75, 3)
    assert parity_fault(parity, FP32) is None


def test_inputs_of_a_case_with_two_outputs_count_once() -> None:
    twin = msgspec.structs.replace(row("normal", 50), output="z")
    assert summarize([row("normal", 50), twin], [], None).inputs == 2


def test_a_fault_names_the_output_and_the_case() -> None:
    fault = parity_fault(summarize([row("normal", 70), row("odd batch", 12, passed=False)], [], None), FP32)
    assert fault is not None
    assert fault.startswith("output 'y' on odd batch: 12.0 dB")
    assert "60 dB" in fault


def test_a_fault_names_the_site() -> None:
    site = SiteParity("layer3.attn", 1.0, 1.0, 0.5, 7.0, passed=False)
    assert parity_fault(summarize([row("normal", 70)], [site], None), FP32) == (
        f"site layer3.attn: 7.0 dB, expected {FP32.describe()}"
    )
    beside_int8 = msgspec.structs.replace(site, min_sqnr_db=60.0)
    fault = parity_fault(summarize([row("normal", 70)], [beside_int8], None), Tolerance(20.0, None))
    assert fault == "site layer3.attn: 7.0 dB, expected 60 dB or more"


# -- cases -----------------------------------------------------------------------------------------------------------

IDS = ExampleInput("ids", (1, 8), "int64", high=50)
MASK = ExampleInput("mask", (1, 8), "int64", mask=True)
IMAGE = ExampleInput("x", (1, 3, 4, 4))


def batches(inputs: list[ExampleInput], **dims: DimBounds) -> dict[str, int]:
    return {c.name: len(next(iter(c.feeds.values()))) for c in parity_cases(inputs, dims)}


def test_a_dynamic_batch_is_tried_with_two_one_and_three() -> None:
    assert batches([IMAGE], batch=DimBounds()) == {"normal": 2, "single sample": 1, "odd batch": 3, "large values": 2}


def test_batches_stay_inside_the_bounds() -> None:
    assert set(batches([IMAGE], batch=DimBounds(2, 2)).values()) == {2}
    assert set(batches([IMAGE], batch=DimBounds(4, 8)).values()) == {4}


def test_a_fixed_batch_is_kept() -> None:
    five = ExampleInput("x", (5, 3, 4, 4))
    assert batches([five]) == {"normal": 5, "large values": 5}


def test_large_values_are_ten_times_the_normal_ones() -> None:
    by_name = {c.name: c for c in parity_cases([ExampleInput("x", (1, 10_000))], {})}
    assert by_name["large values"].feeds["x"].std() == pytest.approx(10.0, rel=0.05)
    assert not by_name["large values"].typical
    assert by_name["normal"].typical


def test_a_masked_row_case_leaves_one_token_and_stands_only_where_there_is_a_mask() -> None:
    by_name = {c.name: c for c in parity_cases([IDS, MASK], {"batch": DimBounds()})}
    np.testing.assert_array_equal(by_name["masked rows"].feeds["mask"], [[1] + [0] * 7] * 2)
    assert len(np.unique(by_name["masked rows"].feeds["ids"])) > 2
    assert not by_name["masked rows"].typical
    assert "large values" not in by_name
    assert "masked rows" not in batches([IDS])


def test_no_two_cases_feed_the_same() -> None:
    cases = parity_cases([IMAGE], {"batch": DimBounds(2, 2)})
    first = [c.feeds["x"].ravel()[0] for c in cases]
    assert len(set(first)) == len(cases)
