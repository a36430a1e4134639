"""The budget and the choice."""

from __future__ import annotations

import pytest

from attn_deploy.choice import Budget, choose, share_fault
from attn_deploy.parity import Tolerance
from attn_deploy.receipt import Accuracy, CandidateEntry, Latency
from attn_deploy.target import Precision, Target


def candidate(
    id: str, p50_ms: float | None, *, status: str = "passed", target: str = "onnxruntime-cpu"
) -> CandidateEntry:
    latency = None if p50_ms is None else Latency(1, 1, 10, p50_ms, p50_ms, p50_ms, p50_ms, (p50_ms, p50_ms))
    return CandidateEntry(id, target, "fp32", status, None if status == "passed" else "why", latency=latency)


def chosen(*rows: CandidateEntry) -> dict[str, str]:
    """The choice with a measurement that trusts every difference of the medians beyond 2 %."""
    times = {row.id: row.latency.p50_ms for row in rows if row.latency is not None}
    return choose(rows, lambda a, b: a in times and (b not in times or times[b] / times[a] > 1.02))


def test_the_fastest_that_passed_is_chosen() -> None:
    assert chosen(candidate("a", 3.0), candidate("b", 1.0), candidate("c", 2.0)) == {"onnxruntime-cpu": "b"}


def test_the_plainest_is_chosen_where_the_fastest_is_not_clearly_faster() -> None:
    rows = (candidate("fp32", 1.01), candidate("native", 1.0), candidate("int8", 1.005))
    assert chosen(*rows) == {"onnxruntime-cpu": "fp32"}


def test_a_plain_one_that_is_clearly_slower_is_passed_over() -> None:
    rows = (candidate("fp32", 1.5), candidate("native", 1.01), candidate("int8", 1.0))
    assert chosen(*rows) == {"onnxruntime-cpu": "native"}


@pytest.mark.parametrize("status", ["failed", "not_run"])
def test_what_did_not_pass_is_not_chosen_however_fast(status: str) -> None:
    assert chosen(candidate("fast", 1.0, status=status), candidate("slow", 9.0)) == {"onnxruntime-cpu": "slow"}
    assert chosen(candidate("fast", 1.0, status=status)) == {}


def test_each_target_has_its_own_choice() -> None:
    rows = (candidate("a", 3.0), candidate("b", 1.0, target="tensorrt"), candidate("c", 2.0))
    assert chosen(*rows) == {"onnxruntime-cpu": "c", "tensorrt": "b"}


def test_a_candidate_without_latency_comes_last_but_before_none() -> None:
    assert chosen(candidate("unmeasured", None), candidate("slow", 1e6)) == {"onnxruntime-cpu": "slow"}
    assert chosen(candidate("unmeasured", None)) == {"onnxruntime-cpu": "unmeasured"}


def test_of_two_equally_fast_the_first_is_chosen() -> None:
    assert chosen(candidate("first", 1.0), candidate("second", 1.0)) == {"onnxruntime-cpu": "first"}


# -- budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "given", "expected"),
    [
        (Precision.FP32, None, Tolerance(60.0, 1e-4)),
        (Precision.FP16, None, Tolerance(45.0, None)),
        (Precision.INT8, None, Tolerance(20.0, None)),
        # a budget may ask more of every precision
        (Precision.FP32, 80.0, Tolerance(80.0, 1e-4)),
        (Precision.FP16, 50.0, Tolerance(50.0, None)),
        (Precision.INT8, 30.0, Tolerance(30.0, None)),
        # and less of INT8 alone
        (Precision.FP32, 10.0, Tolerance(60.0, 1e-4)),
        (Precision.FP16, 10.0, Tolerance(45.0, None)),
        (Precision.INT8, 10.0, Tolerance(10.0, None)),
    ],
)
def test_the_floor_of_a_precision_is_not_lowered_by_a_budget(
    precision: Precision, given: float | None, expected: Tolerance
) -> None:
    assert Budget(min_sqnr_db=given).tolerance(precision) == expected


