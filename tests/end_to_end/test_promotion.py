"""A variant that was written without proof is proven by `validate` on a host that can run it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import attn_deploy
from attn_deploy.bundle import open_bundle
from attn_deploy.errors import NotAsAskedError, UnavailableError
from attn_deploy.report import html_page
from attn_deploy.validation import require_passed, validate


@pytest.fixture(scope="module")
def proven(attn_deploy_cli: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In FP32 alone: what `validate` proves without data."""
    out = tmp_path_factory.mktemp("proven") / "demo.attn"
    ran = attn_deploy_cli("export", "--precision", "fp32", "--threads", "1", "-o", out)
    assert ran.code == 0, ran.err
    return out


@pytest.fixture
def unproven(proven: Path, tmp_path: Path) -> Path:
    """The demo as an export with --allow-unproven leaves it on a host that cannot run its target."""
    path = tmp_path / "unproven.attn"
    shutil.copytree(proven, path)
    bundle = open_bundle(path)
    receipt = bundle.receipt()
    rows = tuple(
        msgspec.structs.replace(c, status="not_run", reason="no such device", parity=None, latency=None, sites=())
        for c in receipt.candidates
        if c.id in bundle.manifest.graphs["main"].variants
    )
    bundle.rewrite(msgspec.structs.replace(receipt, candidates=rows, chosen={}), {})
    return path


def test_a_bundle_without_a_proven_variant_does_not_open(unproven: Path) -> None:
    with pytest.raises(UnavailableError):
        attn_deploy.load(unproven)


def test_validate_proves_it_and_the_bundle_says_so_from_there_on(unproven: Path) -> None:
    found = validate(unproven)
    bundle = open_bundle(unproven)
    variants = tuple(bundle.manifest.graphs["main"].variants)
    assert found.passed
    assert found.promoted == variants
    rows = {c.id: c for c in bundle.receipt().candidates}
    assert [rows[v].status for v in variants] == ["passed"] * len(variants)
    assert all(rows[v].parity is not None and rows[v].latency is not None and rows[v].sites for v in variants)
    assert bundle.receipt().chosen == bundle.manifest.chosen == {"onnxruntime-cpu": variants[0]}
    note = f"{', '.join(variants)}: proven after the export by validate"
    assert any(warning.startswith(note) for warning in bundle.receipt().warnings)
    bundle.check_all()
    assert (unproven / "report.html").read_text() == html_page(bundle.receipt())
    with attn_deploy.load(unproven) as session:
        assert session.variant == variants[0]
    assert validate(unproven).promoted == ()


def test_what_another_host_chose_for_its_target_stays(unproven: Path) -> None:
    bundle = open_bundle(unproven)
    there = {"tensorrt": "tensorrt-fp16"}
    bundle.rewrite(msgspec.structs.replace(bundle.receipt(), chosen=there), there)
    validate(unproven)
    chosen = open_bundle(unproven).manifest.chosen
    assert chosen["tensorrt"] == "tensorrt-fp16"
    assert set(chosen) == {"tensorrt", "onnxruntime-cpu"}


def test_a_variant_that_runs_in_another_precision_is_not_as_asked(unproven: Path) -> None:
    manifest = json.loads((unproven / "manifest.json").read_text())
    name, variant = next((n, v) for n, v in manifest["graphs"]["main"]["variants"].items() if v["precision"] == "fp32")
    variant["precision"] = "int8"
    (unproven / "manifest.json").write_text(json.dumps(manifest))
    found = validate(unproven)
    assert found.not_as_asked == (name,)
    assert name not in found.promoted
    with pytest.raises(NotAsAskedError, match=f"{name} does not run here as it should") as caught:
        require_passed(found)
    assert str(caught.value.got).startswith("only 0.0% of the multiply-adds")
    assert caught.value.exit_code == 4
    assert caught.value.validation is found  # type: ignore[attr-defined]
