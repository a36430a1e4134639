"""Receipt, report and bundle of several graphs: everything says which graph it is of, and old readers see the first."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from attn_deploy.bundle import MANIFEST, RECEIPT, Bundle, encode, open_bundle, write_manifest, writing
from attn_deploy.errors import BundleError
from attn_deploy.manifest import SCHEMA_VERSION, Graph, Manifest, Variant, graph_file
from attn_deploy.preprocess import Preprocess
from attn_deploy.receipt import (
    MAIN,
    CandidateEntry,
    CaseParity,
    DataEntry,
    Intent,
    Latency,
    Parity,
    Peer,
    Receipt,
    SiteEntry,
    merged,
)
from attn_deploy.report.html import render_html
from attn_deploy.report.terminal import receipt_tables
from attn_deploy.session import DimBounds, TensorSpec

FP32, INT8 = "onnxruntime-cpu-fp32", "onnxruntime-cpu-int8"


def of_one(operator: str, p50_ms: float, chosen: str) -> Receipt:
    """The receipt of one graph as its export makes it."""
    latency = Latency(1, 2, 24, p50_ms, p50_ms, p50_ms, p50_ms, (0.9 * p50_ms, 1.1 * p50_ms))
    case = CaseParity("normal", 2, "logits", 1e-5, 1e-6, 0.999999, 120.0, judged=True, passed=True)
    site = SiteEntry("window-attention", "blocks.0.attn", "net.py:7", operator, "recognized", None, 2_000_000, 10)
    rows = tuple(
        CandidateEntry(id, "onnxruntime-cpu", id[-4:], "passed", None, latency=latency,
                       parity=Parity(2, 1e-5, 1e-6, 0.999999, 120.0, None, (case,), ()))
        for id in (FP32, INT8)
    )  # fmt: skip
    return Receipt(
        schema_version=1, source="net:windowed", weights="", created="", command="", host={}, versions={},
        data=DataEntry(), sites=(site,), candidates=rows, chosen={"onnxruntime-cpu": chosen},
        peers=(Peer("eager PyTorch", latency, 1.5, (1.4, 1.6), "faster"),), warnings=("the same", f"of {operator}"),
        intent=Intent(flops=4, flops_share=0.5),
    )  # fmt: skip


SMALL, LARGE = of_one("PackedAttentionIndexed", 3.0, FP32), of_one("PackedAttentionIndexedPadded", 9.0, INT8)
BOTH = merged({"16x16": SMALL, "24x24": LARGE})


def test_the_receipt_of_the_only_graph_is_as_it_was() -> None:
    assert merged({MAIN: SMALL}) is SMALL
    assert SMALL.by_graph() == {MAIN: SMALL}


def test_every_row_of_several_graphs_names_its_graph() -> None:
    for rows in (BOTH.sites, BOTH.candidates, BOTH.peers):
        assert list(dict.fromkeys(row.graph for row in rows)) == ["16x16", "24x24"]
        assert {row.graph for row in rows} == {"16x16", "24x24"}
    assert BOTH.warnings == ("the same", "of PackedAttentionIndexed", "of PackedAttentionIndexedPadded")


def test_a_reader_that_knows_of_one_graph_finds_the_choice_of_the_first() -> None:
    document = json.loads(encode(BOTH))
    row = next(c for c in document["candidates"] if c["id"] == document["chosen"]["onnxruntime-cpu"])
    assert row["latency"]["p50_ms"] == 3.0
    assert {name: graph["chosen"] for name, graph in document["graphs"].items()} == {
        "16x16": {"onnxruntime-cpu": FP32},
        "24x24": {"onnxruntime-cpu": INT8},
    }


def test_each_graph_s_receipt_comes_back_and_merges_to_the_same() -> None:
    read = msgspec.json.decode(encode(BOTH), type=Receipt)
    parts = read.by_graph()
    assert [s.operator for s in parts["24x24"].sites] == ["PackedAttentionIndexedPadded"]
    assert parts["24x24"].chosen == {"onnxruntime-cpu": INT8}
    assert parts["24x24"].intent == LARGE.intent
    assert merged(parts) == BOTH


def test_a_terminal_shows_every_graph_with_its_own_choice() -> None:
    stream = io.StringIO()
    Console(file=stream, width=140).print(receipt_tables(BOTH))
    text = " ".join(stream.getvalue().split())
    assert f"chosen 16x16: {FP32} for onnxruntime-cpu; 24x24: {INT8} for onnxruntime-cpu" in text
    for graph, operator, chosen in (("16x16", "PackedAttentionIndexed ", FP32), ("24x24", "IndexedPadded", INT8)):
        part = text.split(f"{graph}: Attention sites")[1].split(": Attention sites")[0]
        assert operator in part
        assert f"* {chosen}" in part
        assert f"{graph}: Against peers" in part


def test_a_page_shows_every_graph_under_headings_of_its_own() -> None:
    page = render_html(BOTH)
    for title in ("Candidates", "Latency", "Attention sites", "Each candidate"):
        assert [f">{graph}: {title}</h2>" in page for graph in ("16x16", "24x24")] == [True, True]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for label in re.findall(r'aria-labelledby="([^"]+)"', page):
        assert set(label.split()) <= set(ids)
    regions = re.findall(r'aria-label="([^"]+)"', page)
    assert len(regions) == len(set(regions))
    assert page.count('class="badge">chosen') == 2


def test_a_page_of_one_graph_does_not_speak_of_graphs() -> None:
    assert "main" not in re.sub(r"</?main>|main \{[^}]*\}", "", render_html(SMALL))


# -- the bundle ------------------------------------------------------------------------------------------------------


def manifest() -> Manifest:
    def graph(side: int, chosen: str) -> Graph:
        spec = TensorSpec("x", "float32", ("batch", 3, side, side))
        name = f"{side}x{side}"
        variant = Variant("onnxruntime-cpu", chosen[-4:], (graph_file(name, f"variants/{chosen}.onnx"),))
        config = Preprocess("x", (side, side), mean=(0.0,) * 3, std=(1.0,) * 3)
        return Graph(
            (spec,), (spec,), {"batch": DimBounds()}, {chosen: variant}, chosen={"onnxruntime-cpu": chosen},
            preprocess=config,
        )  # fmt: skip

    graphs = {"16x16": graph(16, FP32), "24x24": graph(24, INT8)}
    first = graphs["16x16"]
    return Manifest(SCHEMA_VERSION, "net", "net:windowed", graphs, first.preprocess, None, BOTH.chosen, {}, {})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    with writing(tmp_path / "net.attn", force=False) as folder:
        for graph in manifest().graphs.values():
            for variant in graph.variants.values():
                (folder / variant.files[0]).parent.mkdir(parents=True)
                (folder / variant.files[0]).write_bytes(b"model")
        (folder / RECEIPT).write_bytes(encode(BOTH))
        write_manifest(folder, manifest())
    return open_bundle(tmp_path / "net.attn")


def test_each_graph_has_its_own_choice_and_preparation_of_images(bundle: Bundle) -> None:
    read = bundle.manifest
    assert [read.chosen_of(name)["onnxruntime-cpu"] for name in read.graphs] == [FP32, INT8]
    assert [read.preprocess_of(name).crop for name in read.graphs] == [(16, 16), (24, 24)]  # type: ignore[union-attr]


def test_a_graph_without_its_own_takes_the_manifest_s() -> None:
    whole = manifest()
    alone = replace(whole, graphs={MAIN: replace(whole.graphs["16x16"], chosen=None, preprocess=None)})
    assert alone.chosen_of(MAIN) == whole.chosen
    assert alone.preprocess_of(MAIN) == whole.preprocess
    assert set(json.loads(encode(alone))["graphs"][MAIN]) == {"inputs", "outputs", "dims", "variants"}


def test_files_of_the_only_graph_lie_in_the_bundle_s_own_folder() -> None:
    assert graph_file(MAIN, "canonical.onnx") == "canonical.onnx"
    assert graph_file("24x24", "canonical.onnx") == "24x24/canonical.onnx"


def test_a_rewritten_receipt_changes_the_choice_of_each_graph(bundle: Bundle) -> None:
    parts = bundle.receipts()
    parts["24x24"] = replace(parts["24x24"], chosen={"onnxruntime-cpu": FP32})
    receipt = merged(parts)
    bundle.rewrite(receipt, receipt.chosen)
    read = open_bundle(bundle.root)
    read.check_all()
    assert [read.manifest.chosen_of(name)["onnxruntime-cpu"] for name in read.manifest.graphs] == [FP32, FP32]
    assert read.receipts()["24x24"].chosen == {"onnxruntime-cpu": FP32}


def test_a_receipt_that_knows_nothing_of_a_graph_is_refused(bundle: Bundle) -> None:
    bundle.rewrite(SMALL, SMALL.chosen)
    with pytest.raises(BundleError, match="says nothing of a graph") as caught:
        bundle.receipts()
    assert "24x24" in str(caught.value.expected)


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "C:graph"])
def test_a_graph_whose_folder_would_lie_outside_is_refused(bundle: Bundle, name: str) -> None:
    path = bundle.root / MANIFEST
    path.write_text(path.read_text().replace('"24x24": {', f'"{name}": {{'))
    with pytest.raises(BundleError, match="leaves the bundle") as caught:
        open_bundle(bundle.root)
    assert caught.value.got == name


def test_a_bundle_without_any_graph_is_refused(bundle: Bundle) -> None:
    write_manifest(bundle.root, replace(bundle.manifest, graphs={}))
    with pytest.raises(BundleError, match="holds no graph"):
        open_bundle(bundle.root)
