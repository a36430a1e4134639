"""--require-fused holds what was asked against what the session runs; inspect says how much of a model attention is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attn_deploy.receipt import SiteEntry, SiteRun
from attn_deploy.runtimes import native
from attn_deploy.verdict import fusion_fault

Cli = Callable[..., Any]
EXPORT = ("--precision", "fp32", "--threads", "1", "--json")

with_native_gates = pytest.mark.skipif("Gate" not in native.kernel_names(), reason="no native library")


def site(module: str, kind: str = "self-attention", status: str = "recognized") -> SiteEntry:
    operator, reason = ("PackedAttention", None) if status == "recognized" else (None, "the rank")
    return SiteEntry(kind, module, "file.py:1", operator, status, reason, 10, 10)


def run(module: str, implementation: str, *nodes: str) -> SiteRun:
    return SiteRun(module, implementation, "CPUExecutionProvider", nodes)


SITES = (site("a"), site("b"), site("c"))
RUNS = (
    run("a", "native:PackedAttention", "PackedAttention"),
    run("b", "ort:Attention", "Transpose", "Attention"),
    run("c", "inlined", "MatMul", "Softmax", "MatMul"),
)


@pytest.mark.parametrize(("required", "enough"), [(None, True), (1, True), (2, False), ("all", False)])
def test_only_a_single_node_counts_as_one_kernel(required: Any, enough: bool) -> None:
    fault = fusion_fault(required, SITES, RUNS)
    assert (fault is None) == enough
    if fault is not None:
        assert fault.startswith(
            "1 of 3 sites run as one kernel; not so b: PackedAttention ort:Attention (2 nodes); c: "
        )


def test_all_means_skipped_attention_too_and_no_attention_is_not_all() -> None:
    runs = RUNS[:1]
    assert fusion_fault("all", (site("a"), site("z", "softmax", "skipped")), runs) is None
    fault = fusion_fault("all", (site("a"), site("d", status="skipped")), runs)
    assert fault == "1 of 2 sites run as one kernel; not so d: skipped, the rank"
    assert fusion_fault("all", (), ()) is not None


@with_native_gates
def test_only_candidates_with_enough_kernels_are_chosen(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    ran = attn_deploy_cli("export", "demo", *EXPORT, "--require-fused", "3", "-o", tmp_path / "x.attn")
    assert ran.code == 0, ran.out
    receipt = ran.json["receipt"]
    assert receipt["chosen"] == {"onnxruntime-cpu": "onnxruntime-cpu-fp32-native"}
    rows = {c["id"]: c for c in receipt["candidates"]}
    assert sum(s["implementation"].startswith("native:") for s in rows["onnxruntime-cpu-fp32-native"]["sites"]) >= 3
    plain = rows["onnxruntime-cpu-fp32"]
    assert (plain["status"], plain["latency"]) == ("failed", None)
    assert plain["reason"].startswith("1 of ")
    assert "transformer.attention: PackedAttention inlined (" in plain["reason"]


def test_too_few_are_an_error_that_lists_the_others_and_writes_nothing(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    source = ("transformers_in_miniature:plain", "--weights", "init:0")
    ran = attn_deploy_cli("export", *source, *EXPORT, "--require-fused", "3", "-o", tmp_path / "x.attn")
    best = max(
        ran.json["receipt"]["candidates"],
        key=lambda c: sum(s["implementation"].startswith(("native:", "ort:")) for s in c["sites"]),
    )
    if all(s["implementation"].startswith(("native:", "ort:")) for s in best["sites"]):
        assert ran.code == 0  # where there is a kernel for it
        return
    assert ran.code == 4
    error = ran.json["error"]
    assert error["what"] == "fewer attention sites run as one kernel than was asked"
    assert error["expected"] == "--require-fused 3"
    assert "layers.1.attn: PackedAttention inlined (" in error["got"]
    assert all(c["latency"] is None for c in ran.json["receipt"]["candidates"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["none", "0", "-1", "1.5"])
def test_a_number_that_is_none_is_told(text: str, attn_deploy_cli: Cli, tmp_path: Path) -> None:
    ran = attn_deploy_cli("export", "demo", "--require-fused", text, "-o", tmp_path / "x.attn")
    assert ran.code == 2
    assert "--require-fused" in ran.err


def test_source_and_bundle_tell_the_same_intent(attn_deploy_cli: Cli, demo_bundle: Path) -> None:
    source, bundle = (attn_deploy_cli("inspect", item, "--json").json for item in ("demo", demo_bundle))
    assert source["intent"] == bundle["intent"]
    intent = bundle["intent"]
    recognized = [site for site in bundle["sites"] if site["status"] == "recognized"]
    assert sum(kind["recognized"] for kind in intent["kinds"]) == len(recognized) >= 4
    assert 0 < intent["site_flops"] < intent["flops"]
    assert intent["flops_share"] == pytest.approx(intent["site_flops"] / intent["flops"], abs=1e-6)
    assert intent["site_flops"] == sum(site["flops"] for site in bundle["sites"])
    for variant in bundle["variants"]:
        assert sum(variant["implementations"].values()) == len(recognized)
        kernels = [s for s in variant["sites"] if s["implementation"].startswith(("native:", "ort:"))]
        assert variant["one_kernel"] == len(kernels)


def test_terminal_and_page_say_how_much_of_the_model_attention_is(attn_deploy_cli: Cli, demo_bundle: Path) -> None:
    out = attn_deploy_cli("inspect", demo_bundle).out
    variants = attn_deploy_cli("inspect", demo_bundle, "--json").json["variants"]
    page = (demo_bundle / "report.html").read_text()
    for text in (out, page):
        assert "are inside recognized sites" in text
        assert all(f"{v['one_kernel']} of {len(v['sites'])} site" in text for v in variants)
