"""Precision plans on the command line: written beside each INT8 variant, given back by --plan, searched by auto."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attn_deploy
from attn_deploy import bundle as bundles
from attn_deploy import searching
from attn_deploy.bundle import open_bundle
from attn_deploy.parity import sqnr_db
from attn_deploy.plan_file import encode_plan, read_plan
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.runtimes import RunNode, native
from attn_deploy.runtimes.onnxruntime_profile import ProfiledSession
from attn_deploy.validation import validate

needs_library = pytest.mark.skipif(not native.status().available, reason=f"native library: {native.status().reason}")

Cli = Callable[..., Any]
CPU = "onnxruntime-cpu"
MODEL = ("tiny_models:windowed", "--threads", "1", "--no-tune", "--calibration-samples", "8")
QUICK = (*MODEL, "--min-sqnr", "10")


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((batch, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def int8_bundle(attn_deploy_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "windowed.attn"
    ran = attn_deploy_cli("export", *QUICK, "--precision", "int8", "--out", out)
    assert ran.code == 0, ran.out + ran.err
    return out


@pytest.fixture(scope="module")
def auto_bundle(int8_bundle: Path, attn_deploy_cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same plan as `auto`, and no other variant."""
    out = tmp_path_factory.mktemp("auto") / "windowed.attn"
    name, _ = plan_of(int8_bundle)
    ran = attn_deploy_cli("export", *QUICK, "--precision", "auto", "--plan", int8_bundle / name, "--out", out)
    assert ran.code == 0, ran.out + ran.err
    return out


