"""INT8 for GPUs: signed symmetric pairs, their ranges, where they stand, and their numbers on the CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.int8_symmetric import (
    LAYER_MIN_SQNR_DB,
    attention_products,
    int8_symmetric,
    plan_symmetric,
)
from attn_deploy.export.precision.plan import Exempt, PrecisionPlan, Scheme, plan_int8
from attn_deploy.export.precision.symmetric_choice import choose, measure_layers
from attn_deploy.export.precision.symmetric_ranges import (
    BINS,
    Histogram,
    RangeMethod,
    collect_histograms,
    collect_largest,
)
from attn_deploy.parity import sqnr_db

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


def quantized(**options: object) -> tuple[ir.Model, PrecisionPlan]:
    model = network(NET, **WEIGHTS)
    plan = int8_symmetric(model, plan_symmetric(model), batches, open_model, **options)  # type: ignore[arg-type]
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
    int8_symmetric(model, plan, lambda: [{"x": x}], open_model, method=RangeMethod.MAX)
    dequantize = next(n for n in of_type(model, "DequantizeLinear") if n.inputs[0].is_initializer())  # type: ignore[union-attr]
    assert dequantize.attributes["axis"].as_int() == axis
    got = run(model, x=x)
    channel = 1 if "Conv" in case else -1
    for number in range(4):
        assert sqnr_db(np.take(expected, number, channel), np.take(got, number, channel)) > 30


def everything(model: ir.Model) -> PrecisionPlan:
    """Every layer, the exempt ones too."""
    layers = plan_int8(model).layers
    return PrecisionPlan(tuple(replace(p, scheme=Scheme.STATIC_PER_TENSOR, reason="") for p in layers))


def test_the_plan_has_the_exemptions_of_int8_on_the_cpu() -> None:
    model = network(NET, **WEIGHTS)
    plan, on_cpu = plan_symmetric(model, ["fc3"]), plan_int8(model, ["fc3"])
    assert plan.exempt == on_cpu.exempt
    assert {p.scheme for p in plan.layers} == {Scheme.FLOAT, Scheme.STATIC_PER_TENSOR}


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


# -- ranges ----------------------------------------------------------------------------------------------------------


def test_a_histogram_is_that_of_numpy_over_all_batches() -> None:
    model = network(NET, **WEIGHTS)
    largest = collect_largest(model, ["x", "g"], batches(), open_model)
    found = collect_histograms(model, largest, batches(), open_model)
    x = np.abs(np.concatenate([b["x"] for b in batches()])).ravel()
    counts, _ = np.histogram(x, BINS, (0, x.max()))
    assert found["x"].largest == x.max()
    assert found["x"].counts.sum() == x.size
    assert np.abs(np.cumsum(found["x"].counts) - np.cumsum(counts)).max() <= 2  # rounding at the edges of bins
    zeros = sum((open_model(_showing(model, "g"))(b)["g"] == 0).sum() for b in batches())
    assert found["g"].counts[0] >= zeros > 100


def _showing(model: ir.Model, name: str) -> ir.Model:
    copy = model.clone()
    value = next(o for n in copy.graph for o in n.outputs if o.name == name)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None, None])
    copy.graph.outputs.append(value)
    return copy


def histogram(values: Array) -> Histogram:
    largest = float(np.abs(values).max())
    return Histogram(np.histogram(np.abs(values), BINS, (0, largest))[0], largest)


def error(values: Array, limit: float) -> float:
    scale = limit / 127
    return float(np.mean((values - scale * np.clip(np.rint(values / scale), -127, 127)) ** 2))


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uniform", "an outlier"])
def test_the_least_squared_error_is_less_than_at_any_other_limit(kind: str) -> None:
    rng = np.random.default_rng(0)
    values = {
        "normal": rng.standard_normal(20000),
        "heavy tails": rng.standard_t(3, 20000),
        "uniform": rng.uniform(-1, 1, 20000),
        "an outlier": np.append(rng.standard_normal(20000), 12.0),
    }[kind].astype(np.float32)
    found = histogram(values)
    limit = found.limit(RangeMethod.MSE)
    others = [error(values, share * found.largest) for share in np.linspace(0.125, 1, 30)]
    assert error(values, limit) <= 1.03 * min(others)
    assert (limit > 0.98 * found.largest) == (kind == "uniform")
    assert found.limit(RangeMethod.MAX) == found.largest


def test_a_percentile_leaves_out_the_rarest_values() -> None:
    values = np.append(np.linspace(0, 1, 99_999), 4.0)
    assert histogram(values).limit(RangeMethod.PERCENTILE) == pytest.approx(1.0, abs=4 / BINS)


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


def test_the_loss_of_a_layer_is_the_relative_noise_of_its_tokens() -> None:
    model = network(NET, **WEIGHTS)
    x = np.concatenate([b["x"] for b in batches()])
    found = {"x": histogram(x)}
    fc1 = next(n for n in model.graph if n.name == "fc1/MatMul")
    (loss,) = measure_layers(model, [fc1], found, lambda: [{"x": x}], open_model)
    scale = np.abs(WEIGHTS["w1"]).max(axis=0) / 127
    w = np.rint(WEIGHTS["w1"] / scale) * scale
    for method in RangeMethod:
        step = found["x"].limit(method) / 127
        given = np.clip(np.rint(x / step), -128, 127) * step
        exact = x @ WEIGHTS["w1"]
        ratio = ((exact - given @ w) ** 2).sum(-1) / (exact**2).sum(-1)
        assert loss.noise[method] == pytest.approx(float(np.sqrt((ratio**2).mean())), rel=0.02)
    assert choose([loss]) == {"x": min(RangeMethod, key=lambda m: loss.noise[m])}


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
    assert large.scheme is Scheme.STATIC_PER_TENSOR


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
    assert plan.scheme("fc1/MatMul") is Scheme.STATIC_PER_TENSOR
