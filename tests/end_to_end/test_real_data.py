"""ViT-Tiny with its trained weights, judged on photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def receipt(data_folder: Path, attn_deploy_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("vit") / "vit.attn"
    ran = attn_deploy_cli(
        "export", f"timm:{MODEL}", "--weights", data_folder / f"{MODEL}.safetensors",
        "--data", data_folder / "imagenet_compatible_500", "--precision", "fp32", "--precision", "int8",
        "--eval-samples", "200", "-o", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return json.loads((out / "receipt.json").read_text())


def candidate(receipt: Any, precision: str) -> Any:
    return next(c for c in receipt["candidates"] if c["precision"] == precision)


def test_fp32_agrees_with_pytorch_on_every_judged_image(receipt: Any) -> None:
    row = candidate(receipt, "fp32")
    assert receipt["data"]["judgement"] == row["accuracy"]["samples"] == 200
    assert row["parity"]["top1_agreement"] == 1.0
    assert row["accuracy"]["value"] == row["accuracy"]["reference"] > 80


def test_int8_agrees_on_97_of_100_images_that_calibration_did_not_see(receipt: Any) -> None:
    row = candidate(receipt, "int8")
    assert row["status"] == "passed"
    assert row["parity"]["top1_agreement"] >= 0.97
    assert row["weighted_dtype_share"]["int8"] >= 0.9


def test_all_twelve_attentions_are_recognized_with_what_runs_them(receipt: Any) -> None:
    modules = [f"blocks.{i}.attn" for i in range(12)]
    assert [(s["module"], s["status"]) for s in receipt["sites"]] == [(m, "recognized") for m in modules]
    for row in receipt["candidates"]:
        assert [s["module"] for s in row["sites"]] == modules
        assert all(s["nodes"] and s["implementation"] and s["provider"] for s in row["sites"])
