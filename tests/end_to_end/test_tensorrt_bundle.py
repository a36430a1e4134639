"""A bundle for TensorRT, written on a host without it and proven on one that has it: a made TensorRT that computes the
lowered graphs by ONNX Runtime's CPU provider, on the memory of a made GPU (tests/runtimes/tensorrt_stand_in).

What is seen: `validate` builds the engines, keeps them, reads back what they run, compares, measures and promotes, and
an application opens what was promoted. What NVIDIA's builder makes of the graphs is not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import upon_stand_ins
from upon_stand_ins import Host

import attn_deploy
from attn_deploy.bundle import open_bundle
from attn_deploy.errors import UnavailableError
from attn_deploy.parity import Moments

Cli = Callable[..., Any]
pytestmark = upon_stand_ins.needed

OPEN = """
import sys, attn_deploy, numpy
with attn_deploy.load(sys.argv[1]) as session:
    feeds = {"image": numpy.load(sys.argv[2])}
    for _ in range(3):  # kernel by kernel, captured, as a graph
        found, = session.run(feeds).values()
    on_device, = session.run_device(feeds).values()
    assert numpy.array_equal(on_device.numpy(), found)
    numpy.save(sys.argv[3], found)
    print(session.variant)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, attn_deploy_cli: Cli) -> Path:
    out = tmp_path_factory.mktemp("tensorrt") / "demo.attn"
    ran = attn_deploy_cli(
        "export", "demo", "--target", "tensorrt", "--precision", "fp16", "--allow-unproven", "-o", out
    )
    assert ran.code == 0, ran.err
    return out


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with pytest.MonkeyPatch.context() as patch:
        yield Host(patch, tmp_path_factory.mktemp("cache"), tensorrt=True)


@pytest.fixture
def other_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(monkeypatch, tmp_path / "cache", tensorrt=True)


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "demo.attn"))


@pytest.fixture(scope="module")
def validated(exported: Path, host: Host) -> tuple[Path, dict[str, Any]]:
    """The bundle after `validate` on the made host, and what that said."""
    path = Path(shutil.copytree(exported, exported.with_name("validated.attn")))
    ran = host.cli("validate", path, "--json")
    assert ran.returncode == 0, ran.stderr
    assert "building the engine" in ran.stderr
    return path, json.loads(ran.stdout)


def test_validate_builds_reads_back_proves_and_promotes(validated: tuple[Path, dict[str, Any]], host: Host) -> None:
    path, found = validated
    variants = list(open_bundle(path).manifest.graphs["main"].variants)
    assert variants == ["tensorrt-fp16", "tensorrt-fp16-pattern"]
    assert found["promoted"] == [row["id"] for row in found["candidates"]] == variants
    assert host.engines_built == len(variants)
    for row in found["candidates"]:
        assert row["status"] == "passed"
        assert min(case["sqnr_db"] for case in row["parity"]["cases"] if case["judged"]) >= 45
        assert row["weighted_dtype_share"] == {"float16": 1.0}
        assert {site["provider"] for site in row["sites"]} == {"TensorRT"}
        assert row["latency"]["p50_ms"] > 0
        (attention,) = (s for s in row["sites"] if s["module"] == "transformer.attention")
        assert attention["implementation"] == ("inlined" if row["id"].endswith("pattern") else "trt:gemm_mha_v2")


def test_the_bundle_says_so_from_there_on(validated: tuple[Path, dict[str, Any]]) -> None:
    bundle = open_bundle(validated[0])
    bundle.check_all()
    receipt = bundle.receipt()
    assert {row.status for row in receipt.candidates} == {"passed"}
    assert bundle.manifest.chosen == receipt.chosen
    assert receipt.chosen.keys() == {"tensorrt"}
    assert str(receipt.host["gpu_name"]).startswith("stand-in")
    assert any("proven after the export by validate" in warning for warning in receipt.warnings)
    assert "not run" not in (bundle.root / "report.html").read_text()


