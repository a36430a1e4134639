"""INT8 and FP16: quantized layers against float64, calibration against NumPy, and which layers are left alone."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.fp16 import MIN_ELEMENTS, store_fp16
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.export.precision.int8_conv import quantize_convs, scale_and_zero_point, values_to_calibrate
from attn_deploy.export.precision.plan import Exempt, plan_int8, weighted_nodes
from attn_deploy.export.precision.quantize_weight import quantize_weight
from attn_deploy.export.precision.ranges import Range
from attn_deploy.export.precision.statistics import Wanted, collect_statistics
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.runtimes import read_back
from attn_deploy.target import Target

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import network, normal, open_model, run

Array = np.ndarray[Any, Any]

CONV_DB = 27.0
"""Convolutions one behind the other with calibrated ranges: 33.4 dB were measured, 28.4 with the worst of six seeds."""


def operators(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


# -- weights ---------------------------------------------------------------------------------------------------------

W = normal(24, 16, seed=4)


@pytest.mark.parametrize("axis", [0, 1], ids=["per row", "per column"])
def test_a_weight_is_quantized_symmetrically_with_one_scale_per_channel(axis: int) -> None:
    quantized, scale = quantize_weight(W, axis)
    along = np.moveaxis(quantized, axis, 0).astype(np.float64) * scale[:, None]
    weight = np.moveaxis(W, axis, 0)
    assert (quantized.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (W.shape[axis],))
    assert (np.abs(np.moveaxis(quantized, axis, 0)).max(axis=1) == 127).all()
    assert (np.abs(along - weight) <= 0.501 * scale[:, None]).all()


def test_a_negated_weight_is_quantized_to_the_negated_value() -> None:
    quantized, scale = quantize_weight(W, 1)
    negated, same_scale = quantize_weight(-W, 1)
    np.testing.assert_array_equal(negated, -quantized)
    np.testing.assert_array_equal(same_scale, scale)


# -- convolutions ----------------------------------------------------------------------------------------------------

CONV_NET = """net (float[batch, 3, 12, 12] x) => (float[batch, 8, 12, 12] y)
{
    [stem__Conv] s = Conv <pads: ints = [1, 1, 1, 1]> (x, stem_w, stem_b)
    [stem__Relu] features = Relu (s)
    [dw__Conv] d = Conv <pads: ints = [1, 1, 1, 1], group: int = 8> (features, dw_w, dw_b)
    [dw__Relu] depthwise = Relu (d)
    [pw__Conv] pointwise = Conv (depthwise, pw_w)
    [add__Add] residual = Add (pointwise, features)
    [mid__Conv] m = Conv <pads: ints = [1, 1, 1, 1]> (residual, mid_w, mid_b)
    [mid__Relu] middle = Relu (m)
    [side__Conv] side = Conv (features, side_w, side_b)
    [last__Conv] last = Conv (middle, last_w, last_b)
    [out__Add] y = Add (last, side)
}"""


def conv_weights(seed: int = 0) -> dict[str, Array]:
    """Scaled so that magnitudes stay about 1 from layer to layer."""
    shapes = {"stem": (8, 3, 3, 3), "dw": (8, 1, 3, 3), "pw": (8, 8, 1, 1), "mid": (8, 8, 3, 3), "side": (8, 8, 1, 1),
              "last": (8, 8, 1, 1)}  # fmt: skip
    weights = {}
    for number, (name, shape) in enumerate(shapes.items()):
        fan_in = int(np.prod(shape[1:]))
        weights[f"{name}_w"] = normal(*shape, seed=10 * number + seed) * np.float32(fan_in**-0.5)
        weights[f"{name}_b"] = normal(8, seed=10 * number + 5 + seed) * np.float32(0.2)
    del weights["pw_b"]
    return weights


def images(batch: int, seed: int) -> Array:
    return normal(batch, 3, 12, 12, seed=seed)


def convs_of(model: ir.Model, leave: tuple[str, ...] = ("stem",)) -> list[ir.Node]:
    return [n for n in weighted_nodes(model) if not str(n.name).startswith(leave)]


def quantized_net(weights: dict[str, Array], text: str = CONV_NET) -> ir.Model:
    """All convolutions but the stem, with the ranges of 32 images."""
    model = network(text, **weights)
    convs = convs_of(model)
    batches = ({"x": images(8, seed)} for seed in range(100, 104))
    wanted = [Wanted(name) for name in values_to_calibrate(convs)]
    found = collect_statistics(network(text, **weights), wanted, batches, open_model)
    quantize_convs(model, convs, found.ranges())
    drop_unused_initializers(model)
    return model


def nodes_that_run(model: ir.Model, folder: Path) -> Counter[str]:
    ir.save(model, folder / "model.onnx")
    nodes = read_back(Target.ONNXRUNTIME_CPU, folder / "model.onnx", {"x": images(1, 7)})
    return Counter(n.op_type for n in nodes)


def test_a_net_of_convolutions_in_int8_is_within_its_sqnr() -> None:
    """Depthwise, pointwise, behind ReLU and without, a residual, and an input that two convolutions share."""
    expected = run(network(CONV_NET, **conv_weights()), x=images(4, 7))
    got = run(quantized_net(conv_weights()), x=images(4, 7))
    assert sqnr_db(expected, got) > CONV_DB


def test_onnx_runtime_multiplies_every_quantized_convolution_in_integers(tmp_path: Path) -> None:
    ran = nodes_that_run(quantized_net(conv_weights()), tmp_path)
    assert ran["QLinearConv"] == 5
    assert ran["Conv"] + ran["FusedConv"] + ran["NhwcFusedConv"] == 1  # the stem
    assert "Relu" not in ran  # folded into the ranges, or into the stem


def test_an_input_that_two_convolutions_share_is_quantized_once() -> None:
    model = quantized_net(conv_weights())
    readers = [n for n in model.graph if n.op_type == "QuantizeLinear" and n.inputs[0].name == "features"]
    assert len(readers) == 1


def test_a_residual_stays_in_floating_point() -> None:
    add = next(n for n in quantized_net(conv_weights()).graph if n.name == "add/Add")
    assert add.inputs[1].name == "features"
    assert add.inputs[0].producer().op_type == "DequantizeLinear"


def test_each_value_gets_one_range() -> None:
    names = values_to_calibrate(convs_of(network(CONV_NET, **conv_weights())))
    assert sorted(names) == ["depthwise", "features", "last", "middle", "pointwise", "residual", "side"]


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12], ids=["zeros", "1e-30", "1e-12"])
def test_a_channel_of_vanishing_weights_keeps_its_bias(size: float) -> None:
    """What is left of a channel whose BatchNormalization scales by nothing: its bias must fit in 32 bits."""
    weights = conv_weights()
    for name in ("mid", "side"):
        weights[f"{name}_w"][2] *= np.float32(size)
        weights[f"{name}_b"][2] = 3.0
    expected = run(network(CONV_NET, **weights), x=images(4, 7))
    got = run(quantized_net(weights), x=images(4, 7))
    assert sqnr_db(expected, got) > CONV_DB
    np.testing.assert_allclose(got[:, 2].mean(), expected[:, 2].mean(), rtol=0.02)


def test_channels_of_very_different_size_have_their_own_scales() -> None:
    weights = conv_weights()
    factors = np.logspace(-3, 3, 8, dtype=np.float32)
    weights["dw_w"] *= factors[:, None, None, None]
    weights["dw_b"] *= factors
    weights["pw_w"] /= factors[:, None, None]
    quantized, scale = quantize_weight(weights["dw_w"], axis=0)
    assert scale.max() / scale.min() > 1e4
    assert (np.abs(quantized).reshape(8, -1).max(axis=1) == 127).all()


@pytest.mark.parametrize(
    ("span", "zero_point"),
    [
        (Range(0.0, 5.1), 0),
        (Range(-2.55, 2.55), 128),
        (Range(-5.1, 0.0), 255),
        (Range(1.0, 5.1), 0),
        (Range(-5.1, -1.0), 255),
        (Range(0.0, 0.0), 0),
    ],
    ids=["positive", "both", "negative", "above zero", "below zero", "nothing"],
)
def test_a_range_is_mapped_onto_all_levels_and_zero_is_exact(span: Range, zero_point: int) -> None:
    scale, zero = scale_and_zero_point(span)
    assert zero == zero_point
    assert scale > 0
    low, high = (float(scale) * (level - int(zero)) for level in (0, 255))
    assert low <= min(span.low, 0.0) + 0.51 * scale
    assert high >= max(span.high, 0.0) - 0.51 * scale


# -- plan ------------------------------------------------------------------------------------------------------------

PLANNED = """net (float[batch, 3, 8, 8] x) => (float[batch, 10] y)
{
    [stem__Conv] s = Conv (x, stem_w)
    [stages_0_conv__Conv] c = Conv (s, conv_w)
    [stages_0_se_pool__GlobalAveragePool] p = GlobalAveragePool (c)
    [stages_0_se_fc1__Conv] e = Conv (p, conv_w)
    [stages_0_se__Relu] r = Relu (e)
    [stages_0_se_fc2__Conv] f = Conv (r, conv_w)
    [stages_0_se__Sigmoid] g = Sigmoid (f)
    [stages_0_se__Gate] gated = attn_deploy.Gate (c, g)
    [stages_1_conv__Conv] c1 = Conv (gated, conv_w)
    [stages_1_eca_pool__ChannelPoolMean] p1 = attn_deploy.ChannelPoolMean (c1)
    [stages_1_eca__Reshape] flat = Reshape (p1, flat_shape)
    [stages_1_eca_fc__MatMul] k1 = MatMul (flat, fc_w)
    [stages_1_eca__Reshape_2] k = Reshape (k1, map_shape)
    [stages_1_eca__Sigmoid] g1 = Sigmoid (k)
    [stages_1_eca__Gate] gated1 = attn_deploy.Gate (c1, g1)
    [stages_10_conv__Conv] c2 = Conv (gated1, conv_w)
    [pool__GlobalAveragePool] p2 = GlobalAveragePool (c2)
    [pool__Flatten] tokens = Flatten (p2)
    [mlp_fc1__MatMul] m1 = MatMul (tokens, fc_w)
    [mlp__Gelu] m2 = Gelu (m1)
    [mlp_fc2__Gemm] m3 = Gemm (m2, fc_w)
    [head__MatMul] h = MatMul (m3, head_w)
    [head__Add] y = Add (h, head_b)
}"""


def planned_net() -> ir.Model:
    return network(
        PLANNED, stem_w=normal(8, 3, 1, 1), conv_w=normal(8, 8, 1, 1), fc_w=normal(8, 8), head_w=normal(8, 10),
        head_b=normal(10), flat_shape=np.array([0, 8], np.int64), map_shape=np.array([0, 8, 1, 1], np.int64),
    )  # fmt: skip


def reasons(plan: PrecisionPlan) -> dict[str, str]:
    return {p.layer.rpartition("/")[0]: p.reason for p in plan.layers if p.scheme is Scheme.FLOAT}


ALWAYS = {
    "stages.0.se.fc1": Exempt.GATE,
    "stages.0.se.fc2": Exempt.GATE,
    "stages.1.eca.fc": Exempt.GATE,
    "head": Exempt.HEAD,
}


def test_gates_and_head_stay_in_floating_point_and_nothing_else() -> None:
    plan = plan_int8(planned_net())
    assert reasons(plan) == ALWAYS
    schemes = {p.layer: p.scheme for p in plan.layers if p.scheme is not Scheme.FLOAT}
    assert schemes == {
        "stem/Conv": Scheme.STATIC,
        "stages.0.conv/Conv": Scheme.STATIC,
        "stages.1.conv/Conv": Scheme.STATIC,
        "stages.10.conv/Conv": Scheme.STATIC,
        "mlp.fc1/MatMul": Scheme.PER_TOKEN,
        "mlp.fc2/Gemm": Scheme.PER_TOKEN,
    }


def separable_net(width: int) -> ir.Model:
    """A stem, a depthwise and a pointwise convolution of `width` channels; the pointwise has most of the work."""
    return network(
        f"""net (float[1, 3, 8, 8] x) => (float[1, {width}, 8, 8] y)
        <float[1, {width}, 8, 8] s, float[1, {width}, 8, 8] d, float[1, {width}, 8, 8] p>
        {{
            [stem__Conv] s = Conv (x, stem_w)
            [dw__Conv] d = Conv <group: int = {width}, pads: ints = [1, 1, 1, 1]> (s, dw_w)
            [pw__Conv] p = Conv (d, pw_w)
            [act__Relu] y = Relu (p)
        }}""",
        stem_w=normal(width, 3, 1, 1), dw_w=normal(width, 1, 3, 3), pw_w=normal(width, width, 1, 1),
    )  # fmt: skip


def test_depthwise_and_stem_stay_in_floating_point_where_they_are_little_work() -> None:
    assert reasons(plan_int8(separable_net(256))) == {"dw": Exempt.DEPTHWISE, "stem": Exempt.STEM}


def test_depthwise_is_quantized_where_the_promised_share_needs_it() -> None:
    assert reasons(plan_int8(separable_net(16))) == {}


def test_exempt_layers_are_listed_with_their_reason() -> None:
    assert "head/MatMul: the head: its error goes straight to the output" in plan_int8(planned_net()).exempt


@pytest.mark.parametrize(
    ("path", "layers"),
    [
        ("stages.1", {"stages.1.conv", "stages.1.eca.fc"}),
        ("stages.10.conv", {"stages.10.conv"}),
        ("mlp", {"mlp.fc1", "mlp.fc2"}),
        ("stem", {"stem"}),
    ],
)
def test_what_lies_below_an_excluded_path_stays_in_floating_point(path: str, layers: set[str]) -> None:
    found = reasons(plan_int8(planned_net(), [path]))
    assert {name for name, reason in found.items() if reason == Exempt.EXCLUDED} == layers
    assert found.keys() == ALWAYS.keys() | layers


def test_several_paths_can_be_excluded() -> None:
    found = reasons(plan_int8(planned_net(), ["mlp.fc1", "stages.10"]))
    assert found.keys() == ALWAYS.keys() | {"mlp.fc1", "stages.10.conv"}


@pytest.mark.parametrize(
    ("path", "nearest"), [("mlp.fc3", "mlp.fc"), ("stages.2", "stages."), ("stage", "stages."), ("mlp.fc", "mlp.fc1")]
)
def test_a_path_without_a_layer_is_an_error_with_the_nearest_name(path: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="--exclude") as caught:
        plan_int8(planned_net(), ["stem", path])
    assert caught.value.got == path
    assert "did you mean" in str(caught.value.expected)
    assert nearest in str(caught.value.expected)


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("Conv (x, w)", normal(3, 3, 1)),
        ("Gemm <alpha: float = 2.0> (x, w)", normal(5, 5)),
        ("Gemm <transA: int = 1> (x, w)", normal(5, 5)),
        ("MatMul (x, w)", normal(3, 5, 5)),
        ("MatMul (x, w)", normal(5, 5).astype(np.float64)),
    ],
    ids=["Conv in one dimension", "Gemm with alpha", "Gemm with transA", "weight of rank 3", "double"],
)
def test_a_layer_without_an_int8_kernel_says_so(body: str, weight: Array) -> None:
    text = f"net (float[n, 3, 5] x) => (float[n, 3, 5] y) {{ [fc__Layer] h = {body} [act__Tanh] y = Tanh (h) }}"
    assert reasons(plan_int8(network(text, w=weight))) == {"fc": Exempt.FORM}


def test_a_product_of_two_activations_is_no_layer() -> None:
    text = "net (float[n, 5, 5] x) => (float[n, 5, 5] y) { [a__MatMul] h = MatMul (x, x) [b__Tanh] y = Tanh (h) }"
    assert plan_int8(network(text)).layers == ()


def test_a_layer_that_the_plan_does_not_know_is_in_floating_point() -> None:
    assert plan_int8(planned_net()).scheme("no/such") is Scheme.FLOAT


# -- FP16 storage ----------------------------------------------------------------------------------------------------

HALVES = """net (float[n, 64] x) => (float[n, 64] y)
{
    [a__MatMul] h = MatMul (x, w1)
    [b__MatMul] g = MatMul (h, w2)
    [c__MatMul] f = MatMul (x, w1)
    [d__Add] s = Add (g, f)
    [e__Add] y = Add (s, b)
}"""


def halves_net(largest: float = 1.0) -> ir.Model:
    """w1 is read twice; w2 holds one value of the given size."""
    w1, w2 = normal(64, 64, seed=1) / 8, normal(64, 64, seed=2) / 8
    w2[3, 4] = largest
    return network(HALVES, w1=w1, w2=w2, b=normal(64, seed=3))


def stored(model: ir.Model) -> dict[str, str]:
    return {name: str(value.const_value.dtype) for name, value in model.graph.initializers.items()}


def test_large_weights_are_stored_in_half_precision_and_small_ones_are_not() -> None:
    model = halves_net()
    assert store_fp16(model) == ()
    assert sorted(stored(model).values()) == ["FLOAT", "FLOAT16", "FLOAT16"]
    assert stored(model)["b"] == "FLOAT"
    assert 64 < MIN_ELEMENTS <= 64 * 64


def test_a_model_stored_in_half_precision_computes_in_float32() -> None:
    x = normal(5, 64)
    expected = run(halves_net(), x=x)
    model = halves_net()
    store_fp16(model)
    got = run(model, x=x)
    assert got.dtype == np.float32
    assert sqnr_db(expected, got) > 60  # 11 bits of weight
    assert not np.array_equal(expected, got)
    assert operators(model)["Cast"] == 2  # one for each weight, however often it is read


@pytest.mark.parametrize(
    ("largest", "kept"),
    [(65504.0, ()), (65600.0, ("w2",)), (-1e6, ("w2",)), (np.inf, ("w2",))],
    ids=["the largest half", "beyond it", "below it", "infinity"],
)
def test_a_weight_beyond_half_precision_stays_in_float32_and_is_named(largest: float, kept: tuple[str, ...]) -> None:
    model = halves_net(largest)
    assert store_fp16(model) == kept
    assert stored(model).get("w2") == ("FLOAT" if kept else None)
    if np.isfinite(largest):
        expected = run(halves_net(largest), x=normal(5, 64))
        assert sqnr_db(expected, run(model, x=normal(5, 64))) > 60
