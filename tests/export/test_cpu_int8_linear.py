"""Linear layers in INT8 on the CPU: against float64, by the bodies of their operators, alone and in small models.

Kernels run them in tests/native; that bodies are what the operators' references say is in tests/unit/test_block_ops.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.blocks import pair_blocks
from attn_deploy.export.canonical import portable
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.cpu_units import fuse_units, fusible_units
from attn_deploy.export.lower.lowered import Conditions
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.export.precision.plan import Exempt, plan_int8, weighted_nodes
from attn_deploy.export.site_parity import record_sites, site_cases
from attn_deploy.inputs import make_feeds
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.readback import is_of
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for cpu_models, half_models

from cpu_models import ALL, MODELS, TRANSFORMERS, exported
from half_models import network, normal, run

Array = np.ndarray[Any, Any]

LINEAR_DB = 40.0
"""Normal activations per row and normal weights per column, both in 8 bits: 43.4 to 47.9 dB were measured."""

MODEL_DB = 40.0
"""Of a tiny transformer's output: 42.8 to 50.4 dB were measured."""


def everything(model: ir.Model) -> PrecisionPlan:
    return PrecisionPlan(tuple(LayerPlan(str(node.name), Scheme.PER_TOKEN) for node in weighted_nodes(model)))


def operators(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph if node.domain == DOMAIN))


# -- single layers -----------------------------------------------------------------------------------------------------


def in_int8(text: str, kernels: frozenset[str] = frozenset(), **weights: Array) -> ir.Model:
    """All layers of a network of ONNX text."""
    model = network(text, **weights)
    plan = everything(model)
    assert fuse_units(model, kernels, None, plan) == set(plan.quantized)
    drop_unused_initializers(model)
    return model


X2, X3, X4 = normal(7, 24, seed=1), normal(3, 5, 24, seed=2), normal(2, 3, 5, 24, seed=3)
W, WT, B = normal(24, 16, seed=4), normal(16, 24, seed=5), normal(16, seed=6)
LINEAR = {
    "MatMul of rank 2": ("[fc__MatMul] y = MatMul (x, w)", X2, {"w": W}, lambda x: x @ W),
    "MatMul of rank 3": ("[fc__MatMul] y = MatMul (x, w)", X3, {"w": W}, lambda x: x @ W),
    "MatMul of rank 4": ("[fc__MatMul] y = MatMul (x, w)", X4, {"w": W}, lambda x: x @ W),
    "MatMul of one row": ("[fc__MatMul] y = MatMul (x, w)", X2[:1], {"w": W}, lambda x: x @ W),
    "MatMul to one column": ("[fc__MatMul] y = MatMul (x, w)", X3, {"w": W[:, :1]}, lambda x: x @ W[:, :1]),
    "MatMul with its bias behind": (
        "[fc__MatMul] h = MatMul (x, w) [fc__Add] y = Add (h, b)",
        X3,
        {"w": W, "b": B},
        lambda x: x @ W + B,
    ),
    "Gemm": ("[fc__Gemm] y = Gemm (x, w)", X2, {"w": W}, lambda x: x @ W),
    "Gemm with bias": ("[fc__Gemm] y = Gemm (x, w, b)", X2, {"w": W, "b": B}, lambda x: x @ W + B),
    "Gemm with transB": ("[fc__Gemm] y = Gemm <transB: int = 1> (x, w)", X2, {"w": WT}, lambda x: x @ WT.T),
    "Gemm with transB and bias": (
        "[fc__Gemm] y = Gemm <transB: int = 1> (x, w, b)",
        X2,
        {"w": WT, "b": B},
        lambda x: x @ WT.T + B,
    ),
    "before an activation": (
        "[fc__MatMul] h = MatMul (x, w) [fc__Add] i = Add (h, b) [act__Relu] y = Relu (i)",
        X3,
        {"w": W, "b": B},
        lambda x: np.maximum(x @ W + B, 0),
    ),
}


