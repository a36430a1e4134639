"""Several resolutions in one bundle: a graph for each, from the command line to an application."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
import torch
from msgspec.structs import replace
from PIL import Image

import attn_deploy
from attn_deploy import graph_export, runtimes
from attn_deploy.bundle import open_bundle, write_manifest
from attn_deploy.errors import FeedError, UsageError
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.measuring import Measured
from attn_deploy.parity import sqnr_db
from attn_deploy.receipt import merged
from attn_deploy.runtimes import native

Cli = Callable[..., Any]
WINDOWED = ("tiny_models:windowed", "--precision", "fp32", "--threads", "1")
GRAPHS = ("16x16", "24x32")
BOTH = ("--input", "x=1x3x16x16", "--input", "x=1x3x24x32")
SIZES = {"16x16": (16, 16), "24x32": (24, 32)}


@pytest.fixture(scope="module", autouse=True)
def without_kernels(demo_bundle: Path) -> Iterator[None]:
    """One candidate for each graph, wherever the tests run; the demo, which all tests share, is made before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library_folders", lambda: iter(()))
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, attn_deploy_cli: Cli) -> Any:
    """`attn-deploy export` of two resolutions, with --json."""
    folder = tmp_path_factory.mktemp("windowed")
    config = {"input": "x", "crop": [16, 16], "resize": 18, "mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "preprocess.json").write_text(json.dumps(config))
    ran = attn_deploy_cli(
        "export", *WINDOWED, *BOTH, "--preprocess", folder / "preprocess.json", "-o", folder / "x.attn", "--json"
    )
    assert ran.code == 0, ran.out + ran.err
    assert all(f"{graph}: {stage}" in ran.err for graph in GRAPHS for stage in ("capture", "parity", "latency"))
    return ran.json


@pytest.fixture(scope="module")
def bundle(exported: Any) -> Path:
    return Path(exported["bundle"])


def images(graph: str, batch: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(batch).standard_normal((batch, 3, *SIZES[graph])).astype(np.float32)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        return tiny_models.windowed()[0].eval()(torch.from_numpy(x)).numpy()


# -- what is written -------------------------------------------------------------------------------------------------


def test_the_manifest_has_a_graph_for_each_resolution_with_its_files_and_choice(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert list(manifest["graphs"]) == list(GRAPHS)
    for name, graph in manifest["graphs"].items():
        assert graph["inputs"][0]["shape"] == ["batch", 3, *SIZES[name]]
        assert graph["preprocess"]["crop"] == list(SIZES[name])
        (variant,) = graph["variants"].values()
        assert variant["files"] == [f"{name}/variants/onnxruntime-cpu-fp32.onnx"]
        assert graph["chosen"] == {"onnxruntime-cpu": "onnxruntime-cpu-fp32"}
    assert manifest["preprocess"] == manifest["graphs"]["16x16"]["preprocess"]
    assert manifest["graphs"]["24x32"]["preprocess"]["resize"] == 27
    models = {f"{name}/{file}.onnx" for name in GRAPHS for file in ("canonical", "portable")}
    assert models <= manifest["files"].keys()
    assert {p.name for p in bundle.iterdir()} >= {"manifest.json", "receipt.json", *GRAPHS}
    assert not (bundle / "canonical.onnx").exists()


def test_the_receipt_tells_of_every_site_and_candidate_which_graph_it_is_of(exported: Any, bundle: Path) -> None:
    receipt = exported["receipt"]
    assert receipt == json.loads((bundle / "receipt.json").read_text())
    assert [(s["graph"], s["module"], s["kind"], s["status"]) for s in receipt["sites"]] == [
        (graph, f"blocks.{number}", "window-attention", "recognized") for graph in GRAPHS for number in range(2)
    ]
    assert [(c["graph"], c["id"], c["status"]) for c in receipt["candidates"]] == [
        (graph, "onnxruntime-cpu-fp32", "passed") for graph in GRAPHS
    ]
    assert list(receipt["graphs"]) == list(GRAPHS)
    assert receipt["chosen"] == receipt["graphs"]["16x16"]["chosen"]
    small, large = (receipt["graphs"][graph]["intent"]["flops"] for graph in GRAPHS)
    assert large / small == pytest.approx(24 * 32 / 256, rel=0.01)


def test_one_resolution_is_the_bundle_as_ever(demo_bundle: Path) -> None:
    assert {p.name for p in demo_bundle.iterdir()} == {
        "manifest.json", "receipt.json", "report.html", "canonical.onnx", "portable.onnx", "variants",
    }  # fmt: skip
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert set(manifest["graphs"]) == {"main"}
    assert set(manifest["graphs"]["main"]) == {"inputs", "outputs", "dims", "variants", "examples"}
    receipt = json.loads((demo_bundle / "receipt.json").read_text())
    assert receipt["graphs"] == {}
    assert {row["graph"] for rows in ("sites", "candidates", "peers") for row in receipt[rows]} == {"main"}


# -- an application --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_arrays_run_on_the_graph_of_their_size(graph: str, batch: int, bundle: Path) -> None:
    x = images(graph, batch)
    with attn_deploy.load(bundle, threads=1) as session:
        assert sqnr_db(expected(x), session(x)) > 100
    with attn_deploy.load(bundle, threads=1, graph=graph) as session:
        assert session.graph == graph
        assert sqnr_db(expected(x), session.run({"x": x})["output"]) > 100


def test_threads_that_feed_several_resolutions_open_each_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    open_session = runtimes.open_session

    def counted(*args: Any, **options: Any) -> Any:
        opened.append(options["inputs"][0].shape[2:])
        return open_session(*args, **options)

    monkeypatch.setattr(runtimes, "open_session", counted)
    with attn_deploy.load(bundle, threads=1) as session, ThreadPoolExecutor(4) as pool:
        assert opened == []
        found = list(pool.map(session, [images(graph) for graph in GRAPHS * 5]))
    assert sorted(opened) == sorted(SIZES.values())
    for number, scores in enumerate(found):
        assert sqnr_db(expected(images(GRAPHS[number % 2])), scores) > 100


def test_a_size_that_no_graph_takes_is_told_with_those_that_are_taken(bundle: Path) -> None:
    with attn_deploy.load(bundle) as session, pytest.raises(FeedError, match="no graph of the bundle") as caught:
        session(np.zeros((1, 3, 32, 32), np.float32))
    assert all(f"{graph} (x: float32" in str(caught.value.expected) for graph in GRAPHS)


def test_one_graph_alone_refuses_the_other_s_size(bundle: Path) -> None:
    with attn_deploy.load(bundle, graph="24x32") as session, pytest.raises(FeedError, match="wrong shape"):
        session(images("16x16"))


def test_images_are_prepared_for_the_first_resolution_or_the_named_one(bundle: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    with attn_deploy.load(bundle) as session:
        assert session.prepare(tmp_path / "red.png").shape == (1, 3, 16, 16)
        assert session([tmp_path / "red.png"] * 2).shape == (2, 5)
    with attn_deploy.load(bundle, graph="24x32") as session:
        assert session.prepare(tmp_path / "red.png").shape == (1, 3, 24, 32)
        assert len(session.classify(tmp_path / "red.png", top=2)[0]) == 2


def test_a_graph_or_variant_that_is_not_there_is_told_before_anything_is_opened(bundle: Path) -> None:
    with pytest.raises(UsageError, match="no such graph") as caught:
        attn_deploy.load(bundle, graph="24x24")
    assert str(caught.value.expected) == "16x16, 24x32"
    with pytest.raises(UsageError, match="no such variant"):
        attn_deploy.load(bundle, variant="onnxruntime-cpu-int8")


# -- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [(), ("--reference", "tiny_models:windowed")], ids=["itself", "the source"])
def test_validation_tries_every_graph(reference: tuple[str, ...], bundle: Path, attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli("validate", bundle, *reference, "--threads", "1", "--json")
    assert ran.code == 0, ran.out
    assert [(c["graph"], c["status"]) for c in ran.json["candidates"]] == [(graph, "passed") for graph in GRAPHS]


def test_one_bundle_is_the_reference_of_the_other(bundle: Path, attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli(
        "validate", bundle, "--graph", "24x32", "--reference", bundle, "--localize", "--threads", "1", "--json"
    )
    assert ran.code == 0, ran.out
    assert [(c["graph"], c["parity"]["sqnr_db"]) for c in ran.json["candidates"]] == [("24x32", 200.0)]
    assert ran.json["localized"][0]["reference"].endswith("24x32/portable.onnx")


def test_a_fault_in_one_graph_is_named_with_graph_and_module(
    bundle: Path, tmp_path: Path, attn_deploy_cli: Cli
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "own.attn"))
    file = own / "24x32" / "variants" / "onnxruntime-cpu-fp32.onnx"
    model = ir.load(file)
    scale = next(n for n in model.graph if str(n.name).startswith("blocks.1/") and n.op_type == "Constant"
                 and n.outputs[0].name.endswith("/scale_value"))  # fmt: skip
    scale.attributes["value_float"] = ir.AttrFloat32("value_float", 2 * scale.attributes["value_float"].as_float())
    ir.save(model, file)
    write_manifest(own, open_bundle(bundle).manifest)
    ran = attn_deploy_cli("validate", own, "--localize", "--threads", "1")
    assert ran.code == 3
    assert "the variant 24x32/onnxruntime-cpu-fp32 is not the same model" in ran.err
    assert "module blocks.1" in ran.err
    assert attn_deploy_cli("validate", own, "--graph", "16x16", "--threads", "1").code == 0


def test_a_graph_that_was_not_run_is_promoted_alone(bundle: Path, tmp_path: Path, attn_deploy_cli: Cli) -> None:
    own = open_bundle(shutil.copytree(bundle, tmp_path / "own.attn"))
    parts = own.receipts()
    waiting = tuple(replace(c, status="not_run", reason="no such device") for c in parts["24x32"].candidates)
    parts["24x32"] = replace(parts["24x32"], candidates=waiting, chosen={})
    own.rewrite(merged(parts), parts["16x16"].chosen)
    ran = attn_deploy_cli("validate", own.root, "--threads", "1", "--json")
    assert ran.code == 0, ran.out
    assert ran.json["promoted"] == ["24x32/onnxruntime-cpu-fp32"]
    after = open_bundle(own.root)
    assert after.manifest.chosen_of("24x32") == {"onnxruntime-cpu": "onnxruntime-cpu-fp32"}
    before, now = open_bundle(bundle).receipts(), after.receipts()
    (note,) = set(now["16x16"].warnings) - set(before["16x16"].warnings)
    assert "24x32/onnxruntime-cpu-fp32: proven after the export" in note
    assert replace(now["16x16"], warnings=before["16x16"].warnings) == before["16x16"]
    assert [c.status for c in now["24x32"].candidates] == ["passed"]


def test_inspect_shows_the_sites_of_every_graph_and_of_one(bundle: Path, attn_deploy_cli: Cli) -> None:
    ran = attn_deploy_cli("inspect", bundle, "--json")
    graphs = [ran.json, *ran.json["others"]]
    assert [found["graph"] for found in graphs] == list(GRAPHS)
    assert [found["inputs"][0]["shape"][2:] for found in graphs] == [list(SIZES[graph]) for graph in GRAPHS]
    assert [[v["chosen"] for v in found["variants"]] for found in graphs] == [[True]] * 2
    assert [len(found["sites"]) for found in graphs] == [2, 2]
    shown = attn_deploy_cli("inspect", bundle, "--graph", "24x32").out
    assert "24x32: tiny_models:windowed" in shown
    assert "16x16" not in shown


def test_heatmaps_are_drawn_for_the_first_graph_or_the_named_one(
    bundle: Path, tmp_path: Path, attn_deploy_cli: Cli
) -> None:
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "noise.png")
    for number, arguments in enumerate([(), ("--graph", "24x32")]):
        out = tmp_path / str(number)
        ran = attn_deploy_cli("inspect", bundle, *arguments, "--heatmap", tmp_path / "noise.png", "-o", out, "--json")
        assert ran.code == 0, ran.out
        assert sorted(p.name for p in out.iterdir()) == ["blocks.0.png", "blocks.1.png"]
        assert [len(found["heatmaps"]) for found in (ran.json, *ran.json["others"])] == [2, 0][: 2 - number]


def test_a_bundle_is_timed_graph_by_graph_against_its_source(bundle: Path, attn_deploy_cli: Cli) -> None:
    arguments = ("--seconds", "1", "--threads", "1", "--json")
    ran = attn_deploy_cli("bench", bundle, "--against", "none", *arguments)
    assert ran.code == 0, ran.out
    assert [(row["item"], row["system"]) for row in ran.json["rows"]] == [
        (f"x.attn {graph}", "onnxruntime-cpu-fp32") for graph in GRAPHS
    ]
    ran = attn_deploy_cli("bench", bundle, "--graph", "24x32", "--against", "eager", *arguments)
    assert [(row["item"], row["system"]) for row in ran.json["rows"]] == [
        ("x.attn 24x32", system) for system in ("onnxruntime-cpu-fp32", "eager PyTorch")
    ]


def test_run_takes_arrays_of_every_size_and_images_for_the_named_graph(
    bundle: Path, tmp_path: Path, attn_deploy_cli: Cli
) -> None:
    for graph in GRAPHS:
        np.save(tmp_path / f"{graph}.npy", images(graph))
    Image.new("RGB", (40, 40), (9, 200, 9)).save(tmp_path / "green.png")
    files = [tmp_path / f"{graph}.npy" for graph in GRAPHS]
    ran = attn_deploy_cli("run", bundle, *files, "-o", tmp_path / "out.npz", "--json")
    assert ran.code == 0, ran.out
    with np.load(tmp_path / "out.npz") as saved:
        for number, graph in enumerate(GRAPHS):
            assert sqnr_db(expected(images(graph)), saved[f"{number}/output"]) > 100
    small, large = (
        attn_deploy_cli("run", bundle, tmp_path / "green.png", "--graph", graph, "--json").json[0] for graph in GRAPHS
    )
    assert len(small["predictions"]) == len(large["predictions"]) == 5
    assert small["outputs"] != large["outputs"]


def test_report_shows_every_graph(bundle: Path, tmp_path: Path, attn_deploy_cli: Cli) -> None:
    assert attn_deploy_cli("report", bundle, "-o", tmp_path / "x.html").code == 0
    page = (tmp_path / "x.html").read_text()
    assert all(f"{graph}: Candidates" in page for graph in GRAPHS)


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny_models:windowed", "--input", "x=1x3x16x16", "--input", "x=1x3x16x16"], ["same shape is given twice"]),
        (
            ["tiny_models:two_inputs", "--input", "x=1x6x16", "--input", "x=1x7x16", "--input", "kind=1x6:int64",
             "--input", "kind=1x7:int64", "--input", "kind=1x8:int64"],
            ["not given for the same number of resolutions", "x 2 times, kind 3 times"],
        ),
        (["tiny_models:windowed", "--input", "x=1x3x16x16", "--input", "x=1x3x16"], ["different ranks", "x=1x3x16:"]),
        (
            ["tiny_models:windowed", "--input", "x=1x3x16x16", "--input", "x=1x3x16x20"],
            ["the model does not run on its example", "graph 16x20, module blocks.0", "tiny_models.py"],
        ),
        (
            ["tiny_models:windowed", "--input", "x=1x3x16x16", "--input", "x=2x3x16x16"],
            ["two resolutions differ only in what is dynamic", "x=2x3x16x16"],
        ),
        (
            ["tiny_models:windowed", "--input", "y=1x3x16x16", "--input", "y=1x3x24x24"],
            ["graph 16x16", "the model's forward has no argument 'y'"],
        ),
    ],
    ids=["twice", "2 and 3 times", "ranks", "not divided by the window", "batch alone", "no such input"],
)  # fmt: skip
def test_resolutions_that_cannot_be_are_told_and_nothing_is_written(
    arguments: list[str], said: list[str], tmp_path: Path, attn_deploy_cli: Cli
) -> None:
    ran = attn_deploy_cli("export", *arguments, "--precision", "fp32", "-o", tmp_path / "no.attn")
    assert ran.code == 2
    told = " ".join(ran.err.split())
    assert all(text in told for text in said), ran.err
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_one_size_are_no_data_for_several(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", x=np.ones((40, 3, 16, 16), np.float32))
    ran = attn_deploy_cli("export", *WINDOWED, *BOTH, "--data", tmp_path / "small.npz", "-o", tmp_path / "x.attn")
    assert ran.code == 2
    told = " ".join(ran.err.split())
    assert all(text in told for text in ("graph 24x32", "small.npz", "got: [3, 16, 16]", "a folder of images")), told
    assert not (tmp_path / "x.attn").exists()


def test_one_resolution_that_fails_parity_fails_the_export_and_is_named(
    attn_deploy_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lower = onnxruntime_cpu.lower

    def damaged(canonical: Any, *args: Any, **options: Any) -> Any:
        lowered = lower(canonical, *args, **options)
        if canonical.inputs[0].shape[2:] == SIZES["24x32"]:
            value = lowered.model.graph.initializers["head.bias"]
            value.const_value = ir.tensor(value.const_value.numpy() + np.float32(1), name=value.name)
        return lowered

    def unmeasured(proofs: Any, captured: Any, conditions: Any, progress: Any) -> Measured:
        """The time of the sound graph is no part of this."""
        return Measured((), conditions, {})

    monkeypatch.setattr(onnxruntime_cpu, "lower", damaged)
    monkeypatch.setattr(graph_export, "measure_candidates", unmeasured)
    ran = attn_deploy_cli("export", *WINDOWED, *BOTH, "-o", tmp_path / "x.attn", "--json")
    assert ran.code == 3
    assert ran.json["error"]["where"].startswith("graph 24x32, onnxruntime-cpu-fp32")
    assert [(c["graph"], c["status"]) for c in ran.json["receipt"]["candidates"]] == [("24x32", "failed")]
    assert list(tmp_path.iterdir()) == []


def test_a_source_is_looked_at_and_timed_in_one_resolution(attn_deploy_cli: Cli) -> None:
    for command in ("inspect", "bench"):
        ran = attn_deploy_cli(command, "tiny_models:windowed", *BOTH)
        assert ran.code == 2
        assert "input 'x' is given more than once" in ran.err
    ran = attn_deploy_cli("inspect", "tiny_models:windowed", "--graph", "16x16")
    assert ran.code == 2
    assert "--graph names a graph of a bundle" in ran.err
