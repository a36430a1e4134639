"""`attn-deploy tune` and `export --tune`: what is measured stands in the receipt, and the bundle stays whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import attn_deploy
from attn_deploy import bundle as bundles
from attn_deploy.bundle import Bundle, open_bundle
from attn_deploy.ops import FORMS
from attn_deploy.parity import sqnr_db
from attn_deploy.receipt import Receipt, Tuning
from attn_deploy.runtimes import RunNode, native
from attn_deploy.runtimes.onnxruntime_profile import ProfiledSession
from attn_deploy.validation import validate

needs_library = pytest.mark.skipif(not native.status().available, reason=f"native library: {native.status().reason}")

SITES = ("blocks.0/PackedAttentionIndexedBias", "blocks.1/PackedAttentionIndexedBias")
CPU = "onnxruntime-cpu"


@pytest.fixture(scope="module")
def exported(attn_deploy_cli: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two window attentions, tuned at export."""
    out = tmp_path_factory.mktemp("tuned") / "windowed.attn"
    ran = attn_deploy_cli(
        "export", "tiny_models:windowed", "--out", out, "--precision", "fp32", "--threads", "1", "--tune"
    )
    assert ran.code == 0, ran.out + ran.err
    return out


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(exported, tmp_path / "windowed.attn"))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Makes every node of ours in a profile slower by so many microseconds."""

    def plant(slower_us: float) -> None:
        finish = ProfiledSession.finish

        def planted_finish(self: ProfiledSession) -> list[list[RunNode]]:
            return [[_slower(node, slower_us) for node in call] for call in finish(self)]

        monkeypatch.setattr(ProfiledSession, "finish", planted_finish)

    return plant


def _slower(node: RunNode, slower_us: float) -> RunNode:
    if node.op_type not in FORMS:
        return node
    return RunNode(node.name, node.op_type, node.provider, node.inputs, node.outputs, node.time_us + slower_us)


def tunings(receipt: Receipt) -> dict[str, Tuning]:
    return {c.id: c.tuning for c in receipt.candidates if c.tuning is not None}


def contents(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((batch, 3, 16, 16)).astype(np.float32)


# -- at export -------------------------------------------------------------------------------------------------------


@needs_library
def test_the_receipt_shows_the_level_gain_and_times_of_every_site(exported: Path) -> None:
    receipt = open_bundle(exported).receipt()
    ((candidate, tuning),) = tunings(receipt).items()
    assert candidate in {f"{CPU}-fp32{suffix}" for suffix in ("", "-tuned", "-native")}
    rows = {unit: row for row in tuning.units for unit in row.units}
    assert set(SITES) <= rows.keys()
    assert rows[SITES[0]] is rows[SITES[1]], "alike sites are measured together"
    for row in tuning.units:
        assert {"stock", row.level} <= row.times_us.keys()
        assert all(time_us > 0 for time_us in row.times_us.values())
        assert row.gain_ci95[0] <= row.gain <= row.gain_ci95[1]
    assert {"stock", "site"} <= rows[SITES[0]].times_us.keys()
    assert (tuning.threads, tuning.batch) == (1, 1)
    assert tuning.cpu == receipt.host["cpu"]


@needs_library
def test_the_levels_stand_in_the_tables_and_on_the_page(exported: Path, attn_deploy_cli: Any) -> None:
    page = (exported / "report.html").read_text()
    assert "blocks.0-1/PackedAttentionIndexedBias (2)" in page
    assert "Levels of " in page
    found = attn_deploy_cli("inspect", exported)
    assert "measured on" in found.out


def test_a_model_of_which_a_call_takes_no_time_is_tuned_only_when_asked(demo_bundle: Path) -> None:
    assert tunings(open_bundle(demo_bundle).receipt()) == {}


# -- on another host -------------------------------------------------------------------------------------------------


@pytest.fixture
def of_another_host(bundle: Path) -> Path:
    """The bundle as a host that knows no native library made it."""
    opened = open_bundle(bundle)
    receipt = opened.receipt()
    rows = tuple(msgspec.structs.replace(c, tuning=None) for c in receipt.candidates)
    opened.rewrite(msgspec.structs.replace(receipt, candidates=rows, host={"cpu": "another"}), opened.manifest.chosen)
    return bundle


@needs_library
def test_tune_measures_here_and_leaves_a_whole_bundle_of_the_same_model(
    of_another_host: Path, attn_deploy_cli: Any
) -> None:
    before = attn_deploy.load(of_another_host, threads=1)(images())
    ran = attn_deploy_cli("tune", of_another_host, "--seconds", "1", "--threads", "1", "--json")
    assert ran.code == 0, ran.err
    opened = open_bundle(of_another_host)
    opened.check_all()
    receipt, graph = opened.receipt(), opened.manifest.graphs["main"]
    chosen = opened.manifest.chosen[CPU]
    assert receipt.chosen[CPU] == chosen == ran.json["graphs"]["main"]["chosen"]
    assert chosen in graph.variants
    (tuning,) = tunings(receipt).values()
    assert set(SITES) <= {unit for row in tuning.units for unit in row.units}
    assert ran.json["graphs"]["main"]["tuning"] == json.loads(msgspec.json.encode(tuning))
    assert receipt.host == {"cpu": "another"}, "the export's"
    assert [w for w in receipt.warnings if "chosen by tune" in w and tuning.cpu in w]
    rows = {row.id: row for row in receipt.candidates}
    assert rows[chosen].status == "passed"
    assert rows[chosen].parity is not None
    assert rows[chosen].latency is not None
    with attn_deploy.load(of_another_host, threads=1) as session:
        assert session.variant == chosen
        assert sqnr_db(before, session(images())) > 100
    assert validate(of_another_host, threads=1).passed
    assert contents(of_another_host).keys() == {*opened.manifest.files, bundles.MANIFEST}, "no file is left over"


@needs_library
def test_a_slow_level_is_not_kept(bundle: Path, attn_deploy_cli: Any, planted: Callable[[float], None]) -> None:
    planted(1e5)
    ran = attn_deploy_cli("tune", bundle, "--seconds", "1", "--threads", "1", "--json")
    assert ran.code == 0, ran.err
    tuning = ran.json["graphs"]["main"]["tuning"]
    assert {row["level"] for row in tuning["units"]} == {"stock"}
    assert tuning["ratio"] is None
    assert tunings(open_bundle(bundle).receipt()).keys() == {f"{CPU}-fp32"}


# -- what it cannot do -----------------------------------------------------------------------------------------------


@pytest.fixture
def unchanged(demo_bundle: Path, tmp_path: Path) -> Iterator[Path]:
    """A bundle that must be the same byte for byte at the end."""
    path = Path(shutil.copytree(demo_bundle, tmp_path / "demo.attn"))
    before = contents(path)
    yield path
    assert contents(path) == before


def refused(ran: Any, code: int, what: str) -> None:
    assert ran.code == code
    assert what in ran.json["error"]["what"]


def test_a_target_without_levels_is_refused(unchanged: Path, attn_deploy_cli: Any) -> None:
    refused(attn_deploy_cli("tune", unchanged, "--target", "tensorrt", "--json"), 2, "nothing to tune")


def test_without_the_native_library_it_says_how_to_get_one(
    unchanged: Path, attn_deploy_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library_folders", lambda: iter(()))
    ran = attn_deploy_cli("tune", unchanged, "--json")
    refused(ran, 6, "no native library")
    assert "install" in ran.json["error"]["next"]


def test_without_onnx_it_names_what_to_install(
    unchanged: Path, attn_deploy_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attn_deploy.extras.LOWERING_PACKAGES", ("onnx", "no_such_package"))
    if not native.status().available:
        pytest.skip("the library is asked for first")
    ran = attn_deploy_cli("tune", unchanged, "--json")
    refused(ran, 6, "needs onnx")
    assert ran.json["error"]["next"] == "pip install no_such_package"


@needs_library
def test_a_bundle_that_cannot_be_written_is_refused_before_anything_is_measured(
    unchanged: Path, attn_deploy_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write wherever the file system lets it, so the answer is planted."""
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))
    refused(attn_deploy_cli("tune", unchanged, "--json"), 1, "cannot be written")


@needs_library
def test_a_write_that_fails_leaves_the_bundle_as_it_was(
    unchanged: Path, attn_deploy_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Bundle, *rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bundle, "rewrite", full)
    ran = attn_deploy_cli("tune", unchanged, "--seconds", "1", "--threads", "1")
    assert ran.code == 1


def test_a_bundle_for_other_targets_alone_is_refused(bundle: Path, attn_deploy_cli: Any) -> None:
    manifest = json.loads((bundle / bundles.MANIFEST).read_text())
    for variant in manifest["graphs"]["main"]["variants"].values():
        variant["target"] = "tensorrt"
    (bundle / bundles.MANIFEST).write_text(json.dumps(manifest))
    refused(attn_deploy_cli("tune", bundle, "--json"), 2, "no variant to tune")


def test_a_damaged_bundle_is_refused(bundle: Path, attn_deploy_cli: Any) -> None:
    if not native.status().available:
        pytest.skip("the library is asked for first")
    with (bundle / bundles.CANONICAL).open("r+b") as stream:
        stream.write(b"!")
    refused(attn_deploy_cli("tune", bundle, "--json"), 2, "was changed")