def linear_text(body: str, x: Array, result: Array) -> str:
    x_shape, y_shape = (", ".join(f"{'xy'[k]}{n}" for n in range(a.ndim)) for k, a in enumerate((x, result)))
    return f"linear (float[{x_shape}] x) => (float[{y_shape}] y) {{ {body} }}"


PRODUCT = "[fc__MatMul] y = MatMul (x, w)"


@pytest.mark.parametrize("kernels", [frozenset[str](), ALL], ids=["bodies", "operators"])
@pytest.mark.parametrize("case", LINEAR)
def test_a_linear_layer_in_int8_is_within_its_sqnr(case: str, kernels: frozenset[str]) -> None:
    body, x, weights, reference = LINEAR[case]
    expected = reference(x.astype(np.float64))
    model = in_int8(linear_text(body, x, expected), kernels, **weights)
    counts = Counter(n.op_type for n in model.graph)
    assert sum(counts[name] for name in ("MatMulInteger", "QuantizedLinear", "QuantizedLinearRelu")) == 1
    assert not counts.keys() & {"MatMul", "Gemm"}
    got = run(model, x=x)
    assert got.shape == expected.shape
    assert sqnr_db(expected, got) > LINEAR_DB
    assert all(str(n.name).startswith(("fc/", "act/")) for n in model.graph)


def test_every_row_has_its_own_scale() -> None:
    """A row a million times smaller than its neighbour is as exact as alone."""
    x = X2 * np.logspace(-6, 6, len(X2), dtype=np.float32)[:, None]
    got = run(in_int8(linear_text(PRODUCT, x, x), w=W), x=x)
    expected = x.astype(np.float64) @ W
    for row in range(len(x)):
        assert sqnr_db(expected[row], got[row]) > LINEAR_DB - 6, row  # of 16 values only


def test_every_column_of_the_weight_has_its_own_scale() -> None:
    w = W * np.logspace(-6, 6, W.shape[1], dtype=np.float32)
    got = run(in_int8(linear_text(PRODUCT, X2, X2), w=w), x=X2)
    expected = X2.astype(np.float64) @ w
    for column in range(w.shape[1]):
        assert sqnr_db(expected[:, column], got[:, column]) > LINEAR_DB - 6, column


def test_a_column_of_zeros_gives_exactly_zero() -> None:
    w = W.copy()
    w[:, 5] = 0.0
    got = run(in_int8(linear_text(PRODUCT, X3, X3), w=w), x=X3)
    assert not got[..., 5].any()
    assert sqnr_db(X3.astype(np.float64) @ w, got) > LINEAR_DB


def test_the_output_keeps_its_name_and_the_old_weight_goes() -> None:
    model = in_int8(linear_text(PRODUCT, X3, X3), ALL, w=W)
    assert [o.name for o in model.graph.outputs] == ["y"]
    stored = {name: str(v.const_value.dtype) for name, v in model.graph.initializers.items() if v.const_value}
    prefix = "fc/MatMul/fused"
    assert stored == {f"{prefix}/weight_uint8": "UINT8", f"{prefix}/weight_scale": "FLOAT", f"{prefix}/bias": "FLOAT"}


def test_layers_with_one_weight_keep_one_tensor() -> None:
    body = "[a__MatMul] p = MatMul (x, w) [b__MatMul] q = MatMul (x, w) [c__Sub] y = Sub (p, q)"
    model = in_int8(linear_text(body, X3, X3), w=W)
    assert sum(v.dtype == ir.DataType.UINT8 for v in model.graph.initializers.values()) == 1
    assert not run(model, x=X3).any()