def accuracy(value: float, reference: float = 80.0) -> Accuracy:
    return Accuracy("top1", value, reference, 100)


@pytest.mark.parametrize(
    ("budget", "value", "fault"),
    [
        (Budget(), 79.0, None),
        (Budget(), 78.9, "top1 drops by 1.10 points, budget 1.00"),
        (Budget(max_drop=0.0), 80.0, None),
        (Budget(max_drop=0.0), 79.5, "top1 drops by 0.50 points, budget 0.00"),
        (Budget(max_drop=5.0), 75.0, None),
        (Budget(), 90.0, None),
    ],
    ids=["one point by default", "more than one", "none allowed", "none kept", "exactly the budget", "better"],
)
def test_a_drop_beyond_the_budget_is_a_fault(budget: Budget, value: float, fault: str | None) -> None:
    assert budget.accuracy_fault(1.0, accuracy(value)) == fault


def test_a_drop_of_decimals_that_are_no_binary_fractions_is_exactly_the_budget() -> None:
    assert Budget(max_drop=0.3).accuracy_fault(None, accuracy(80.1, 80.4)) is None


@pytest.mark.parametrize(
    ("agreement", "fault"), [(0.99, None), (1.0, None), (0.98, "agreement 0.9800, budget 0.9900"), (None, None)]
)
def test_agreement_below_the_budget_is_a_fault(agreement: float | None, fault: str | None) -> None:
    assert Budget(min_agreement=0.99).accuracy_fault(agreement, None) == fault


def test_agreement_is_not_asked_for_without_a_budget() -> None:
    assert Budget().accuracy_fault(0.0, None) is None


# -- precision -------------------------------------------------------------------------------------------------------


CPU, CUDA, TENSORRT = Target.ONNXRUNTIME_CPU, Target.ONNXRUNTIME_CUDA, Target.TENSORRT


@pytest.mark.parametrize("target", [CPU, CUDA, TENSORRT], ids=str)
def test_int8_means_nine_tenths_of_the_multiply_adds(target: Target) -> None:
    assert share_fault(target, Precision.INT8, {"int8": 0.9, "float32": 0.1}) is None
    fault = share_fault(target, Precision.INT8, {"int8": 0.899, "float32": 0.101})
    assert fault is not None
    assert "only 89.9%" in fault


def test_int8_without_any_integer_product_is_a_fault() -> None:
    for shares in ({"float32": 1.0}, {}):
        assert "0.0%" in str(share_fault(CPU, Precision.INT8, shares))


@pytest.mark.parametrize("target", [CUDA, TENSORRT], ids=str)
@pytest.mark.parametrize(("precision", "kind"), [(Precision.FP16, "float16"), (Precision.BF16, "bfloat16")])
def test_half_precision_on_a_gpu_that_computes_in_fp32_is_a_fault(
    target: Target, precision: Precision, kind: str
) -> None:
    assert share_fault(target, precision, {kind: 0.95, "float32": 0.05}) is None
    assert f"only 0.0% of the multiply-adds of linear layers and convolutions are in {str(precision).upper()}" == (
        share_fault(target, precision, {"float32": 1.0})
    )


def test_fp16_on_a_cpu_is_storage_and_fp32_asks_for_nothing() -> None:
    assert share_fault(CPU, Precision.FP16, {"float32": 1.0}) is None
    assert share_fault(CUDA, Precision.FP32, {"float32": 1.0}) is None


@pytest.mark.parametrize(("precision", "floor_db"), [(Precision.FP16, 45.0), (Precision.BF16, 35.0)])
def test_half_precision_has_a_floor_that_no_budget_lowers(precision: Precision, floor_db: float) -> None:
    assert Budget().tolerance(precision).min_sqnr_db == floor_db
    assert Budget(min_sqnr_db=20.0).tolerance(precision).min_sqnr_db == floor_db
    assert Budget(min_sqnr_db=50.0).tolerance(precision).min_sqnr_db == 50.0
