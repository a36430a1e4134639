"""SmoothQuant: the same function, equation 4, what is left alone, and which strength is chosen."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.smooth_quant import (
    smooth,
    smoothable_norms,
    smoothing_factors,
    wanted_for_smoothing,
)
from attn_deploy.export.precision.smoothing_choice import choose_strengths, strength_losses
from attn_deploy.export.precision.statistics import Statistics, collect_statistics
from attn_deploy.parity import sqnr_db

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import Array, network, normal, open_model, run

BLOCK = """net (float[batch, 5, 16] x) => (float[batch, 5, 8] y)
<float[batch, 5, 16] n, float[batch, 5, 8] q, float[batch, 5, 8] k, float[batch, 5, 8] s,
 float[batch, 5, 8] m, float[batch, 5, 8] f>
{
    [norm1__LayerNormalization] n = LayerNormalization <axis: int = -1> (x, scale1, bias1)
    [q__MatMul] q = MatMul (n, wq)
    [k__MatMul] k = MatMul (n, wk)
    [sum__Mul] s = Mul (q, k)
    [norm2__LayerNormalization] m = LayerNormalization <axis: int = -1> (s, scale2)
    [fc__MatMul] f = MatMul (m, wf)
    [res__Add] y = Add (s, f)
}"""


def weights() -> dict[str, Array]:
    """Two channels of the first norm are far larger than the others."""
    scale = np.ones(16, np.float32)
    scale[[3, 11]] = 40.0
    return {
        "scale1": scale, "bias1": normal(16, seed=1), "wq": normal(16, 8, seed=2) / 4, "wk": normal(16, 8, seed=3) / 4,
        "scale2": 1 + normal(8, seed=4) / 4, "wf": normal(8, 8, seed=5) / 3,
    }  # fmt: skip


def block() -> ir.Model:
    return network(BLOCK, **weights())


def batches() -> list[dict[str, Array]]:
    return [{"x": normal(4, 5, 16, seed=s)} for s in (30, 31)]


def statistics(model: ir.Model) -> Statistics:
    return collect_statistics(model, wanted_for_smoothing(model), batches(), open_model)


def initializer(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


# -- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.15, 0.5, 1.0])
def test_the_model_computes_what_it_did(strength: float) -> None:
    model = block()
    smooth(model, {"norm1/LayerNormalization": strength, "norm2/LayerNormalization": strength}, statistics(model))
    x = normal(3, 5, 16, seed=9)
    assert sqnr_db(run(block(), x=x), run(model, x=x)) > 110


def test_the_norm_is_divided_by_what_its_readers_are_multiplied_with() -> None:
    model, known = block(), statistics(block())
    smooth(model, {"norm1/LayerNormalization": 0.5}, known)
    was = weights()
    largest = known.values["n"].channel_largest()
    widest = np.maximum(np.abs(was["wq"]).max(1), np.abs(was["wk"]).max(1))
    factors = np.sqrt(largest / widest)
    norm = node_of(model, "norm1/LayerNormalization")
    np.testing.assert_allclose(initializer(norm, 1), was["scale1"] / factors, rtol=1e-6)
    np.testing.assert_allclose(initializer(norm, 2), was["bias1"] / factors, rtol=1e-6)
    np.testing.assert_allclose(initializer(node_of(model, "k/MatMul"), 1), was["wk"] * factors[:, None], rtol=1e-6)
    assert "wk" not in model.graph.initializers


def test_at_strength_one_every_channel_reaches_as_far() -> None:
    model = block()
    smooth(model, {"norm1/LayerNormalization": 1.0}, statistics(model))
    norm = node_of(model, "norm1/LayerNormalization")
    again = collect_statistics(model, wanted_for_smoothing(model), batches(), open_model)
    np.testing.assert_allclose(again.values[str(norm.outputs[0].name)].channel_largest(), 1.0, rtol=1e-5)


def test_what_changed_has_another_name() -> None:
    model = block()
    smooth(model, {"norm1/LayerNormalization": 0.5}, statistics(model))
    assert [str(n.outputs[0].name) for n in model.graph][:2] == ["n/smoothed", "q"]


def test_weights_that_something_else_uses_stay_as_they_are() -> None:
    shared = BLOCK.replace("MatMul (n, wk)", "MatMul (x, wq)")
    model = network(shared, **weights())
    smooth(model, {"norm1/LayerNormalization": 0.5}, statistics(model))
    x = normal(3, 5, 16, seed=9)
    assert sqnr_db(run(network(shared, **weights()), x=x), run(model, x=x)) > 110
    np.testing.assert_array_equal(initializer(node_of(model, "k/MatMul"), 1), weights()["wq"])


def test_a_gemm_with_a_transposed_weight_is_read_along_its_input_axis() -> None:
    text = """net (float[batch, 16] x) => (float[batch, 8] y) <float[batch, 16] n>
    {
        [norm__LayerNormalization] n = LayerNormalization (x, scale, bias)
        [fc__Gemm] y = Gemm <transB: int = 1> (n, w, b)
    }"""
    given = {"scale": weights()["scale1"], "bias": normal(16), "w": normal(8, 16, seed=2), "b": normal(8, seed=3)}
    model = network(text, **given)
    feeds = [{"x": normal(40, 16)}]
    smooth(model, {"norm/LayerNormalization": 0.5},
           collect_statistics(model, wanted_for_smoothing(model), feeds, open_model))  # fmt: skip
    x = normal(3, 16, seed=9)
    assert sqnr_db(run(network(text, **given), x=x), run(model, x=x)) > 110
    assert np.ptp(np.log(np.abs(initializer(node_of(model, "fc/Gemm"), 1)).max(0))) > 1


# -- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    ["Mul (n, scale1)", "MatMul (n, x)", "MatMul (x, n)", "Softmax (n)"],
    ids=["scale", "two", "weight", "other"],
)
def test_a_norm_that_is_read_by_anything_but_linear_layers_is_left_alone(layer: str) -> None:
    text = BLOCK.replace("[q__MatMul]", f"[other__Op] o = {layer}\n    [q__MatMul]")
    assert [norm.name for norm in smoothable_norms(network(text, **weights()))] == ["norm2/LayerNormalization"]


def test_a_norm_whose_scale_is_computed_is_left_alone() -> None:
    text = BLOCK.replace("(x, scale1, bias1)", "(x, computed, bias1)").replace(
        "{\n", "{\n    [abs__Abs] computed = Abs (scale1)\n", 1
    )
    assert [norm.name for norm in smoothable_norms(network(text, **weights()))] == ["norm2/LayerNormalization"]


def test_post_norm_has_nowhere_to_put_the_division() -> None:
    text = BLOCK.replace("Add (s, f)", "Add (m, f)")
    assert [norm.name for norm in smoothable_norms(network(text, **weights()))] == ["norm1/LayerNormalization"]


def test_a_norm_that_is_an_output_is_left_alone() -> None:
    text = BLOCK.replace("(float[batch, 5, 8] y)", "(float[batch, 5, 8] y, float[batch, 5, 16] n)").replace(
        "<float[batch, 5, 16] n, ", "<"
    )
    assert [norm.name for norm in smoothable_norms(network(text, **weights()))] == ["norm2/LayerNormalization"]


def test_a_model_without_norms_is_left_alone() -> None:
    model = network("net (float[n, 4] x) => (float[n, 4] y) { [a__MatMul] y = MatMul (x, w) }", w=normal(4, 4))
    assert wanted_for_smoothing(model) == []
    assert smooth(model, {}, Statistics()) == ()
    assert choose_strengths(model, None, Statistics(), batches, open_model) == {}


def test_a_channel_that_is_always_zero_is_left_alone_and_said() -> None:
    given = weights()
    given["scale1"][5] = given["bias1"][5] = 0.0
    model = network(BLOCK, **given)
    notes = smooth(model, {"norm1/LayerNormalization": 0.5}, statistics(model))
    assert notes == ("1 channel is always zero on the calibration data: norm1/LayerNormalization (5)",)
    np.testing.assert_array_equal(initializer(node_of(model, "q/MatMul"), 1)[5], given["wq"][5])
    x = normal(3, 5, 16, seed=9)
    assert sqnr_db(run(network(BLOCK, **given), x=x), run(model, x=x)) > 110


def test_a_channel_that_no_weight_reads_is_left_alone() -> None:
    given = weights()
    given["wq"][2] = given["wk"][2] = 0.0
    model = network(BLOCK, **given)
    (norm, _) = smoothable_norms(model)
    assert smoothing_factors(norm, np.full(16, 2.0, np.float32), 0.5)[2] == 1.0


@pytest.mark.parametrize("name", ["norm3/LayerNormalization", "q/MatMul"])
def test_a_plan_that_names_no_norm_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no norm") as caught:
        smooth(block(), {name: 0.5}, statistics(block()))
    assert caught.value.got == name
    assert "norm1/LayerNormalization" in str(caught.value.expected)


def test_statistics_without_the_norm_are_refused() -> None:
    with pytest.raises(UsageError, match="do not hold") as caught:
        smooth(block(), {"norm1/LayerNormalization": 0.5}, Statistics())
    assert caught.value.where == "norm1/LayerNormalization"


# -- choice ----------------------------------------------------------------------------------------------------------


def int8(x: Array, w: Array) -> Array:
    """Rows asymmetric in 256 levels, columns symmetric in 127 on each side."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    columns = np.abs(w).max(0) / 127
    rows = (np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale
    return np.asarray(rows @ (np.rint(w / columns) * columns))


def test_the_loss_is_that_of_the_readers_in_int8() -> None:
    model, known = block(), statistics(block())
    losses = strength_losses(model, ["q/MatMul", "k/MatMul"], known, batches, open_model, [0.5])
    assert list(losses) == ["norm1/LayerNormalization"]
    was = weights()
    (norm, _) = smoothable_norms(model)
    factors = smoothing_factors(norm, known.values["n"].channel_largest(), 0.5).astype(np.float64)
    x = np.concatenate([b["x"] for b in batches()]).astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    n = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * was["scale1"] + was["bias1"]
    for strength, divisor in ((None, np.ones(16)), (0.5, factors)):
        expected = 0.0
        for w in (was["wq"], was["wk"]):
            noise = n @ w - int8(n / divisor, w * divisor[:, None])
            expected += float(((noise**2).sum(-1) / ((n @ w) ** 2).sum(-1)).mean())
        assert losses["norm1/LayerNormalization"][strength] == pytest.approx(expected, rel=0.05)


def test_the_strength_that_loses_least_is_chosen_and_none_where_it_gains_nothing() -> None:
    model = block()
    chosen = choose_strengths(model, None, statistics(model), batches, open_model)
    losses = strength_losses(model, None, statistics(model), batches, open_model)
    assert "norm1/LayerNormalization" in chosen
    for norm, noise in losses.items():
        best = min(noise, key=lambda s: noise[s])
        assert chosen.get(norm) == best or (norm not in chosen and noise[best] > 0.9 * noise[None])