def test_an_application_opens_what_was_promoted_with_the_engine_of_the_cache(
    validated: tuple[Path, dict[str, Any]], host: Host, tmp_path: Path
) -> None:
    path, _ = validated
    built = host.engines_built
    image = np.random.default_rng(7).normal(size=(5, 1, 16, 16)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    ran = host.run(OPEN, path, tmp_path / "image.npy", tmp_path / "scores.npy")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == list(open_bundle(path).manifest.chosen.values())
    assert host.engines_built == built
    portable = onnxruntime.InferenceSession(path / "portable.onnx", providers=["CPUExecutionProvider"])
    moments = Moments()
    moments.add(portable.run(None, {"image": image})[0], np.load(tmp_path / "scores.npy"))
    assert moments.fidelity().sqnr_db >= 45


def test_a_second_validate_builds_nothing_and_promotes_nothing(
    validated: tuple[Path, dict[str, Any]], host: Host
) -> None:
    built = host.engines_built
    ran = host.cli("validate", validated[0], "--json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["promoted"] == []
    assert "building the engine" not in ran.stderr
    assert host.engines_built == built


def test_bench_without_copies_measures_by_the_devices_events_too(
    validated: tuple[Path, dict[str, Any]], host: Host
) -> None:
    ran = host.cli(
        "bench", validated[0], "--target", "tensorrt", "--against", "none", "--no-copies", "--seconds", "1", "--json"
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    (row,) = found["rows"]
    assert 0 < row["device"]["p50_ms"] <= row["latency"]["p50_ms"]
    assert found["host"]["gpu_name"].startswith("stand-in")


# -- what must not be promoted ----------------------------------------------------------------------------------------


def unchanged(bundle: Path, exported: Path) -> bool:
    return all(
        (bundle / name).read_bytes() == (exported / name).read_bytes() for name in ("receipt.json", "report.html")
    )


def test_an_engine_in_fp32_where_fp16_was_asked_is_not_what_was_asked(
    bundle: Path, exported: Path, other_host: Host
) -> None:
    ran = other_host.cli("validate", bundle, "--json", widens=True)
    assert ran.returncode == 4, ran.stderr
    error = json.loads(ran.stdout)["error"]
    assert "tensorrt-fp16 does not run here as it should" in error["what"]
    assert error["got"].startswith("only 0.0% of the multiply-adds")
    assert error["expected"] == "FP16 on TensorRT"
    assert unchanged(bundle, exported)
    assert open_bundle(bundle).manifest.chosen == {}


def test_an_engine_that_cannot_be_built_gives_its_reason(bundle: Path, exported: Path, other_host: Host) -> None:
    ran = other_host.cli("validate", bundle, "--json", fails_to_build="INVALID_ARGUMENT")
    assert ran.returncode == 4, ran.stderr
    error = json.loads(ran.stdout)["error"]
    assert error["got"].startswith("it does not open: TensorRT cannot build the engine")
    assert "a reason" in error["got"]
    assert unchanged(bundle, exported)


def test_a_damaged_weight_fails_parity(bundle: Path, exported: Path, other_host: Host) -> None:
    for variant in open_bundle(bundle).manifest.graphs["main"].variants.values():
        damage(bundle, variant.files[0])
    ran = other_host.cli("validate", bundle, "--json")
    assert ran.returncode == 3, ran.stderr
    error = json.loads(ran.stdout)["error"]
    assert "tensorrt-fp16 is not the same model as" in error["what"]
    assert "dB" in error["got"]
    assert other_host.engines_built == 2
    assert unchanged(bundle, exported)
    with pytest.raises(UnavailableError):
        attn_deploy.load(bundle)


def damage(bundle: Path, name: str) -> None:
    """The largest weight of the last layer turns its sign; the manifest agrees with the file."""
    model = onnx.load(bundle / name)
    layer = next(node for node in model.graph.node if node.op_type == "Gemm")
    weight = next(i for i in model.graph.initializer if i.name == layer.input[1])
    values = onnx.numpy_helper.to_array(weight).copy()
    largest = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[largest] = -values[largest]
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    content = model.SerializeToString()
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
