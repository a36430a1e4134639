"""A text model from its source to an application: a bundle that takes sequences of every length inside its bounds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_models
import torch

import attn_deploy
from attn_deploy.bundle import open_bundle
from attn_deploy.errors import FeedError
from attn_deploy.parity import sqnr_db

SOURCE = ("text_models:classifier", "--input", "ids=1x12:int64:50")
DYNAMIC = ("--dynamic", "batch", "--dynamic", "sequence")


def feeds(batch: int, length: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(length)
    mask = np.arange(length) < draw.integers(1, length + 1, (batch, 1))
    return {"ids": draw.integers(0, text_models.WORDS, (batch, length)), "mask": mask}


@pytest.fixture(scope="session")
def text_bundle(tmp_path_factory: pytest.TempPathFactory, attn_deploy_cli: Callable[..., Any]) -> Path:
    out = tmp_path_factory.mktemp("text") / "text.attn"
    ran = attn_deploy_cli(
        "export", *SOURCE, *DYNAMIC, "-o", out, "--data", "text_models:sentences", "--calibration-samples", "4",
        "--threads", "1",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return out


def test_the_manifest_names_the_sequence_and_the_model_s_own_bound(text_bundle: Path) -> None:
    graph = json.loads((text_bundle / "manifest.json").read_text())["graphs"]["main"]
    assert [i["shape"] for i in graph["inputs"]] == [["batch", "sequence"]] * 2
    assert {o["name"]: o["shape"] for o in graph["outputs"]} == {
        "scores": ["batch", 3],
        "tokens": ["batch", "sequence", text_models.DIM],
    }
    assert graph["dims"] == {"batch": {"min": 1, "max": None}, "sequence": {"min": 2, "max": text_models.LONGEST}}


def test_the_receipt_tells_the_bound_and_judges_other_lengths(text_bundle: Path) -> None:
    receipt = json.loads((text_bundle / "receipt.json").read_text())
    assert f"the model takes a sequence of 2 to {text_models.LONGEST}: so does the bundle" in receipt["warnings"]
    sites = [(s["operator"], s["status"]) for s in receipt["sites"]]
    assert sites == [("PackedAttentionMask", "recognized")] * 2
    candidates = {c["precision"]: c for c in receipt["candidates"]}
    assert {c["status"] for c in candidates.values()} == {"passed"}
    lengths = [c for c in candidates["fp32"]["parity"]["cases"] if "sequence" in c["name"] and c["judged"]]
    assert {c["name"] for c in lengths} == {"shortest sequence", "shorter sequence", "longer sequence"}
    assert receipt["data"]["judgement"] + receipt["data"]["calibration"] <= 24
    assert candidates["int8"]["accuracy"]["samples"] == receipt["data"]["judgement"] > 0


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (2, 12), (3, 7), (1, text_models.LONGEST)])
def test_an_application_feeds_any_length(batch: int, length: int, text_bundle: Path) -> None:
    given = feeds(batch, length)
    with torch.no_grad():
        expected = text_models.classifier()[0].eval()(**{k: torch.from_numpy(v) for k, v in given.items()})
    variants = open_bundle(text_bundle).manifest.graphs["main"].variants
    kept = next(name for name, variant in variants.items() if variant.precision == "fp32")
    with attn_deploy.load(text_bundle, variant=kept) as session:
        got = session.run(given)
    assert got["tokens"].shape == (batch, length, text_models.DIM)
    for name, value in got.items():
        assert sqnr_db(expected[name].numpy(), value) > 100


@pytest.mark.parametrize(
    ("ids", "mask", "what", "advice"),
    [
        ((1, 1), (1, 1), "'sequence' is out of the bundle's bounds", "pad the sequence"),
        ((1, 41), (1, 41), "'sequence' is out of the bundle's bounds", "shorten the sequence"),
        ((2, 5), (2, 6), "'sequence' differs between inputs", "the same sequence"),
        ((2, 5), (3, 5), "'batch' differs between inputs", "the same batch"),
        ((5,), (5,), "'ids' has the wrong shape", "array\\[None\\]"),
    ],
)
def test_a_wrong_length_is_told_before_anything_runs(
    ids: tuple[int, ...], mask: tuple[int, ...], what: str, advice: str, text_bundle: Path
) -> None:
    with attn_deploy.load(text_bundle) as session, pytest.raises(FeedError, match=what) as caught:
        session.run({"ids": np.zeros(ids, np.int64), "mask": np.ones(mask, bool)})
    assert caught.match(advice)


def test_the_command_line_runs_arrays_of_any_length(
    text_bundle: Path, tmp_path: Path, attn_deploy_cli: Callable[..., Any]
) -> None:
    np.savez(tmp_path / "good.npz", **feeds(2, 9))  # type: ignore[arg-type]
    np.savez(tmp_path / "long.npz", **feeds(2, 41))  # type: ignore[arg-type]
    ran = attn_deploy_cli("run", text_bundle, tmp_path / "good.npz", "--json")
    assert ran.code == 0, ran.out
    assert {o["name"]: o["shape"] for o in ran.json[0]["outputs"]} == {"scores": [2, 3], "tokens": [2, 9, 16]}
    ran = attn_deploy_cli("run", text_bundle, tmp_path / "long.npz")
    assert ran.code == 2
    assert "2 to 40" in ran.err


@pytest.mark.parametrize("reference", [(), ("--reference", "text_models:classifier")], ids=["itself", "the source"])
def test_validation_tries_other_lengths(
    reference: tuple[str, ...], text_bundle: Path, attn_deploy_cli: Callable[..., Any]
) -> None:
    ran = attn_deploy_cli("validate", text_bundle, *reference, "--threads", "1", "--json")
    assert ran.code == 0, ran.out
    cases = {c["name"] for candidate in ran.json["candidates"] for c in candidate["parity"]["cases"]}
    assert {"shorter sequence", "longer sequence"} <= cases


def test_a_bundle_is_timed_against_its_source_at_the_example_s_length(
    text_bundle: Path, attn_deploy_cli: Callable[..., Any]
) -> None:
    ran = attn_deploy_cli(
        "bench", text_bundle, "--against", "eager,onnxruntime", "--batch", "1,2", "--seconds", "1", "--json"
    )
    assert ran.code == 0, ran.out
    assert {(row["latency"]["batch"], row["against"] is None) for row in ran.json["rows"]} >= {(1, False), (2, False)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--dynamic", "sequence"], ["no input has a sequence", "export with --dynamic batch"]),
        (
            [*SOURCE, "--dynamic", "sequence=2:64"],
            ["does not take sequences of every length", "expected: 2 to 40", "--dynamic sequence=2:40"],
        ),
        ([*SOURCE, "--dynamic", "sequence=16:32"], ["the example's sequence is out of the asked bounds", "16 to 32"]),
        (
            ["text_models:classifier", "--input", "mask=1x9:bool", "--dynamic", "sequence"],
            ["sequences of several lengths", "ids=1x12:int64, mask=1x9:bool"],
        ),
    ],
    ids=["an image model", "longer than the model's table", "another example", "two lengths"],
)
def test_what_cannot_be_dynamic_says_what_to_do(
    arguments: list[str], said: list[str], tmp_path: Path, attn_deploy_cli: Callable[..., Any]
) -> None:
    ran = attn_deploy_cli("export", *arguments, "-o", tmp_path / "no.attn")
    assert ran.code == 2
    assert all(text in ran.err for text in said), ran.err
    assert not (tmp_path / "no.attn").exists()
