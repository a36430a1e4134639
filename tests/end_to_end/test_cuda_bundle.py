"""A bundle for CUDA, written on a host without a GPU and opened where the real ONNX Runtime CUDA runs upon stand-ins.

What is read back there is real: which node runs where and in which type. Numbers are not, since no kernel runs: a
variant that computes must fail parity, and must not be promoted. One that only moves data is right, and is promoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import upon_stand_ins
from upon_stand_ins import Host

import attn_deploy
from attn_deploy.bundle import open_bundle
from attn_deploy.errors import UnavailableError

Cli = Callable[..., Any]
CUDA = "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, attn_deploy_cli: Cli) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "demo.attn"
    ran = attn_deploy_cli(
        "export", "demo", "--target", "onnxruntime-cuda", "--precision", "fp16", "--allow-unproven", "--out", out
    )
    assert ran.code == 0, ran.err
    return out


def test_every_variant_is_written_as_not_run_with_the_loss_of_its_blocks(bundle: Path) -> None:
    rows = open_bundle(bundle).receipt().candidates
    variants = open_bundle(bundle).manifest.graphs["main"].variants
    assert [c.id for c in rows] == list(variants)
    assert all((c.status, c.parity, c.latency) == ("not_run", None, None) for c in rows)
    assert all(c.blocks and all(b.kept or b.sqnr_db >= 45 for b in c.blocks) for c in rows)
    assert {v.options["cuda_graph"] for v in variants.values()} == {"1"}


def test_an_application_is_told_to_prove_it_first(bundle: Path) -> None:
    for target in (None, "onnxruntime-cuda"):
        with pytest.raises(UnavailableError, match="not proven yet") as caught:
            attn_deploy.load(bundle, target=target)
        assert "attn-deploy validate" in str(caught.value)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(monkeypatch, tmp_path, tensorrt=False)


@upon_stand_ins.needed
def test_validate_reads_back_what_runs_and_promotes_nothing_that_is_wrong(bundle: Path, host: Host) -> None:
    ran = host.cli("validate", bundle, "--json")
    assert ran.returncode == 3, ran.stderr
    found = json.loads(ran.stdout)["validation"]
    for row in found["candidates"]:
        assert row["status"] == "failed"
        assert row["weighted_dtype_share"] == {"float16": 1.0}
        assert {s["provider"] for s in row["sites"]} == {CUDA}
        (attention,) = (s for s in row["sites"] if s["module"] == "transformer.attention")
        fused = "MultiHeadAttention" if row["id"].endswith("multihead") else "Attention"
        assert attention["implementation"] == f"ort:{fused}"
    assert len(found["candidates"]) == len(open_bundle(bundle).receipt().candidates)
    assert found["promoted"] == []
    assert open_bundle(bundle).manifest.chosen == {}


@upon_stand_ins.needed
def test_what_is_right_there_is_promoted_opened_and_measured(attn_deploy_cli: Cli, host: Host, tmp_path: Path) -> None:
    out = tmp_path / "rearranged.attn"
    ran = attn_deploy_cli(
        "export", "tiny_models:rearranged", "--target", "onnxruntime-cuda", "--precision", "fp32", "--allow-unproven",
        "--out", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    done = host.cli("validate", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["promoted"] == ["onnxruntime-cuda-fp32"]
    assert open_bundle(out).manifest.chosen == {"onnxruntime-cuda": "onnxruntime-cuda-fp32"}
    for copies in ("--no-copies", "--copies"):
        done = host.cli("bench", out, "--against", "none", copies, "--batch", "8", "--seconds", "1", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        (row,) = found["rows"]
        assert (row["system"], row["latency"]["batch"]) == ("onnxruntime-cuda-fp32", 8)
        assert row["latency"]["p50_ms"] > 0
        assert (row["device"] is not None) == (copies == "--no-copies")
        assert row["device"] is None or 0 < row["device"]["p50_ms"] <= row["latency"]["p50_ms"]
        assert found["host"]["gpu_name"].startswith("stand-in")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "tensorrt", "--runtime-option", "cuda_grap=1"), "did you mean cuda_graph?"),
        (("--target", "tensorrt", "--runtime-option", "optimization_level=9"), "a whole number from 0 to 5"),
        (("--target", "onnxruntime-cuda", "--runtime-option", "version_compatible=1"), "version_compatible"),
        (
            ("--target", "onnxruntime-cpu", "--runtime-option", "cuda_graph=1"),
            "options of the CPU's sessions are fixed",
        ),
        (("--target", "tensorrt", "--runtime-option", "cuda_graph"), "NAME=VALUE"),
        (("--target", "tensorrt", "--tensorrt-version", "eleven"), "MAJOR.MINOR"),
        (("--target", "onnxruntime-cuda", "--precision", "int8"), "onnxruntime-cuda has no int8"),
        (("--target", "onnxruntime-cpu", "--precision", "bf16"), "onnxruntime-cpu has no bf16"),
        (("--target", "onnxruntime-cpu", "--precision", "fp8"), "onnxruntime-cpu has no fp8"),
    ],
)
def test_what_a_target_does_not_have_is_said_before_any_work(
    arguments: tuple[str, ...], message: str, attn_deploy_cli: Cli, tmp_path: Path
) -> None:
    ran = attn_deploy_cli("export", "demo", *arguments, "--allow-unproven", "--out", tmp_path / "x.attn")
    assert ran.code == 2
    assert message in ran.err
    assert "capture" not in ran.err
    assert not (tmp_path / "x.attn").exists()


def test_an_option_goes_to_the_targets_that_know_it(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "both.attn"
    ran = attn_deploy_cli(
        "export", "demo", "--target", "onnxruntime-cuda,tensorrt", "--precision", "fp32", "--allow-unproven",
        "--tensorrt-version", "10.3", "--runtime-option", "version_compatible=1", "--runtime-option", "device_id=1",
        "--dynamic", "batch=1:16", "--out", out,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    variants = open_bundle(out).manifest.graphs["main"].variants.values()
    options = {v.target: v.options for v in variants}
    assert options["tensorrt"]["version_compatible"] == "1"
    assert "version_compatible" not in options["onnxruntime-cuda"]
    assert {o["device_id"] for o in options.values()} == {"1"}
    assert options["tensorrt"]["profile:batch"] == "1,1,1;2,16,16"