@pytest.mark.parametrize(
    ("body", "x"),
    [("MatMul (x, w)", X2[0]), ("Gemm (x, w, m)", X2)],
    ids=["a vector", "a bias for each row"],
)
def test_a_layer_without_an_operator_stays_in_floating_point_and_is_named(body: str, x: Array) -> None:
    model = network(linear_text(f"[fc__Layer] y = {body}", x, x), w=W, m=normal(7, 16))
    assert fuse_units(model, ALL, None, everything(model)) == frozenset()
    np.testing.assert_allclose(run(model, x=x), x @ W + (normal(7, 16) if "m" in body else 0), rtol=1e-4, atol=1e-4)


# -- models ------------------------------------------------------------------------------------------------------------

NAMES = [model.__name__ for model in TRANSFORMERS]


def per_token(name: str) -> PrecisionPlan:
    """The model's linear layers; no convolution, which would have to be calibrated."""
    plan = plan_int8(exported(name).canonical.model)
    return plan.restricted(plan.of(Scheme.PER_TOKEN))


def lowered(
    name: str, plan: PrecisionPlan | None = None, kernels: frozenset[str] = ALL, fuse: Mapping[str, str] | None = None
) -> ir.Model:
    canonical = exported(name).canonical
    return onnxruntime_cpu.lower(
        canonical, Precision.INT8, native=kernels, fuse=fuse, plan=per_token(name) if plan is None else plan
    ).model


def output(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    content = ir.to_proto(model).SerializeToString()
    return list(onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, dict(feeds)))


