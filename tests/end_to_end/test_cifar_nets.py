"""CNNs with SE, CBAM and ECA in INT8, judged on labelled images. We trained them: bench/cifar_nets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from cifar_nets import PREPROCESS, images, record_file, weights_file
from cifar_nets.network import ATTENTIONS, build
from cifar_nets.train import judge

TRAINED = all(weights_file(name).is_file() and record_file(name).is_file() for name in ATTENTIONS)
UNTRAINED = pytest.mark.skip(reason="the nets are not trained yet: python -m cifar_nets.train NAME")
pytestmark = [pytest.mark.slow, pytest.mark.real_data if TRAINED else UNTRAINED]

CALIBRATED, JUDGED = 500, 9500


@pytest.fixture(scope="module")
def test_images(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images.unpack(data_folder, "test", tmp_path_factory.mktemp("cifar10"))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_weights_have_the_accuracy_that_is_written_beside_them(name: str, data_folder: Path) -> None:
    pixels, labels = (torch.from_numpy(array) for array in images.read(data_folder, "test"))
    right, count = judge(build(name), pixels, labels)
    assert count == 10_000
    assert right == pytest.approx(
        json.loads(record_file(name).read_text())["test_correct"], abs=5
    )  # another CPU's sums


@pytest.mark.parametrize("name", ATTENTIONS)
def test_int8_loses_three_tenths_of_a_point_at_most(
    name: str, test_images: Path, attn_deploy_cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "net.attn"
    ran = attn_deploy_cli(
        "export", f"cifar_nets.network:{name}", "--preprocess", PREPROCESS, "--data", test_images, "-o", out,
        "--calibration-samples", CALIBRATED, "--eval-samples", JUDGED, "--precision", "fp32", "--precision", "int8",
        "--max-drop", "0.3",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    receipt = json.loads((out / "receipt.json").read_text())
    row = next(c for c in receipt["candidates"] if c["precision"] == "int8" and c["status"] == "passed")
    assert row["accuracy"]["samples"] == JUDGED
    assert row["accuracy"]["reference"] > 85
    assert row["accuracy"]["reference"] - row["accuracy"]["value"] <= 0.3
    assert row["weighted_dtype_share"]["int8"] >= 0.9
