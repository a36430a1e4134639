"""Every attention of every model of the table is found by name, and every file is the same model in every engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest
from attention_coverage.expectations import checked_in
from attention_coverage.kinds import Expected, differences
from attention_coverage.measure import Count, OutputParity, Record, SiteDb, measure, measure_apart
from attention_coverage.models import BY_NAME, MODELS
from attention_coverage.table import coverage_md

from attn_deploy.export.recognize.site import Kind

NEVER_SKIPPED = (
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "maxvit_tiny_tf_224", "hf_bert", "hf_llama",
    "seresnet50", "efficientnet_b0",
)  # fmt: skip


def require(record: Record) -> None:
    assert record.error is None, record.error
    assert record.differences == ()
    assert record.unproven == ()
    assert [site for site in record.sites if site.sqnr_db < 60] == []
    assert [output for output in record.outputs if not output.passed] == []
    assert record.passed


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_the_model_is_found_whole_and_exported_with_parity(name: str, tmp_path: Path) -> None:
    require(measure_apart(BY_NAME[name], tmp_path / "record.json", threads=1))


OF_EACH_KIND = (
    "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "mobilevitv2_100", "xcit_nano_12_p16_224",
    "cait_xxs24_224", "skresnet34", "convnextv2_atto", "efficientnet_b0", "hf_llama", "hf_t5_encoder",
    "nn_image_network", "nn_token_network",
)  # fmt: skip
"""In `make test`; the other tiny variants are under `make test-all`."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(model.name, marks=() if model.name in OF_EACH_KIND else pytest.mark.slow)
        for model in MODELS
        if model.tiny is not None
    ],
)
def test_its_tiny_variant_is_found_whole_and_exported_with_parity(name: str) -> None:
    require(measure(BY_NAME[name], tiny=True, threads=1))


@pytest.mark.parametrize("name", NEVER_SKIPPED)
def test_nothing_of_these_models_may_be_skipped(name: str) -> None:
    assert [item for item in checked_in(name) if item.skip is not None] == []


def test_differences_name_module_and_kind() -> None:
    gate, other = Expected(Kind.CHANNEL_GATE, "layer1.se"), Expected(Kind.SPATIAL_GATE, "layer1.se")
    skipped = Expected(Kind.CHANNEL_GATE, "layer1.se", "GATE_SHAPE")
    assert differences(Counter([gate]), Counter([gate])) == ()
    assert differences(Counter([gate, gate]), Counter([gate])) == ("layer1.se: missing: channel-gate",)
    assert differences(Counter([gate]), Counter([other])) == (
        "layer1.se: missing: channel-gate",
        "layer1.se: not expected: spatial-gate",
    )
    assert differences(Counter([gate]), Counter([skipped]))[1] == (
        "layer1.se: not expected: channel-gate, skipped: GATE_SHAPE"
    )


GOOD = Record(
    name="m", source="timm:m", tiny=False, parameters=5_700_000, counts=(Count("self-attention", 2, 2, 0),),
    sites=(SiteDb("a", 130.0), SiteDb("b", 125.0)),
    outputs=(
        OutputParity("portable", "openvino", 111.2, 1e-6, True),
        OutputParity("site", "onnxruntime", 113.2, 1e-6, True, native=True),
        OutputParity("block", "onnxruntime", 108.9, 1e-6, True, native=True),
    ),
    seconds={"capture": 3.0, "recognition": 0.5, "rewriting": 1.0, "onnx": 4.0}, peak_mb=1234,
)  # fmt: skip

FAULTS = {
    "an error": {"error": "capture: CaptureError: no"},
    "a difference": {"differences": ("a: missing: self-attention",)},
    "an unproven site": {"unproven": ("b",)},
    "a site that is not close": {"sites": (SiteDb("a", 59.0),)},
    "an output that is not close": {"outputs": (OutputParity("portable", "openvino", 40.0, 0.1, False),)},
    "a kernel that is not close": {"outputs": (OutputParity("site", "onnxruntime", 40.0, 0.1, False, native=True),)},
    "no output at all": {"outputs": ()},
}


def test_a_row_shows_counts_worst_figures_and_stages() -> None:
    (row,) = [line for line in coverage_md([GOOD]).splitlines() if line.startswith("| `timm:m`")]
    assert row == (
        "| `timm:m` | 5.7 M | 2 self-attention |  | 125 dB | 111 dB | 109 dB (2) |  | 3.0 + 1.5 + 4.0 | 1.2 GB |"
    )
    assert "1 of 1 models pass." in coverage_md([GOOD])


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_wrong_with_a_model_fails_it(fault: str) -> None:
    record = msgspec.structs.replace(GOOD, **FAULTS[fault])
    assert GOOD.passed
    assert not record.passed
    assert "0 of 1 models pass." in coverage_md([record])
