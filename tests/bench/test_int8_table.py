"""The INT8 table: which goals count as met, what a missing peer looks like, and what a stopped run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model_runs
import pytest
from int8_cases import CASES
from int8_table import FP32, OURS, PEERS, markdown
from model_runs import Results

OPENVINO, ONNXRUNTIME = PEERS


def case(**ours: float) -> dict[str, Any]:
    """vit_tiny at 10 ms; FP32 takes 2.5 times as long and OpenVINO's INT8 1.5 times."""
    fidelity = {"sqnr_db": 29.0, "agreement": 0.985, "drop": 0.5, **ours}
    others = {FP32: 2.5, OPENVINO: 1.5}
    systems = {name: {"p50_ms": 10 * ratio, "ratio": ratio, "ratio_ci95": [ratio - 0.1, ratio + 0.1], "sqnr_db": 17.6}
               for name, ratio in others.items()}  # fmt: skip
    return {
        "state": "s", "taken": "2026-01-01T00:00:00Z", "flops": 4e9, "ceiling_gops": [1000.0, None],
        "systems": {OURS: {"p50_ms": 10.0, **fidelity}, **systems}, "absent": {ONNXRUNTIME: "it fails on this model"},
        "variants": {OURS: "int8-tuned", FP32: "fp32"}, "weights": "trained", "samples": "photographs", "judged": 200,
        "calibrated": 300,
    }  # fmt: skip


def page(**ours: float) -> str:
    host = {"cpu": "a CPU", "logical_cores": 2}
    return markdown(
        {"command": "python bench/int8_models.py", "threads": 2, "host": host, "versions": {},
         "instruction_set": "avx512_vnni", "models": {"vit_tiny_patch16_224": {"batch1": case(**ours)}}}
    )  # fmt: skip


def test_a_goal_that_is_met_is_bold_and_one_that_is_missed_is_not() -> None:
    text = page()
    assert "**29.0** (28.0) dB, agreement **98.5** (98.0) %, top-1 drop **0.50** (0.50)" in text
    assert "| **2.50** (2.20), 2.40–2.60 | 1.50 (1.75), 1.40–1.60 | 1.50 (2.20) |" in text


@pytest.mark.parametrize(
    ("missed", "shown"),
    [
        ({"sqnr_db": 27.9}, "| 27.9 (28.0) dB"),
        ({"agreement": 0.975}, " 97.5 (98.0) %"),
        ({"drop": 1.0}, " 1.00 (0.50)"),
    ],
)
def test_fidelity_that_misses_its_goal_is_not_bold(missed: dict[str, float], shown: str) -> None:
    assert shown in page(**missed)


def test_the_share_is_of_the_ceiling_that_was_measured() -> None:
    assert "40% of 1000 GOP/s" in page()  # 4 GFLOP in 10 ms


def test_a_peer_that_could_not_be_had_is_a_dash_with_its_reason() -> None:
    assert f"–: not measured (vit_tiny_patch16_224, {ONNXRUNTIME}: it fails on this model)." in page()


def test_a_stopped_run_goes_on_with_what_its_state_has_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runs, "RESULTS", tmp_path)

    def opened() -> Results:
        return Results("int8_models", "INT8.md", "python bench/int8_models.py", tuple(CASES), 2, markdown)

    first = opened()
    assert first.due("vit_tiny_patch16_224", ["batch1"], "s") == ["batch1"]
    first.add("vit_tiny_patch16_224", {"batch1": case()})
    assert opened().due("vit_tiny_patch16_224", ["batch1"], "s") == []
    assert opened().due("vit_tiny_patch16_224", ["batch1"], "another state") == ["batch1"]
    assert (tmp_path / "INT8.md").read_text() == opened().text()
