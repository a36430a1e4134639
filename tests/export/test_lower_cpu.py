"""Whole small models lowered for ONNX Runtime's CPU at every level: which operators are left, and the same numbers.

What runs here are the operators' bodies; with kernels in tests/native/test_lowered_models.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.cpu_units import LEVELS, fusible_units
from attn_deploy.export.lower.lowered import Conditions
from attn_deploy.export.site_parity import record_sites, site_cases
from attn_deploy.inputs import make_feeds
from attn_deploy.ops import DOMAIN
from attn_deploy.parity import sqnr_db
from attn_deploy.readback import is_of
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for cpu_models

from cpu_models import ALL, MODELS, TRANSFORMERS, exported

MIN_DB = 110.0


def operators(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph if node.domain == DOMAIN))


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    content = ir.to_proto(model).SerializeToString()
    return list(onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, dict(feeds)))


@pytest.mark.parametrize("level", [*LEVELS, None])
@pytest.mark.parametrize("name", MODELS)
def test_every_level_gives_what_pytorch_gives(name: str, level: str | None) -> None:
    lowered = exported(name).lower(level)
    for batch in (1, 3):
        feeds = make_feeds(exported(name).captured.inputs, batch=batch, seed=3)
        expected = exported(name).captured.reference(feeds)
        for reference, got in zip(expected.values(), run(lowered, feeds), strict=True):
            assert got.shape == reference.shape
            assert sqnr_db(reference, got) > MIN_DB


EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    # the last feed-forward is computed for the class token alone, and so is the projection before it: no block there
    ("VisionTransformer", "block"): {"AttentionBlock": 2, "FeedForwardGelu": 2, "FeedForwardGeluTanh": 1,
                                     "NormLinear": 2, "PackedAttention": 1, "LinearResidual": 1},
    ("VisionTransformer", "linear"): {"NormLinear": 4, "PackedAttention": 3, "LinearResidual": 6, "NormLinearGelu": 2,
                                      "NormLinearGeluTanh": 1},
    ("VisionTransformer", "site"): {"PackedAttention": 3},
    ("VisionTransformer", "stock"): {},
    ("WindowTransformer", "block"): {"AttentionBlockIndexedBias": 2, "FeedForwardGelu": 2, "Linear": 1},
    ("WindowTransformer", "linear"): {"NormLinear": 2, "PackedAttentionIndexedBias": 2, "LinearResidual": 4,
                                      "NormLinearGelu": 2, "Linear": 1},
    # query, key and value of one value are one product; the norms behind the sums stay
    ("PostNormEncoder", "linear"): {"Linear": 2, "PackedAttentionMask": 2, "LinearResidual": 4, "LinearGelu": 2},
    ("PostNormEncoder", "site"): {"AttentionMask": 2},
    # key and value of the memory are the same in both passes
    ("Decoder", "block"): {"AttentionBlockCausal": 2, "FeedForwardSilu": 2, "NormLinear": 2, "Linear": 2,
                           "Attention": 2, "LinearResidual": 2},
}  # fmt: skip


@pytest.mark.parametrize(("name", "level"), EXPECTED)
def test_operators_that_are_left(name: str, level: str) -> None:
    assert operators(exported(name).lower(level)) == EXPECTED[name, level]


@pytest.mark.parametrize("name", [model.__name__ for model in TRANSFORMERS])
def test_next_to_nothing_stands_between_blocks(name: str) -> None:
    """A transformer of blocks: shapes, norms and sums of its layers are inside them."""
    at_most = {"VisionTransformer": 11, "WindowTransformer": 6, "PostNormEncoder": 9, "Decoder": 10}
    lowered = exported(name).lower("block")
    assert sum(node.domain == "" for node in lowered.graph) <= at_most[name]
    assert not {"MatMul", "Gemm", "Gelu", "Sigmoid", "Softmax"} & {n.op_type for n in lowered.graph}


@pytest.mark.parametrize("level", [*LEVELS, None])
@pytest.mark.parametrize("name", MODELS)
def test_every_name_starts_with_that_of_a_node_of_the_model(name: str, level: str | None) -> None:
    """That is how profiles, receipts and localizing tell what runs a module."""
    lowered = exported(name).lower(level)
    roots = [str(node.name) for node in exported(name).canonical.model.graph]
    names = [str(node.name) for node in lowered.graph]
    assert len(set(names)) == len(names)
    for own in names:
        assert any(is_of(own, root) for root in roots), own
    for site in exported(name).canonical.sites:
        assert any(is_of(own, site.node) for own in names), site.node


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_every_site_alone_gives_what_it_gives_in_pytorch(name: str, level: str) -> None:
    lowered = exported(name).lower(level)
    cases = list(site_cases(exported(name).canonical, lowered, record_sites(exported(name).rewritten)))
    assert [case.module for case in cases] == [site.module for site in exported(name).canonical.sites]
    for case in cases:
        session = onnxruntime.InferenceSession(case.model, providers=["CPUExecutionProvider"])
        got = session.run(None, dict(case.feeds))[0].reshape(case.expected.shape)
        assert sqnr_db(case.expected, got) > MIN_DB


@pytest.mark.parametrize("name", MODELS)
def test_units_cover_each_layer_once(name: str) -> None:
    units, names = exported(name).units().values(), {str(n.name) for n in exported(name).canonical.model.graph}
    covered = [node for unit in units for node in unit.nodes]
    assert len(covered) == len(set(covered))
    assert set(covered) <= names
    products = {n for n in names if n.rpartition("/")[2].startswith(("MatMul", "Gemm"))}
    assert products <= set(covered)
    assert {unit.site for unit in units if unit.site} == {site.node for site in exported(name).canonical.sites}
    assert all(
        unit.levels[0] == "stock" and list(unit.levels) == sorted(unit.levels, key=LEVELS.index) for unit in units
    )


def test_unit_of_an_attention_says_what_it_holds() -> None:
    unit = exported("VisionTransformer").units()["blocks.0.attn/PackedAttention"]
    assert unit.levels == LEVELS
    assert unit.site == "blocks.0.attn/PackedAttention"
    # 5 tokens of 16 channels: to 48 and from 16 to 16, and 2 products of 5 x 5 x 16
    assert unit.multiply_adds == 5 * 16 * (48 + 16) + 2 * 5 * 5 * 16
    mlp = exported("VisionTransformer").units()["blocks.0.mlp/FeedForward"]
    assert mlp.levels == ("stock", "linear", "block")
    assert mlp.multiply_adds == 2 * 5 * 16 * 24


def test_levels_are_what_the_library_allows() -> None:
    model = exported("PostNormEncoder")
    site = "attention.0/AttentionMask"
    assert model.units(frozenset({"AttentionMask"}))[site].levels == ("stock", "site")
    # without the kernel for packed operands the three layers stay three
    apart = model.units(frozenset({"AttentionMask", "Linear"}))
    assert apart[site].levels == ("stock", "site")
    assert apart["attention.0.query/MatMul"].levels == ("stock", "linear")
    packed = model.units(frozenset({"PackedAttentionMask", "Linear", "LinearResidual"}))
    assert packed[site].levels == ("stock", "linear")
    assert "attention.0.query/MatMul" not in packed
    assert model.units(frozenset({"GateSilu"})) == {}


def test_a_mixture_of_levels() -> None:
    model = exported("VisionTransformer")
    fuse = {"blocks.0.attn/PackedAttention": "block", "blocks.1.attn/PackedAttention": "linear",
            "blocks.2.attn/PackedAttention": "stock", "blocks.0.mlp/FeedForward": "linear"}  # fmt: skip
    lowered = onnxruntime_cpu.lower(model.canonical, Precision.FP32, native=ALL, fuse=fuse).model
    assert operators(lowered) == {
        "AttentionBlock": 1, "NormLinear": 1, "PackedAttention": 1, "LinearResidual": 2, "NormLinearGelu": 1
    }  # fmt: skip
    feeds = make_feeds(model.captured.inputs, batch=2, seed=3)
    assert sqnr_db(model.captured.reference(feeds)["output"], run(lowered, feeds)[0]) > MIN_DB


def test_two_layers_with_one_weight_keep_one_tensor() -> None:
    lowered = exported("Decoder").lower("block")
    shapes = Counter(
        tuple(v.const_value.shape) for v in lowered.graph.initializers.values() if v.const_value is not None
    )
    assert shapes[16, 48] == 1
    assert shapes[16, 24] == 1


def test_alternatives_are_offered_where_the_library_can_run_something() -> None:
    canonical = exported("PostNormEncoder").canonical

    def suffixes(kernels: frozenset[str]) -> list[str]:
        found = onnxruntime_cpu.alternatives(canonical, Precision.FP32, Conditions(kernels=kernels))
        return [alternative.suffix for alternative in found]

    assert suffixes(ALL) == ["", "-native"]
    assert suffixes(frozenset({"LinearResidual"})) == ["", "-native"]
    assert suffixes(frozenset({"GateSilu", "FeedForwardSilu"})) == [""]
    assert suffixes(frozenset()) == [""]


def test_blocked_layout_is_offered_for_convolutions_and_leaves_gates_written_out() -> None:
    blocked = ALL | {"BlockedGate"}
    transformer = onnxruntime_cpu.alternatives(
        exported("VisionTransformer").canonical, Precision.FP32, Conditions(blocked)
    )
    assert [a.suffix for a in transformer] == ["", "-native"]
    canonical = exported("GatedConvolutions").canonical
    assert [a.suffix for a in onnxruntime_cpu.alternatives(canonical, Precision.FP32, Conditions(ALL))] == [
        "",
        "-native",
    ]
    *_, native, offered = onnxruntime_cpu.alternatives(canonical, Precision.FP32, Conditions(blocked))
    assert (native.suffix, offered.suffix, offered.options) == ("-native", "-blocked", {"layout": "blocked"})
    assert operators(onnxruntime_cpu.lower(canonical, Precision.FP32, **native.arguments).model) == {
        "GateResidualRelu": 1, "ChannelPoolMean": 1, "Linear": 1
    }  # fmt: skip
    assert operators(onnxruntime_cpu.lower(canonical, Precision.FP32, **offered.arguments).model) == {"Linear": 1}
    (only,) = onnxruntime_cpu.alternatives(canonical, Precision.FP32, Conditions(frozenset({"BlockedGate"})))[1:]
    assert (only.suffix, only.arguments) == ("-blocked", {})


def test_blocked_layout_keeps_what_tuning_chose() -> None:
    canonical = exported("GatedConvolutions").canonical
    gate, head = (unit.name for unit in fusible_units(canonical, ALL) if "Pool" not in unit.name)
    tuned = {Precision.FP32: {gate: "site", head: "linear"}}
    conditions = Conditions(ALL | {"BlockedGate"}, tuned=tuned)
    found = {a.suffix: a for a in onnxruntime_cpu.alternatives(canonical, Precision.FP32, conditions)}
    assert list(found) == ["", "-tuned", "-native", "-blocked"]
    assert found["-tuned"].arguments["fuse"] == tuned[Precision.FP32]
    assert found["-blocked"].arguments["fuse"] == {head: "linear"}


def test_mean_over_the_plane_stays_in_the_layout_of_convolutions() -> None:
    canonical = exported("GatedConvolutions").canonical
    for precision in (Precision.FP32, Precision.FP16):
        lowered = onnxruntime_cpu.lower(canonical, precision).model
        counts = Counter(node.op_type for node in lowered.graph)
        assert (counts["GlobalAveragePool"], counts["ReduceMean"]) == (2, 0)
