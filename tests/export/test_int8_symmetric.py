"""INT8 and FP8 for GPUs: signed symmetric pairs, their ranges, where they stand, and their numbers on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from msgspec.structs import replace

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.precision.attention_products import attention_products
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.histogram import histogram_of
from attn_deploy.export.precision.int8_symmetric import (
    LAYER_MIN_SQNR_DB,
    has_fp8_kernel,
    in_format,
    int8_symmetric,
    plan_symmetric,
)
from attn_deploy.export.precision.plan import Exempt, plan_int8
from attn_deploy.export.precision.ranges import RangeMethod
from attn_deploy.export.precision.statistics import Statistics, ValueStatistics, Wanted, collect_statistics
from attn_deploy.export.precision.symmetric_choice import choose, measure_layers
from attn_deploy.export.precision.symmetric_format import FP8, INT8, SymmetricFormat
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import FP16, Array, network, normal, open_model, require_well_formed, run

NET = """net (float[batch, 5, 16] x) => (float[batch, 5, 4] y)
{
    [fc1__MatMul] p = MatMul (x, w1)
    [fc1__Add] h = Add (p, b1)
    [act__Relu] g = Relu (h)
    [fc2__MatMul] q = MatMul (g, w2)
    [fc3__MatMul] r = MatMul (g, w3)
    [sum__Add] s = Add (q, r)
    [act2__Gelu] t = Gelu (s)
    [head__MatMul] y = MatMul (t, w4)
}"""
WEIGHTS = {
    "w1": normal(16, 32, seed=1) / 4, "b1": normal(32, seed=2), "w2": normal(32, 16, seed=3) / 6,
    "w3": normal(32, 16, seed=4) / 6, "w4": normal(16, 4, seed=5) / 4,
}  # fmt: skip


def batches() -> list[dict[str, Array]]:
    return [{"x": normal(4, 5, 16, seed=s)} for s in (30, 31, 32)]


def quantized(form: SymmetricFormat = INT8, **options: object) -> tuple[ir.Model, PrecisionPlan]:
    model = network(NET, **WEIGHTS)
    plan = int8_symmetric(model, plan_symmetric(model, form=form), batches, open_model, **options)  # type: ignore[arg-type]
    require_well_formed(model)
    return model, plan


def constant(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def of_type(model: ir.Model, operator: str) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type == operator]


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_layers_read_pairs_of_signed_integers_with_zero_point_zero() -> None:
    model, _ = quantized()
    for node in of_type(model, "QuantizeLinear") + of_type(model, "DequantizeLinear"):
        zero = constant(node.inputs[2])
        assert zero.dtype == np.int8
        assert not zero.any()
    for name in ("fc1/MatMul", "fc2/MatMul", "fc3/MatMul"):
        node = next(n for n in model.graph if n.name == name)
        assert [i.producer().op_type for i in node.inputs] == ["DequantizeLinear"] * 2  # type: ignore[union-attr]
        weight = node.inputs[1].producer()  # type: ignore[union-attr]
        assert weight is not None
        values, scale = constant(weight.inputs[0]), constant(weight.inputs[1])
        assert (values.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (values.shape[1],))
        assert weight.attributes["axis"].as_int() == 1
        assert (np.abs(values).max(axis=0) == 127).all()
        assert str(weight.name).startswith(name)
    assert not [v for v in model.graph.initializers.values() if v.const_value.dtype == ir.DataType.UINT8]  # type: ignore[union-attr]


def test_a_value_that_two_layers_read_has_one_pair_and_the_head_none() -> None:
    model, plan = quantized()
    read = [n.inputs[0].name for n in of_type(model, "QuantizeLinear")]  # type: ignore[union-attr]
    assert sorted(map(str, read)) == ["g", "x"]
    assert plan.exempt == ("head/MatMul: the head: its error goes straight to the output",)
    assert {"w1", "w2", "w3"}.isdisjoint(model.graph.initializers)
    assert model.graph.initializers["b1"].dtype == ir.DataType.FLOAT


def test_int8_is_close_to_float32_at_any_batch() -> None:
    model, _ = quantized()
    for batch in (1, 3):
        x = normal(batch, 5, 16, seed=40)
        assert 25 < sqnr_db(run(network(NET, **WEIGHTS), x=x), run(model, x=x)) < 60


LAYERS = {
    "Conv": ("Conv <pads: ints = [1, 1, 1, 1]> (x, w, b)", (2, 3, 6, 6), (4, 3, 3, 3), 0),
    "depthwise Conv": ("Conv <group: int = 4> (x, w, b)", (2, 4, 6, 6), (4, 1, 3, 3), 0),
    "MatMul": ("MatMul (x, w)", (2, 3, 8), (8, 4), 1),
    "Gemm": ("Gemm (x, w, b)", (5, 8), (8, 4), 1),
    "Gemm with transB": ("Gemm <transB: int = 1> (x, w, b)", (5, 8), (4, 8), 0),
}


@pytest.mark.parametrize("case", LAYERS)
def test_each_output_channel_has_its_own_scale(case: str) -> None:
    """A channel a thousand times smaller is as exact as its neighbours: the axis is the right one."""
    body, shape, weight_shape, axis = LAYERS[case]
    w = normal(*weight_shape, seed=1)
    factors = np.logspace(-3, 0, weight_shape[axis], dtype=np.float32)
    w *= np.expand_dims(factors, tuple(k for k in range(w.ndim) if k != axis))
    weights = {"w": w, **({"b": normal(4, seed=2) * factors} if " b)" in body else {})}
    dims = ", ".join(f"d{k}" if k != 1 or len(shape) < 4 else str(shape[1]) for k in range(len(shape)))
    text = f"net (float[{dims}] x) => (float y) {{ [layer__It] h = {body} [z__Neg] y = Neg (h) }}"
    model = network(text, **weights)
    model.graph.outputs[0].shape = None
    x = normal(*shape, seed=3)
    expected = run(model, x=x)
    plan = everything(model)
    int8_symmetric(model, plan, lambda: [{"x": x}], open_model, method=RangeMethod.MIN_MAX)
    dequantize = next(n for n in of_type(model, "DequantizeLinear") if n.inputs[0].is_initializer())  # type: ignore[union-attr]
    assert dequantize.attributes["axis"].as_int() == axis
    got = run(model, x=x)
    channel = 1 if "Conv" in case else -1
    for number in range(4):
        assert sqnr_db(np.take(expected, number, channel), np.take(got, number, channel)) > 30


def everything(model: ir.Model) -> PrecisionPlan:
    """Every layer, the exempt ones too."""
    layers = plan_int8(model).layers
    return PrecisionPlan(tuple(replace(p, scheme=Scheme.STATIC, reason="") for p in layers))


def test_the_plan_has_the_exemptions_of_int8_on_the_cpu() -> None:
    model = network(NET, **WEIGHTS)
    plan, on_cpu = plan_symmetric(model, ["fc3"]), plan_int8(model, ["fc3"])
    assert plan.exempt == on_cpu.exempt
    assert {p.scheme for p in plan.layers} == {Scheme.FLOAT, Scheme.STATIC}


# -- attention -------------------------------------------------------------------------------------------------------

ATTENTION = """net (float[batch, 6, 2, 8] q, float[batch, 6, 2, 8] k, float[batch, 6, 2, 8] v,
                    bool[batch, 1, 1, 6] mask) => (float[batch, 6, 2, 8] y)
{
    [attn__Attention] o = attn_deploy.AttentionMask <scale: float = 0.35> (q, k, v, mask)
    [z__Neg] y = Neg (o)
}"""


def attention_feeds(seed: int) -> dict[str, Array]:
    q, k, v = (normal(2, 6, 2, 8, seed=seed + n) for n in range(3))
    return {"q": q, "k": k, "v": v, "mask": np.array([[[[True] * 6]], [[[True] * 4 + [False] * 2]]])}


def attention_net() -> ir.Model:
    model = network(ATTENTION)
    inline_functions(model)
    return model


def test_the_products_of_an_attention_are_found_through_scale_and_mask() -> None:
    (found,) = attention_products(attention_net())
    names = [str(i.name) for i in (*found.first.inputs, *found.second.inputs)]  # type: ignore[union-attr]
    assert [name.rpartition("/")[2] for name in names] == ["q", "kt", "p", "v"]


def test_attention_is_left_alone_unless_it_is_asked_for() -> None:
    model = attention_net()
    int8_symmetric(model, PrecisionPlan(()), lambda: [attention_feeds(1)], open_model)
    assert of_type(model, "QuantizeLinear") == []


def test_attention_has_pairs_before_and_behind_both_products() -> None:
    model, feeds = attention_net(), attention_feeds(50)
    expected = run(model, **feeds)
    (found,) = attention_products(model)
    int8_symmetric(model, PrecisionPlan(()), lambda: [attention_feeds(s) for s in (1, 4)], open_model, attention=True)
    require_well_formed(model)
    for node in (found.first, found.second):
        assert [i.producer().op_type for i in node.inputs] == ["DequantizeLinear"] * 2  # type: ignore[union-attr]
    (behind,) = {user.op_type for user, _ in found.second.outputs[0].uses()}
    assert behind == "QuantizeLinear"
    weights = found.second.inputs[0].producer()  # type: ignore[union-attr]
    assert weights is not None
    assert constant(weights.inputs[1]) == pytest.approx(1 / 127)
    assert all(str(n.name).startswith("attn/Attention") for n in of_type(model, "QuantizeLinear"))
    assert 25 < sqnr_db(expected, run(model, **feeds)) < 60


# -- with half -------------------------------------------------------------------------------------------------------


def test_with_half_the_scales_and_the_float_rest_are_half() -> None:
    model, _ = quantized()
    x = normal(3, 5, 16, seed=41)
    in_float = run(model, x=x)
    plan = to_half(model, FP16, {})
    require_well_formed(model)
    assert [k.node for k in plan.kept] == []
    for node in of_type(model, "QuantizeLinear"):
        assert node.inputs[0].dtype == node.inputs[1].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
        assert node.outputs[0].dtype == ir.DataType.INT8
    for node in of_type(model, "DequantizeLinear"):
        assert (node.inputs[0].dtype, node.outputs[0].dtype) == (ir.DataType.INT8, ir.DataType.FLOAT16)  # type: ignore[union-attr]
    assert plan.casts == 2
    got = run(emulate(model), x=x)
    assert sqnr_db(run(network(NET, **WEIGHTS), x=x), got) > 25
    assert sqnr_db(in_float, got) > 30


# -- calibration -----------------------------------------------------------------------------------------------------


def test_an_activation_that_is_always_zero_has_a_scale() -> None:
    text = "net (float[n, 8] x) => (float[n, 8] y) { [a__Sub] z = Sub (x, x) [fc__MatMul] h = MatMul (z, w) "
    model = network(text + "[b__Neg] y = Neg (h) }", w=normal(8, 8))
    plan = everything(model)
    int8_symmetric(model, plan, lambda: [{"x": normal(3, 8)}], open_model)
    assert not run(model, x=normal(2, 8)).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=repr)
def test_an_activation_that_is_not_finite_is_named(bad: float) -> None:
    model = network(NET, **WEIGHTS)
    x = normal(2, 5, 16)
    x[1, 2, 3] = bad
    with pytest.raises(AttnDeployError, match="not finite") as caught:
        int8_symmetric(model, plan_symmetric(model), lambda: [{"x": x}], open_model)
    assert caught.value.where == "x"


def test_calibration_without_a_sample_is_an_error() -> None:
    model = network(NET, **WEIGHTS)
    with pytest.raises(AttnDeployError, match="no sample"):
        int8_symmetric(model, plan_symmetric(model), lambda: [], open_model)


# -- choice ----------------------------------------------------------------------------------------------------------


def statistics_of(values: Array) -> ValueStatistics:
    return ValueStatistics(float(values.min()), float(values.max()), histogram_of(values))


def test_the_loss_of_a_layer_is_the_relative_noise_of_its_tokens() -> None:
    model = network(NET, **WEIGHTS)
    x = np.concatenate([b["x"] for b in batches()])
    found = {"x": statistics_of(x)}
    fc1 = next(n for n in model.graph if n.name == "fc1/MatMul")
    (loss,) = measure_layers(model, [fc1], found, lambda: [{"x": x}], open_model)
    scale = np.abs(WEIGHTS["w1"]).max(axis=0) / 127
    w = np.rint(WEIGHTS["w1"] / scale) * scale
    assert set(loss.noise) == set(INT8.methods)
    for method in loss.noise:
        step = found["x"].limit(method) / 127
        given = np.clip(np.rint(x / step), -128, 127) * step
        exact = x @ WEIGHTS["w1"]
        ratio = ((exact - given @ w) ** 2).sum(-1) / (exact**2).sum(-1)
        assert loss.noise[method] == pytest.approx(float(np.sqrt((ratio**2).mean())), rel=0.02)
    assert choose([loss]) == {"x": min(loss.noise, key=lambda m: loss.noise[m])}


def outlier_batches() -> list[dict[str, Array]]:
    """One number in a thousand tokens is 3000 times the others: no static range serves both."""
    x = normal(40, 5, 16, seed=60)
    x[7, 2, 5] = 3000.0
    return [{"x": x}]


def test_a_layer_that_loses_too_much_stays_float_where_the_promised_share_allows() -> None:
    model = network(SENSITIVE, **SENSITIVE_WEIGHTS)
    plan = int8_symmetric(model, plan_symmetric(model), outlier_batches, open_model)
    reasons = {p.layer: p.reason for p in plan.layers if p.scheme is Scheme.FLOAT}
    assert reasons["small/MatMul"].startswith(str(Exempt.LOSS))
    assert float(reasons["small/MatMul"].split("(")[1].split(" dB")[0]) < LAYER_MIN_SQNR_DB
    assert next(n for n in model.graph if n.name == "small/MatMul").inputs[0].name == "x"  # type: ignore[union-attr]
    large = next(p for p in plan.layers if p.layer == "large/MatMul")
    assert large.scheme is Scheme.STATIC


SENSITIVE = """net (float[batch, 5, 16] x) => (float[batch, 5, 4] y)
<float[batch, 5, 8] s, float[batch, 5, 256] l, float[batch, 5, 256] m>
{
    [small__MatMul] s = MatMul (x, ws)
    [act__Tanh] t = Tanh (s)
    [large__MatMul] l = MatMul (t, wl)
    [act__Tanh_2] u = Tanh (l)
    [wide__MatMul] m = MatMul (u, wm)
    [act__Tanh_3] v = Tanh (m)
    [head__MatMul] y = MatMul (v, wh)
}"""
SENSITIVE_WEIGHTS = {
    "ws": normal(16, 8, seed=1) / 4, "wl": normal(8, 256, seed=2) / 3, "wm": normal(256, 256, seed=3) / 16,
    "wh": normal(256, 4, seed=4) / 16,
}  # fmt: skip


def test_where_the_share_allows_nothing_the_layer_is_int8_all_the_same() -> None:
    model = network(NET, **WEIGHTS)
    plan = int8_symmetric(model, plan_symmetric(model), outlier_batches, open_model)
    assert plan.scheme("fc1/MatMul") is Scheme.STATIC


# -- FP8 -------------------------------------------------------------------------------------------------------------


def test_fp8_stands_between_pairs_of_e4m3() -> None:
    model, plan = quantized(FP8)
    assert plan.of(Scheme.FP8) == ("fc1/MatMul", "fc2/MatMul", "fc3/MatMul")
    for node in of_type(model, "QuantizeLinear") + of_type(model, "DequantizeLinear"):
        zero = constant(node.inputs[2])
        assert zero.dtype == ml_dtypes.float8_e4m3fn
        assert not zero.astype(np.float32).any()
    weight = next(n for n in model.graph if n.name == "fc1/MatMul").inputs[1].producer()  # type: ignore[union-attr]
    assert weight is not None
    values, scale = constant(weight.inputs[0]), constant(weight.inputs[1])
    assert (values.dtype, scale.shape) == (ml_dtypes.float8_e4m3fn, (32,))
    assert (np.abs(values.astype(np.float32)).max(axis=0) == 448).all()


PAIR = """net (float[n] x) => (float[n] y)
<float8e4m3fn[n] q>
{
    [a__Relu] r = Relu (x)
    [q__QuantizeLinear] q = QuantizeLinear (r, s, z)
    [q__DequantizeLinear] y = DequantizeLinear (q, s, z)
}"""


def test_emulated_fp8_rounds_as_e4m3_does() -> None:
    """Every float16 between the ends of E4M3 and beyond them, which the largest value stands for. ONNX Runtime 1.32
    runs the pair without its Relu; should that change, what is written out here can be the pair itself."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    x = every[np.isfinite(every)]
    model = network(PAIR, s=np.array(0.5, np.float32), z=FP8.zero_point())
    expected = np.clip(np.maximum(x, 0) / 0.5, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * 0.5
    assert np.array_equal(run(emulate(model), x=x), expected)


def test_fp8_with_half_is_close_to_float32_and_has_room_for_outliers() -> None:
    """Where one token is 3000 times the others: a range that leaves INT8 nothing of them."""
    x = outlier_batches()[0]["x"]
    expected = run(network(NET, **WEIGHTS), x=x)
    others = np.arange(len(x)) != 7
    found = {}
    for form in (INT8, FP8):
        model = network(NET, **WEIGHTS)
        plan = plan_symmetric(model, form=form)
        int8_symmetric(model, plan, outlier_batches, open_model, method=RangeMethod.MIN_MAX, settled=True)
        to_half(model, FP16, {})
        require_well_formed(model)
        found[form] = sqnr_db(expected[others], run(emulate(model), x=x)[others])
    assert found[FP8] > 20
    assert found[FP8] > found[INT8] + 10


def test_a_scale_in_fp8_is_one_that_fp16_holds_whole() -> None:
    levels, scale = FP8.quantize_weight(normal(64, 4, seed=1) * np.array([1e-6, 1e-4, 1.0, 100.0], np.float32), axis=1)
    assert (scale >= np.finfo(np.float16).tiny).all()
    weight = levels.astype(np.float32) * scale
    assert sqnr_db(normal(64, 4, seed=1)[:, 1], weight[:, 1] / 1e-4) > 28
    assert sqnr_db(normal(64, 4, seed=1)[:, 3], weight[:, 3] / 100) > 28


CONVOLUTIONS = {
    "plain": ((32, 16, 3, 3), 1, True),
    "depthwise": ((32, 1, 3, 3), 32, False),
    "three channels in": ((32, 3, 3, 3), 1, False),
    "ten channels out": ((10, 16, 1, 1), 1, False),
    "a large kernel": ((32, 16, 7, 7), 1, False),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_without_an_fp8_kernel_stay_float(case: str) -> None:
    shape, group, there = CONVOLUTIONS[case]
    channels = shape[1] * group
    text = (
        f"net (float[b, {channels}, 9, 9] x) => (float[b, {shape[0]}, p, q] y) "
        f"{{ [c__Conv] h = Conv <group: int = {group}> (x, w) [n__Neg] y = Neg (h) }}"
    )
    model = network(text, w=normal(*shape))
    assert has_fp8_kernel(model.graph[0]) == there
    asked = PrecisionPlan((LayerPlan("c/Conv", Scheme.STATIC),))
    (planned,) = in_format(asked, model, FP8).layers
    assert planned.scheme is (Scheme.FP8 if there else Scheme.FLOAT)
    assert planned.reason == ("" if there else Exempt.NO_FP8)


# -- a plan that is given ---------------------------------------------------------------------------------------------


def test_a_plan_of_the_cpu_is_one_of_this_target() -> None:
    layers = (LayerPlan("fc1/MatMul", Scheme.PER_TOKEN), LayerPlan("fc2/MatMul", Scheme.FLOAT32, "mine"),
              LayerPlan("gone/MatMul", Scheme.PER_TOKEN))  # fmt: skip
    plan = in_format(PrecisionPlan(layers, smoothing={"norm": 0.5}), network(NET, **WEIGHTS), INT8)
    assert plan.layers == (LayerPlan("fc1/MatMul", Scheme.STATIC), LayerPlan("fc2/MatMul", Scheme.FLOAT32, "mine"))
    assert plan.smoothing == {"norm": 0.5}


def test_a_settled_plan_is_kept_whatever_its_layers_lose() -> None:
    model = network(SENSITIVE, **SENSITIVE_WEIGHTS)
    asked = plan_symmetric(model)
    assert int8_symmetric(model, asked, outlier_batches, open_model, settled=True) == asked


def test_a_layer_in_int8_and_one_in_fp8_may_read_the_same_value() -> None:
    model = network(NET, **WEIGHTS)
    layers = (LayerPlan("fc2/MatMul", Scheme.STATIC), LayerPlan("fc3/MatMul", Scheme.FP8))
    int8_symmetric(model, PrecisionPlan(layers), batches, open_model)
    require_well_formed(model)
    pairs = of_type(model, "QuantizeLinear")
    assert [n.inputs[0].name for n in pairs] == ["g", "g"]  # type: ignore[union-attr]
    assert {n.outputs[0].dtype for n in pairs} == {INT8.dtype, FP8.dtype}


def test_statistics_that_are_there_are_not_collected_again() -> None:
    model = network(NET, **WEIGHTS)
    known = collect_statistics(model, [Wanted("x", histogram=True)], batches(), open_model)
    wide = Statistics(known.model, values={"x": ValueStatistics(-1000.0, 1000.0, known.values["x"].histogram)})
    plan = PrecisionPlan((LayerPlan("fc1/MatMul", Scheme.STATIC),))
    int8_symmetric(model, plan, batches, open_model, method=RangeMethod.MIN_MAX, statistics=wide, settled=True)
    (node,) = of_type(model, "QuantizeLinear")
    assert constant(node.inputs[1]) == pytest.approx(1000 / 127)
