"""The receipt is measured: what is wrong with a candidate shows in it, or the export fails and writes nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy import proving, runtimes
from attn_deploy.built import Built
from attn_deploy.choice import Budget
from attn_deploy.export.canonical import CanonicalModel, save_model
from attn_deploy.export.capture import capture
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import SourceRequest, load_source
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.parity import parity_cases
from attn_deploy.proving import Proof
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision, Target

GATED = ("export", "tiny_models:gated", "--weights", "init:0", "--threads", "1")


class Slowed:
    """A session whose every call takes 50 ms more."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs, self.outputs = session.inputs, session.outputs
        self.close = session.close

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(0.05)
        return self._session.run(feeds)


def test_a_session_slowed_by_50_ms_shows_it_in_the_receipt(
    attn_deploy_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def p50_ms(name: str) -> float:
        ran = attn_deploy_cli(*GATED, "--precision", "fp32", "-o", tmp_path / name, "--json")
        rows = {c["id"]: c for c in ran.json["receipt"]["candidates"]}
        return rows["onnxruntime-cpu-fp32"]["latency"]["p50_ms"]

    open_candidate = proving.open_candidate
    plain = p50_ms("plain.attn")
    monkeypatch.setattr(proving, "open_candidate", lambda *args: Slowed(open_candidate(*args)))
    assert 49 < p50_ms("slow.attn") - plain < 70


@pytest.mark.parametrize("kind", ["head.weight", "channels.up.weight"])
def test_a_damaged_weight_fails_parity_and_nothing_is_written(
    kind: str, attn_deploy_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = onnxruntime_cpu.lower

    def damaged(*args: Any, **options: Any) -> Any:
        lowered = lower(*args, **options)
        # A fused linear layer has a weight of its own, named after the layer's node.
        fused = kind.removesuffix(".weight") + "/"
        weights = lowered.model.graph.initializers.items()
        value = next(v for n, v in weights if n == kind or (n.startswith(fused) and n.endswith("weight")))
        array = value.const_value.numpy().copy()
        largest = np.unravel_index(np.abs(array).argmax(), array.shape)
        array[largest] = -array[largest]
        value.const_value = ir.tensor(array, name=value.name)
        return lowered

    monkeypatch.setattr(onnxruntime_cpu, "lower", damaged)
    ran = attn_deploy_cli(*GATED, "--precision", "fp32", "-o", tmp_path / "x.attn", "--json")
    assert ran.code == 3
    assert ran.json["error"]["what"] == "the fp32 candidate is not the same model"
    assert "dB" in ran.json["error"]["got"]
    assert all(c["status"] == "failed" and c["latency"] is None for c in ran.json["receipt"]["candidates"])
    assert list(tmp_path.iterdir()) == []


TINY = {
    "demo": ("demo", None, {}, 6),
    "ViT": ("timm:vit_tiny_patch16_224", "init:0", {"img_size": 32, "depth": 2}, 2),
    "SE and spatial gates": ("tiny_models:gated", "init:0", {}, 2),
    "separate projections": ("tiny_models:scaled_attention", "init:0", {}, 1),
    "two inputs": ("tiny_models:two_inputs", "init:0", {}, 1),
}


def corrupt(model: ir.Model, name: str) -> None:
    """Scores grow by a half, or the gate turns its sign."""
    node = next(n for n in model.graph if n.name == name)
    if "scale" in node.attributes:
        node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.5)
        return
    negated = ir.Node("", "Neg", [node.inputs[1]], name="corruption")
    model.graph.insert_before(node, negated)
    node.replace_input_with(1, negated.outputs[0])


def fault(canonical: CanonicalModel, model: ir.Model, captured: Any, folder: Path) -> str | None:
    """What parity of the whole model against PyTorch says."""
    files = save_model(model, folder / "model.onnx")
    built = Built("fp32", Target.ONNXRUNTIME_CPU, Precision.FP32, files, False, ())
    session = runtimes.open_session(
        built.target, files[0], inputs=canonical.inputs, outputs=canonical.outputs, threads=1
    )
    proof = Proof(built, session)
    cases = parity_cases(captured.inputs, captured.dims)
    references = [captured.reference(case.feeds) for case in cases]
    proving.check_parity(proof, cases, references, Budget().tolerance(Precision.FP32), has_data=False)
    return proof.fault


@pytest.mark.parametrize("kind", TINY)
def test_corrupting_any_site_makes_parity_fail(kind: str, tmp_path: Path) -> None:
    text, weights, arguments, expected = TINY[kind]
    source = load_source(text, SourceRequest("", weights, arguments))
    captured = capture(source, {"batch": DimBounds()})
    canonical = to_onnx(rewrite(captured, recognize(captured)))
    assert len(canonical.sites) == expected
    assert fault(canonical, canonical.model, captured, tmp_path) is None
    for site in canonical.sites:
        damaged = canonical.model.clone()
        corrupt(damaged, site.node)
        assert fault(canonical, damaged, captured, tmp_path) is not None, f"parity does not see {site.node}"
        assert site.proven


@pytest.mark.parametrize(("scale", "status"), [(0.0, "unproven"), (1.0, "recognized")])
def test_a_site_that_does_not_matter_is_unproven(
    scale: float, status: str, attn_deploy_cli: Callable[..., Any]
) -> None:
    ran = attn_deploy_cli("inspect", "tiny_models:scaled_attention", "--source-arg", f"layer_scale={scale}", "--json")
    (site,) = ran.json["sites"]
    assert (site["module"], site["status"]) == ("attention", status)
    assert (site["reason"] is None) == (status == "recognized")


def test_int8_that_is_not_int8_is_an_error_when_it_was_asked_for(
    attn_deploy_cli: Callable[..., Any], tmp_path: Path
) -> None:
    layers = ("stem", "channels", "middle", "pixels", "head")
    arguments = [*GATED, "--precision", "fp32,int8", "-o", tmp_path / "x.attn", "--json"]
    ran = attn_deploy_cli(*arguments, *(part for layer in layers for part in ("--exclude", layer)))
    assert ran.code == 4
    assert ran.json["error"]["what"] == "int8 on onnxruntime-cpu was asked and is not what was built"
    assert ran.json["error"]["got"].startswith("only 0.0%")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_never_varies_proves_nothing_and_is_refused(
    attn_deploy_cli: Callable[..., Any], tmp_path: Path
) -> None:
    ran = attn_deploy_cli("export", "tiny_models:constant", "--precision", "fp32", "-o", tmp_path / "x.attn", "--json")
    assert ran.code == 3
    assert "a reference that varies" in ran.json["error"]["got"]
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_that_failed_has_no_latency_and_is_not_chosen(
    attn_deploy_cli: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "x.attn"
    ran = attn_deploy_cli(*GATED, "--precision", "fp32,int8", "--min-sqnr", "90", "--keep-best", "-o", out, "--json")
    assert ran.code == 0, ran.out
    receipt = json.loads((out / "receipt.json").read_text())
    failed = [c for c in receipt["candidates"] if c["status"] == "failed"]
    assert {c["precision"] for c in failed} == {"int8"}
    assert all(c["latency"] is None and c["accuracy"] is None and c["reason"] for c in failed)
    assert "fp32" in receipt["chosen"]["onnxruntime-cpu"]
