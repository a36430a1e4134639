"""A CNN with gates from its source to a bundle that runs them inside ONNX Runtime's blocked layout."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import attn_deploy
from attn_deploy import graph_export
from attn_deploy.receipt import CandidateEntry
from attn_deploy.runtimes import native, onnxruntime_blocked

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

import native_build

GATED = ("export", "tiny_models:gated", "--weights", "init:0", "--threads", "1", "--precision", "fp32", "--json")
BLOCKED = "onnxruntime-cpu-fp32-blocked"


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This tree's library and an empty device cache; the installed ONNX Runtime counts as tried."""
    if not native_build.can_build():
        pytest.skip("no cmake and c++ to build the native library")
    folder = native_build.library_in(native_build.build("release")).parent
    monkeypatch.setattr(native, "library_folders", lambda: iter([folder]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(onnxruntime_blocked, "TESTED", (onnxruntime.__version__,))


def fastest_is_blocked(candidates: Sequence[CandidateEntry], faster: object) -> dict[str, str]:
    """As if the blocked candidate had won: which one does depends on the machine's mood."""
    return {c.target: c.id for c in candidates if c.id == BLOCKED and c.status == "passed"}


def test_a_blocked_candidate_is_proven_loaded_and_validated(
    attn_deploy_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_export, "choose", fastest_is_blocked)
    bundle = tmp_path / "gated.attn"
    ran = attn_deploy_cli(*GATED, "-o", bundle)
    assert ran.code == 0, ran.err
    rows = {c["id"]: c for c in ran.json["receipt"]["candidates"]}
    row = rows[BLOCKED]
    assert row["status"] == "passed", row["reason"]
    assert row["latency"] is not None
    assert row["weighted_dtype_share"] == {"float32": 1.0}
    assert any(site["implementation"].startswith("native:Blocked") for site in row["sites"]), row["sites"]
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attn_deploy.load(bundle, threads=1) as session:
            assert session.variant == BLOCKED
            inside = session(x)
    assert attn_deploy_cli("validate", bundle, "--json").code == 0
    assert attn_deploy_cli("cache", "clear").code == 0
    with pytest.warns(RuntimeWarning, match="no graph was made for this CPU"), attn_deploy.load(bundle) as session:
        np.testing.assert_allclose(session(x), inside, rtol=1e-4, atol=1e-5)
    assert attn_deploy_cli("validate", bundle, "--json").code == 0, "validate makes the graph again"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attn_deploy.load(bundle).close()


def test_a_version_that_was_not_tried_is_said_in_the_receipt(
    attn_deploy_cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_blocked, "TESTED", ("1.0.0",))
    ran = attn_deploy_cli(*GATED, "-o", tmp_path / "gated.attn")
    assert ran.code == 0, ran.err
    rows = {c["id"]: c for c in ran.json["receipt"]["candidates"]}
    assert rows[BLOCKED]["status"] == "failed"
    assert "is not one of those that were tried: 1.0.0" in rows[BLOCKED]["reason"]
    assert BLOCKED not in ran.json["receipt"]["chosen"].values()