WAYS: dict[str, dict[str, Any]] = {
    "bodies": {"kernels": frozenset()}, "linear": {"fuse": {}}, "block": {}, "only sites": {"kernels": ALL - {
        name for name in ALL if name.startswith("Quantized")}}
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_level_gives_nearly_what_pytorch_gives(name: str, way: str) -> None:
    model = lowered(name, **WAYS[way])
    feeds = make_feeds(exported(name).captured.inputs, batch=3, seed=3)
    expected = exported(name).captured.reference(feeds)
    for reference, got in zip(expected.values(), output(model, feeds), strict=True):
        assert got.shape == reference.shape
        assert MODEL_DB < sqnr_db(reference, got) < 100


EXPECTED: dict[tuple[str, str], dict[str, int]] = {
    ("VisionTransformer", "block"): {
        "QuantizedAttentionBlock": 2, "QuantizedFeedForwardGelu": 2, "QuantizedFeedForwardGeluTanh": 1,
        "QuantizedNormLinear": 1, "NormLinear": 1, "PackedAttention": 1, "QuantizedLinearResidual": 1,
    },
    ("VisionTransformer", "linear"): {
        "QuantizedNormLinear": 3, "PackedAttention": 3, "QuantizedLinearResidual": 6, "QuantizedNormLinearGelu": 2,
        "QuantizedNormLinearGeluTanh": 1,
    },
    ("VisionTransformer", "bodies"): {},
    ("VisionTransformer", "only sites"): {"PackedAttention": 3, "NormLinear": 1},
    ("WindowTransformer", "block"): {
        "QuantizedAttentionBlockIndexedBias": 2, "QuantizedFeedForwardGelu": 2, "Linear": 1
    },
    ("PostNormEncoder", "block"): {
        "QuantizedLinear": 2, "PackedAttentionMask": 2, "QuantizedLinearResidual": 4, "QuantizedLinearGelu": 2
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "way"), EXPECTED)
def test_operators_that_are_left(name: str, way: str) -> None:
    assert operators(lowered(name, **WAYS[way])) == EXPECTED[name, way]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_name_starts_with_that_of_a_node_of_the_model(name: str, way: str) -> None:
    roots = [str(node.name) for node in exported(name).canonical.model.graph]
    names = [str(node.name) for node in lowered(name, **WAYS[way]).graph]
    assert len(set(names)) == len(names)
    for own in names:
        assert any(is_of(own, root) for root in roots), own


def test_a_weight_that_two_layers_share_is_quantized_once() -> None:
    model = lowered("Decoder")
    levels = [v.const_value for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8]
    shapes = Counter(tuple(tensor.shape) for tensor in levels if tensor is not None)
    assert shapes[16, 48] == shapes[16, 24] == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_every_site_alone_is_held_to_what_it_computes_in(name: str, way: str) -> None:
    """Attention beside INT8 layers is exact; a block with INT8 layers in it is compared with the same block in FP32."""
    model = lowered(name, **WAYS[way])
    cases = list(site_cases(exported(name).canonical, model, record_sites(exported(name).rewritten)))
    assert len(cases) == len(exported(name).canonical.sites)
    for case in cases:
        got = onnxruntime.InferenceSession(case.model, providers=["CPUExecutionProvider"]).run(None, dict(case.feeds))
        db = sqnr_db(case.expected, got[0].reshape(case.expected.shape))
        assert db > 110 if case.arithmetic is Precision.FP32 else 40 < db < 80
    in_blocks = sum(n for op, n in operators(model).items() if op.startswith("QuantizedAttentionBlock"))
    assert sum(case.arithmetic is Precision.INT8 for case in cases) == in_blocks


# -- plans -------------------------------------------------------------------------------------------------------------


def test_units_have_the_levels_that_their_layers_allow() -> None:
    made, plan = exported("VisionTransformer"), per_token("VisionTransformer")

    def levels(plan: PrecisionPlan, kernels: frozenset[str] = ALL) -> dict[str, tuple[str, ...]]:
        return {unit.name: unit.levels for unit in fusible_units(made.canonical, kernels, plan)}

    attention, mlp = "blocks.0.attn/PackedAttention", "blocks.0.mlp/FeedForward"
    assert levels(plan)[attention] == levels(plan)[mlp] == ("linear", "block")
    assert levels(plan)["head/Gemm"] == ("stock", "linear")
    assert levels(plan, frozenset())[attention] == ("linear",)
    assert "head/Gemm" not in levels(plan, frozenset())
    half = plan.restricted({p.layer for p in plan.layers if p.layer != "blocks.0.attn.proj/MatMul"})
    assert levels(half)[attention] == ("linear",)
    assert levels(plan.restricted(()))[attention] == ("stock", "site", "linear", "block")


def test_a_plan_decides_layer_by_layer() -> None:
    plan = per_token("VisionTransformer")
    first = plan.restricted({p.layer for p in plan.layers if p.layer.startswith("blocks.0.")})
    assert operators(lowered("VisionTransformer", first)) == {
        "QuantizedAttentionBlock": 1, "QuantizedFeedForwardGelu": 1, "AttentionBlock": 1, "FeedForwardGelu": 1,
        "FeedForwardGeluTanh": 1, "NormLinear": 2, "PackedAttention": 1, "LinearResidual": 1,
    }  # fmt: skip
    mixed = plan.restricted({p.layer for p in plan.layers if p.layer.endswith(("attn.qkv/MatMul", "mlp.fc2/MatMul"))})
    assert operators(lowered("WindowTransformer", mixed.restricted(()))) == {
        "AttentionBlockIndexedBias": 2, "FeedForwardGelu": 2, "Linear": 1
    }  # fmt: skip
    assert operators(lowered("VisionTransformer", mixed)) == {
        "QuantizedNormLinear": 3, "PackedAttention": 3, "LinearResidual": 3, "NormLinearGelu": 2,
        "NormLinearGeluTanh": 1, "QuantizedLinearResidual": 3, "NormLinear": 1,
    }  # fmt: skip


def test_layers_that_are_packed_are_in_int8_together_or_not_at_all() -> None:
    plan = per_token("PostNormEncoder")
    without = plan.restricted({p.layer for p in plan.layers if "0.key" not in p.layer})
    assert operators(lowered("PostNormEncoder", without)) == {
        "QuantizedLinear": 3, "Linear": 1, "AttentionMask": 1, "PackedAttentionMask": 1, "QuantizedLinearResidual": 4,
        "QuantizedLinearGelu": 2,
    }  # fmt: skip


def test_levels_that_another_plan_had_are_taken_as_the_nearest() -> None:
    fuse = {"blocks.0.attn/PackedAttention": "block", "blocks.0.mlp/FeedForward": "site", "no/Unit": "linear"}
    counts = operators(lowered("VisionTransformer", fuse=fuse))
    assert counts["QuantizedAttentionBlock"] == 1
    assert not any(name.startswith("QuantizedFeedForward") for name in counts)


def test_the_plan_that_comes_back_says_what_was_done() -> None:
    canonical = exported("PostNormEncoder").canonical
    plan = PrecisionPlan((LayerPlan("mlp.0.fc1/MatMul", Scheme.STATIC), LayerPlan("mlp.1.fc1/MatMul", Scheme.FLOAT)))
    done = onnxruntime_cpu.lower(canonical, Precision.INT8, native=ALL, plan=plan)
    assert done.plan == plan
    assert operators(done.model)["QuantizedLinearGelu"] == 1
    assert done.statistics is None
    default = onnxruntime_cpu.lower(canonical, Precision.INT8, exclude=["mlp.0"]).plan
    assert default.exempt == tuple(f"mlp.0.{fc}/MatMul: {Exempt.EXCLUDED}" for fc in ("fc1", "fc2"))


def test_alternatives_are_offered_where_kernels_run_something() -> None:
    def suffixes(name: str, kernels: frozenset[str], **levels: str) -> list[str]:
        canonical = exported(name).canonical
        tuned = {Precision.INT8: {unit.name: levels.get(unit.name, "block") for unit in fusible_units(canonical, ALL)}}
        conditions = Conditions(kernels, tuned=tuned if levels else {}, plan=per_token(name))
        found = onnxruntime_cpu.alternatives(canonical, Precision.INT8, conditions)
        return [alternative.suffix for alternative in found]

    assert suffixes("PostNormEncoder", ALL) == ["", "-native"]
    assert suffixes("PostNormEncoder", frozenset({"GateSilu"})) == [""]
    assert suffixes("PostNormEncoder", frozenset({"QuantizedLinear"})) == ["", "-native"]
    assert suffixes("VisionTransformer", frozenset({"PackedAttention"})) == ["", "-native"]
    assert suffixes("VisionTransformer", ALL, **{"blocks.0.mlp/FeedForward": "linear"}) == ["", "-tuned", "-native"]
    assert suffixes("VisionTransformer", ALL, none="") == ["", "-native"]
    assert suffixes("GatedConvolutions", frozenset()) == [""]


@pytest.mark.parametrize(("way", "smallest"), [("bodies", 10), ("linear", 9), ("block", 5)])
def test_blocks_beside_the_reference_are_judged_by_what_they_compute_in(way: str, smallest: int) -> None:
    made = exported("VisionTransformer")
    reference = portable(made.canonical)
    model = lowered("VisionTransformer", **WAYS[way])
    inline_functions(model, keep=ALL)
    blocks = pair_blocks(model, reference, made.canonical.model, reference, [s.node for s in made.canonical.sites])
    kinds = Counter(block.arithmetic for block in blocks.in_order)
    assert kinds[Precision.INT8] >= smallest, kinds
    assert kinds.keys() == {Precision.INT8, Precision.FP32}
    for block in blocks.in_order:
        quantized = any(node.op_type in FORMS and "Quantized" in node.op_type for node in block.candidate.nodes)
        assert block.arithmetic is Precision.INT8 or not quantized


def test_only_models_with_a_layer_in_int8_are_other_than_in_fp32() -> None:
    nothing = PrecisionPlan()
    for name in MODELS:
        floating = onnxruntime_cpu.lower(exported(name).canonical, Precision.FP32, native=ALL).model
        assert operators(lowered(name, nothing)) == operators(floating)