@pytest.fixture
def faster_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product in floating point takes a millisecond more in a profile, and of plans the fastest by that counts as
    the fastest measured: of so small a model the times are noise."""
    finish = ProfiledSession.finish

    def planted(self: ProfiledSession) -> list[list[RunNode]]:
        return [[_slower(node) for node in call] for call in finish(self)]

    monkeypatch.setattr(ProfiledSession, "finish", planted)
    monkeypatch.setattr(searching, "fastest", lambda holding, measured_ms: holding[0])


FLOAT_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Linear", "NormLinear", "AttentionBlock")


def _slower(node: RunNode) -> RunNode:
    more_us = 1000.0 if node.op_type.startswith(FLOAT_PRODUCTS) and "Integer" not in node.op_type else 0.0
    return RunNode(node.name, node.op_type, node.provider, node.inputs, node.outputs, node.time_us + more_us)


def plan_of(path: Path) -> tuple[str, PrecisionPlan]:
    """(its name in the bundle, the plan) of the only variant with one."""
    ((name,),) = ([v.plan for v in g.variants.values() if v.plan] for g in open_bundle(path).manifest.graphs.values())
    assert name is not None
    return name, read_plan(path / name)


# -- the plan beside the variant -------------------------------------------------------------------------------------


def test_the_plan_of_an_int8_variant_lies_beside_it_and_is_hashed(int8_bundle: Path, tmp_path: Path) -> None:
    name, plan = plan_of(int8_bundle)
    assert name in open_bundle(int8_bundle).manifest.files
    assert {p.scheme for p in plan.layers} >= {Scheme.PER_TOKEN, Scheme.FLOAT}
    damaged = Path(shutil.copytree(int8_bundle, tmp_path / "damaged.attn"))
    (damaged / name).write_bytes((damaged / name).read_bytes().replace(b"float", b"flaot"))
    with pytest.raises(attn_deploy.errors.BundleError, match="was changed"):
        validate(damaged, threads=1)


def test_the_receipt_counts_layers_by_scheme_and_inspect_lists_them(int8_bundle: Path, attn_deploy_cli: Cli) -> None:
    _, plan = plan_of(int8_bundle)
    row = next(c for c in open_bundle(int8_bundle).receipt().candidates if c.schemes)
    assert row.schemes == plan.counts
    assert set(row.exempt) >= set(plan.exempt)
    found = attn_deploy_cli("inspect", int8_bundle, "--json").json
    (listed,) = [v["plan"] for v in found["variants"] if v["plan"]]
    assert {p["layer"]: p["scheme"] for p in listed["layers"]} == {p.layer: p.scheme.value for p in plan.layers}
    shown = attn_deploy_cli("inspect", int8_bundle).out
    assert "int8-per-token" in shown
    assert "the head: its error goes straight to the output" in " ".join(shown.split())


# -- a plan that is given --------------------------------------------------------------------------------------------


def test_an_edited_plan_is_followed_and_needs_no_share(int8_bundle: Path, attn_deploy_cli: Cli, tmp_path: Path) -> None:
    """The first block back in floating point, by its module; alone --plan means fp32,auto."""
    _, plan = plan_of(int8_bundle)
    edited = PrecisionPlan(tuple(p for p in plan.layers if not p.layer.startswith("blocks.0.")))
    (tmp_path / "plan.json").write_bytes(encode_plan(edited))
    out = tmp_path / "edited.attn"
    ran = attn_deploy_cli("export", *QUICK, "--plan", tmp_path / "plan.json", "--out", out, "--json")
    assert ran.code == 0, ran.out
    rows = {c["id"]: c for c in ran.json["receipt"]["candidates"]}
    auto = rows[f"{CPU}-auto"]
    assert auto["status"] == "passed"
    assert auto["search"] is None
    assert any(name.startswith("blocks.0.qkv") and "names it nowhere" in name for name in auto["exempt"])
    assert 0.0 < auto["weighted_dtype_share"]["int8"] < 0.9
    assert any(c.startswith(f"{CPU}-fp32") for c in rows)


def test_int8_keeps_its_promise_of_a_share_whatever_the_plan_says(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"layers": [{"layer": "blocks.0", "scheme": "int8-per-token"}]}')
    given = ("--plan", tmp_path / "plan.json", "--out", tmp_path / "x.attn")
    ran = attn_deploy_cli("export", *QUICK, "--precision", "int8", *given)
    assert ran.code == 4, ran.err
    told = " ".join(ran.err.split())
    assert "of the multiply-adds of linear layers and convolutions are in INT8" in told
    assert "--precision auto" in told
    assert not (tmp_path / "x.attn").exists()


BAD_PLANS: dict[str, tuple[str, list[str]]] = {
    "a module that is not there": (
        '{"layers": [{"layer": "block.0", "scheme": "float"}]}',
        ["the plan names no layer of the model", "got: block.0", "did you mean blocks.0"],
    ),
    "a node that is not there": (
        '{"layers": [{"layer": "blocks.0.qkv/Gemm", "scheme": "float"}]}',
        ["the plan names no layer of the model", "did you mean blocks.0.qkv/MatMul"],
    ),
    "an unknown scheme": (
        '{"layers": [{"layer": "blocks.0", "scheme": "int8"}]}',
        ["the plan has an unknown scheme", "blocks.0", "got: int8", "int8-"],
    ),
    "an unknown field": ('{"layers": [], "layer": []}', ["unknown field `layer`", "plan.json"]),
    "a file that is cut off": ('{"layers": [{"layer"', ["the plan is not understood", "plan.json"]),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_bad_plan_is_a_usage_error_and_writes_nothing(case: str, attn_deploy_cli: Cli, tmp_path: Path) -> None:
    content, parts = BAD_PLANS[case]
    (tmp_path / "plan.json").write_text(content)
    ran = attn_deploy_cli("export", *QUICK, "--plan", tmp_path / "plan.json", "--out", tmp_path / "x.attn")
    assert ran.code == 2, ran.err
    told = " ".join(ran.err.split())
    for part in parts:
        assert part in told
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_file_that_is_not_there_is_a_usage_error(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    ran = attn_deploy_cli("export", *QUICK, "--plan", tmp_path / "gone.json", "--out", tmp_path / "x.attn")
    assert ran.code == 2
    assert "the plan cannot be read" in ran.err


def test_a_plan_without_a_precision_that_follows_it_is_a_usage_error(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"layers": []}')
    given = ("--plan", tmp_path / "plan.json", "--precision", "fp32", "--out", tmp_path / "x.attn")
    ran = attn_deploy_cli("export", *QUICK, *given)
    assert ran.code == 2
    assert "a plan is for a quantized precision" in ran.err


# -- a plan that is searched -----------------------------------------------------------------------------------------


def searched(receipt: dict[str, Any]) -> dict[str, Any]:
    (found,) = [c["search"] for c in receipt["candidates"] if c["search"] is not None]
    return dict(found)


@pytest.mark.usefixtures("faster_in_int8")
def test_auto_finds_a_plan_under_the_budget_and_shows_its_frontier(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "auto.attn"
    ran = attn_deploy_cli("export", *QUICK, "--precision", "auto", "--out", out, "--json")
    assert ran.code == 0, ran.out + ran.err
    found = searched(ran.json["receipt"])
    assert found["met"]
    assert found["budget"] == "10 dB or more"
    assert [p["quantized"] for p in found["parts"] if "blocks" in p["name"]]
    assert all(p["gain_us"] > 0 for p in found["parts"] if p["name"].startswith("blocks."))
    (chosen,) = [p for p in found["frontier"] if p["chosen"]]
    assert chosen["fault"] is None
    assert chosen["sqnr_db"] >= 10.0
    layers = [p["layers"] for p in found["frontier"]]
    assert layers[-1] == 0, "the frontier ends where nothing is quantized"
    assert all(p["measured_ms"] > 0 for p in found["frontier"])
    (row,) = ran.json["receipt"]["candidates"]
    assert row["parity"]["sqnr_db"] == pytest.approx(chosen["sqnr_db"], abs=6.0)
    _, plan = plan_of(out)
    assert len(plan.quantized) == chosen["layers"]
    assert any(p.reason.startswith("searched: ") for p in plan.layers)
    page = (out / "report.html").read_text()
    assert "Signal to noise against time of the plans that were tried" in page


@pytest.mark.usefixtures("faster_in_int8")
def test_a_budget_that_no_plan_meets_tells_the_nearest_and_writes_nothing(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    asked = ("export", *MODEL, "--min-sqnr", "90", "--precision", "auto", "--out", tmp_path / "x.attn", "--json")
    ran = attn_deploy_cli(*asked)
    assert ran.code == 3, ran.out
    error = ran.json["error"]
    assert error["what"] == "no plan with a layer in INT8 keeps the budget"
    assert "the nearest has " in error["got"]
    assert "90 dB or more" in error["expected"]
    assert "--keep-best" in error["next"]
    found = searched(ran.json["receipt"])
    assert not found["met"]
    (nearest,) = [p for p in found["frontier"] if p["chosen"]]
    assert nearest["layers"] > 0
    assert nearest["sqnr_db"] == max(p["sqnr_db"] for p in found["frontier"] if p["layers"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("faster_in_int8")
def test_the_nearest_plan_is_kept_where_that_was_asked(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "x.attn"
    ran = attn_deploy_cli(
        "export", *MODEL, "--min-sqnr", "90", "--precision", "auto", "--keep-best", "--out", out, "--json"
    )
    assert ran.code == 0, ran.out
    assert not searched(ran.json["receipt"])["met"]
    _, plan = plan_of(out)
    assert plan.quantized


def test_agreement_is_not_searched_without_data(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    ran = attn_deploy_cli(
        "export", *MODEL, "--precision", "auto", "--min-agreement", "0.9", "--out", tmp_path / "x.attn"
    )
    assert ran.code == 2
    assert "add --data" in ran.err


# -- on another host -------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("made", ["int8_bundle", "auto_bundle"])
def test_tune_lowers_the_plan_again_and_the_plan_survives(
    made: str, attn_deploy_cli: Cli, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Without data, from what lies in the bundle."""
    bundle = Path(shutil.copytree(request.getfixturevalue(made), tmp_path / "here.attn"))
    _, plan = plan_of(bundle)
    with attn_deploy.load(bundle, threads=1) as session:
        before = session(images())
    ran = attn_deploy_cli("tune", bundle, "--seconds", "1", "--threads", "1", "--json")
    assert ran.code == 0, ran.out + ran.err
    name, after = plan_of(bundle)
    assert after == plan
    opened = open_bundle(bundle)
    rows = {row.id: row for row in opened.receipt().candidates}
    int8 = next(v for v, variant in opened.manifest.graphs["main"].variants.items() if variant.plan == name)
    assert rows[int8].status == "passed"
    assert rows[int8].latency is not None
    assert rows[int8].schemes == plan.counts
    assert {r for r in rows if r.startswith(f"{CPU}-fp32")}, "measured beside FP32"
    assert ran.json["graphs"]["main"]["chosen"] in rows
    with attn_deploy.load(bundle, threads=1) as session:
        assert sqnr_db(before, session(images())) > 20
    assert validate(bundle, threads=1).passed
    held = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert held == {*opened.manifest.files, bundles.MANIFEST}, "no file is left over"
