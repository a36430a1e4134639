"""A candidate that its runtime refuses: a row with its reason, and an error only where it was promised."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attn_deploy import proving
from attn_deploy.built import Built
from attn_deploy.choice import Budget
from attn_deploy.errors import NotAsAskedError
from attn_deploy.options import ExportOptions
from attn_deploy.parity import FP32_MIN_SQNR_DB, INT8_MIN_SQNR_DB, SiteCase, Tolerance
from attn_deploy.receipt import DataEntry, Receipt
from attn_deploy.target import Precision, Target
from attn_deploy.verdict import require_as_asked


@pytest.fixture
def refused(tmp_path: Path) -> proving.Proof:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model at all")
    built = Built("onnxruntime-cpu-fp32", Target.ONNXRUNTIME_CPU, Precision.FP32, (path,), library=False, sites=())
    return proving.opened(built, 1, (), ())


def test_it_has_its_reason_and_goes_through_all_stages_without_a_figure(refused: proving.Proof) -> None:
    assert refused.session is None
    assert str(refused.fault).startswith("it does not open: ONNX Runtime rejected the model; ")
    assert "broken.onnx" in str(refused.fault)
    proving.read_back(refused, {})
    proving.check_parity(refused, (), (), Budget().tolerance(Precision.FP32), has_data=False)
    assert proving.measure_latency([refused], (), {}, max_total_s=1.0, progress=None) is None
    row = proving.entry(refused, None, 1, 1)
    assert (row.status, row.reason, row.parity, row.latency) == ("failed", refused.fault, None, None)


def receipt_of(*proofs: proving.Proof) -> Receipt:
    rows = tuple(proving.entry(p, None, 1, 1) for p in proofs)
    return Receipt(1, "s", "w", "now", "c", {}, {}, DataEntry(), (), rows, (), {})


def locate(proof: proving.Proof) -> str:
    raise AssertionError(f"{proof.built.id} has no block to look at")


def test_it_is_an_error_where_it_was_all_there_was_of_what_was_promised(refused: proving.Proof) -> None:
    with pytest.raises(NotAsAskedError, match="it does not open") as caught:
        require_as_asked(ExportOptions(), receipt_of(refused), [refused], locate)
    assert caught.value.exit_code == 4


def test_it_is_a_row_where_another_lowering_of_the_same_precision_passed(refused: proving.Proof) -> None:
    other = replace(refused, built=replace(refused.built, id="other"), fault=None, asked_fault=None)
    with pytest.raises(NotAsAskedError):
        require_as_asked(ExportOptions(), receipt_of(refused), [refused], locate)
    receipt = receipt_of(refused, other)
    require_as_asked(ExportOptions(), receipt, [refused, other], locate)
    assert [c.status for c in receipt.candidates] == ["failed", "passed"]


def test_it_is_a_row_where_its_precision_was_not_asked_for(refused: proving.Proof) -> None:
    tried = replace(refused, built=replace(refused.built, precision=Precision.INT8))
    require_as_asked(ExportOptions(), receipt_of(tried), [tried], locate)
    with pytest.raises(NotAsAskedError):
        require_as_asked(ExportOptions(precisions_asked=True), receipt_of(tried), [tried], locate)


@pytest.mark.parametrize(
    ("precision", "arithmetic", "least_db"),
    [
        (Precision.INT8, Precision.FP32, FP32_MIN_SQNR_DB),
        (Precision.AUTO, Precision.FP32, FP32_MIN_SQNR_DB),
        (Precision.INT8, Precision.INT8, INT8_MIN_SQNR_DB),
        (Precision.FP16, Precision.FP32, 25.0),
        (Precision.INT8, Precision.FP16, INT8_MIN_SQNR_DB),
    ],
)
def test_a_site_is_held_to_what_it_computes_in(precision: Precision, arithmetic: Precision, least_db: float) -> None:
    """Attention in FP32 between INT8 layers is no worse than in an FP32 model; what the user asks of the outputs is no
    floor of a site in INT8."""
    built = Built("x", Target.ONNXRUNTIME_CPU, precision, (), library=False, sites=())
    site = SiteCase("attn", b"", {}, np.zeros(1), arithmetic)
    assert proving.site_tolerance(built, site, Tolerance(25.0, None)).min_sqnr_db == least_db
