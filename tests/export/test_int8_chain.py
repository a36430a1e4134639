"""Chains of convolutions in 8-bit maps: nothing is in floating point between two maps, and the model is kept."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
import pytest

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cpu_int8_chain import KERNELS, chain_layers, lower_chain
from attn_deploy.export.lower.onnxruntime_cpu import lower
from attn_deploy.export.precision.collected import ValueStatistics
from attn_deploy.export.precision.int8_chain import read_by_convolutions, wanted_for_chain
from attn_deploy.export.precision.map_means import channel_means_of, rounding_shift
from attn_deploy.export.precision.map_scales import MapScale, map_scale
from attn_deploy.export.precision.plan import Exempt, plan_int8
from attn_deploy.export.precision.statistics import collect_statistics
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

import half_models
from half_models import normal, open_model, run

Array = np.ndarray[Any, Any]

CHAIN_DB = 30.0
"""A dozen convolutions on maps: 33 to 38 dB were measured."""


def network(text: str, **weights: Array) -> ir.Model:
    """With the shapes that a captured model has: inferred from the bodies, since schemas that an export has registered
    would keep ONNX from looking into them."""
    model = half_models.network(text, **weights)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(written_out(model)), strict_mode=True)
    found = {str(o.name): o for node in ir.from_proto(proto).graph for o in node.outputs}
    for output in (o for node in model.graph for o in node.outputs):
        output.type, output.shape = found[str(output.name)].type, found[str(output.name)].shape
    return model


def conv(name: str, x: str, y: str, *, stride: int = 1, size: int = 3, group: int = 1) -> str:
    pad = size // 2
    return (
        f"[{name}__Conv] {y} = Conv <kernel_shape: ints = [{size}, {size}], strides: ints = [{stride}, {stride}], "
        f"pads: ints = [{pad}, {pad}, {pad}, {pad}], group: int = {group}> ({x}, {name}_w, {name}_b)"
    )


def weights(*layers: tuple[str, int, int, int]) -> dict[str, Array]:
    """(name, out, in, size) of each layer: a weight that keeps the variance, one channel of it far larger; a bias."""
    made: dict[str, Array] = {}
    for seed, (name, out, inputs, size) in enumerate(layers):
        weight = normal(out, inputs, size, size, seed=2 * seed) * np.float32(np.sqrt(2.0 / (inputs * size * size)))
        weight[seed % out] *= 4.0
        made |= {f"{name}_w": weight, f"{name}_b": 0.3 * normal(out, seed=2 * seed + 1)}
    return made


GATE = (
    "[{0}__ChannelPoolMean] {0}_m = attn_deploy.ChannelPoolMean ({1}) "
    + conv("{0}_fc1", "{0}_m", "{0}_h", size=1)
    + "[{0}__Relu] {0}_r = Relu ({0}_h) "
    + conv("{0}_fc2", "{0}_r", "{0}_l", size=1)
    + "[{0}__Sigmoid] {0}_g = Sigmoid ({0}_l) "
)
HEAD = (
    "[pool__GlobalAveragePool] mean = GlobalAveragePool ({0}) [flat__Flatten] flat = Flatten <axis: int = 1> (mean) "
    "[fc__Gemm] y = Gemm <transB: int = 1> (flat, fc_w)"
)


def residual_network() -> ir.Model:
    """Stem, MaxPool, a gated residual block with ReLU, one with an averaged shortcut."""
    text = (
        "net (float[n, 3, 32, 32] x) => (float[n, 10] y) { "
        + conv("stem", "x", "s", stride=2)
        + "[act__Relu] t = Relu (s) "
        "[max__MaxPool] u = MaxPool <kernel_shape: ints = [3, 3], strides: ints = [2, 2], pads: ints = [1, 1, 1, 1]> "
        "(t) "
        + conv("a1", "u", "a")
        + "[a__Relu] b = Relu (a) "
        + conv("a2", "b", "c")
        + GATE.format("se", "c")
        + "[se__GateResidualRelu] d = attn_deploy.GateResidualRelu (c, se_g, u) "
        + conv("b1", "d", "e", stride=2)
        + "[b__Relu] h = Relu (e) "
        + conv("b2", "h", "i")
        + "[avg__AveragePool] j = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (d) "
        + conv("b3", "j", "k", size=1)
        + "[b__Add] o = Add (i, k) [c__Relu] q = Relu (o) "
        + HEAD.format("q")
        + " }"
    )
    layers = [("stem", 16, 3, 3), ("a1", 16, 16, 3), ("a2", 16, 16, 3), ("se_fc1", 4, 16, 1), ("se_fc2", 16, 4, 1),
              ("b1", 24, 16, 3), ("b2", 24, 24, 3), ("b3", 24, 16, 1)]  # fmt: skip
    return network(text, fc_w=normal(10, 24, seed=90) * np.float32(0.2), **weights(*layers))


def mobile_network(act: str = "HardSwish") -> ir.Model:
    """Stem, an inverted residual with a gate, one that keeps the size."""

    def activated(name: str, x: str, y: str) -> str:
        if act == "Silu":
            return f"[{name}__Sigmoid] {y}_s = Sigmoid ({x}) [{name}__Mul] {y} = Mul ({x}, {y}_s) "
        return f"[{name}__{act}] {y} = {act} ({x}) "

    text = (
        "net (float[n, 3, 24, 24] x) => (float[n, 10] y) { "
        + conv("stem", "x", "a0", stride=2)
        + activated("stem_act", "a0", "a")
        + conv("e1", "a", "b0", size=1)
        + activated("e1_act", "b0", "b")
        + conv("d1", "b", "c0", size=5, group=32)
        + activated("d1_act", "c0", "c")
        + GATE.format("se", "c")
        + "[se__Gate] d = attn_deploy.Gate (c, se_g) "
        + conv("p1", "d", "e", size=1)
        + conv("e2", "e", "f0", size=1)
        + activated("e2_act", "f0", "f")
        + conv("d2", "f", "g0", group=48)
        + activated("d2_act", "g0", "g")
        + conv("p2", "g", "h", size=1)
        + "[b__Add] i = Add (h, e) "
        + conv("top", "i", "j0", size=1)
        + activated("top_act", "j0", "j")
        + HEAD.format("j")
        + " }"
    )
    layers = [("stem", 8, 3, 3), ("e1", 32, 8, 1), ("d1", 32, 1, 5), ("se_fc1", 8, 32, 1), ("se_fc2", 32, 8, 1),
              ("p1", 12, 32, 1), ("e2", 48, 12, 1), ("d2", 48, 1, 3), ("p2", 12, 48, 1),
              ("top", 64, 12, 1)]  # fmt: skip
    return network(text, fc_w=normal(10, 64, seed=90) * np.float32(0.2), **weights(*layers))


def written_out(model: ir.Model) -> ir.Model:
    copy = model.clone()
    inline_functions(copy)
    return copy


def samples(model: ir.Model, seed: int, count: int = 8) -> Array:
    _, *dims = (d if isinstance(d, int) else 0 for d in model.graph.inputs[0].shape or ())
    return normal(count, *dims, seed=seed)


def lowered(model: ir.Model, layers: frozenset[str], *, corrected: bool = True) -> ir.Model:
    made, batches = model.clone(), [{"x": samples(model, 101)}, {"x": samples(model, 102)}]
    statistics = collect_statistics(written_out(model), wanted_for_chain(made, layers), batches, open_model)
    means = channel_means_of(written_out(model), read_by_convolutions(made, layers), lambda: batches, open_model)
    lower_chain(made, layers, statistics, means if corrected else None)
    return made


def convolutions(model: ir.Model) -> frozenset[str]:
    """All but those of gates."""
    return frozenset(str(n.name) for n in model.graph if n.op_type == "Conv" and "_fc" not in str(n.inputs[1].name))


def operators(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


CASES = {
    "residual": residual_network,
    "Hardswish": mobile_network,
    "Silu": lambda: mobile_network("Silu"),
    "Relu": lambda: mobile_network("Relu"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_float_map_is_left_and_the_model_is_kept(case: str) -> None:
    model = CASES[case]()
    made = lowered(model, convolutions(model))
    found = operators(made)
    assert found["QuantizeLinear"] == 1  # the image
    assert found["DequantizeLinear"] == 0
    assert found["Conv"] == 2  # in the gate
    assert not found.keys() & {"Gate", "GateResidualRelu", "ChannelPoolMean", "Add", "HardSwish", "AveragePool", "Mul"}
    assert found["QuantizedChannelPool"] == 2
    x = samples(model, 7)
    assert sqnr_db(run(written_out(model), x=x), run(written_out(made), x=x)) > CHAIN_DB


def test_names_start_with_those_of_the_nodes_that_they_stand_for() -> None:
    model = residual_network()
    names = {str(n.name) for n in model.graph}
    made = lowered(model, convolutions(model))
    for node in made.graph:
        stands_for = str(node.name).replace("/input/", "/").replace("/output/", "/")  # where a map begins or ends
        assert stands_for in names or any(stands_for.startswith(f"{name}/") for name in names), node.name


def test_what_reads_a_map_in_floating_point_gets_it_once() -> None:
    model = residual_network()
    values = {str(o.name): o for n in model.graph for o in n.outputs}
    for number in (1, 2):  # two more readers, one of them of an output of the model
        extra = ir.node("Tanh", [values["q"]], name=f"extra.{number}/Tanh")
        extra.outputs[0].name, extra.outputs[0].type = f"extra_{number}", ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(extra)
        model.graph.outputs.append(extra.outputs[0])
    made = lowered(model, convolutions(model))
    assert operators(made)["DequantizeLinear"] == 1
    x = {"x": samples(model, 7)}
    expected, got = open_model(written_out(model))(x), open_model(written_out(made))(x)
    for name in expected:
        assert sqnr_db(expected[name], got[name]) > 25.0, name


def test_layers_that_stay_in_floating_point_are_an_island() -> None:
    model = residual_network()
    made = lowered(model, convolutions(model) - {"a2/Conv"})
    assert operators(made)["Conv"] == 3
    assert operators(made)["QuantizeLinear"] == 3  # the image; what the gate writes, and its average
    x = samples(model, 7)
    assert sqnr_db(run(written_out(model), x=x), run(written_out(made), x=x)) > CHAIN_DB


def test_biases_take_back_what_rounded_weights_add() -> None:
    model = residual_network()
    x = samples(model, 7)
    expected = run(written_out(model), x=x)
    with_means, without = (
        run(written_out(lowered(model, convolutions(model), corrected=corrected)), x=x) for corrected in (True, False)
    )
    assert sqnr_db(expected, with_means) > sqnr_db(expected, without) + 1.0


def test_the_stem_and_depthwise_convolutions_join_the_chain_around_them() -> None:
    model = mobile_network()
    reasons = {"stem/Conv": Exempt.STEM, "d1/Conv": Exempt.DEPTHWISE, "d2/Conv": Exempt.DEPTHWISE}
    layers = [
        LayerPlan(p.layer, Scheme.FLOAT, reasons[p.layer]) if p.layer in reasons else p for p in plan_int8(model).layers
    ]
    assert chain_layers(model, PrecisionPlan(tuple(layers)), KERNELS) == convolutions(model)


@pytest.mark.parametrize("kernels", [KERNELS, frozenset()], ids=["kernels", "no kernels"])
def test_lowering_makes_a_chain_where_the_kernels_are(kernels: frozenset[str]) -> None:
    model = residual_network()
    canonical = CanonicalModel(model, (), (), (), {})
    batches = [{"x": samples(model, 101)}]
    made = lower(canonical, Precision.INT8, native=kernels, calibration=lambda: batches, open_model=open_model)
    assert made.library == bool(kernels)
    assert bool(operators(made.model).keys() & KERNELS) == bool(kernels)
    assert made.plan.scheme("a1/Conv") is Scheme.STATIC
    x = samples(model, 7)
    assert sqnr_db(run(written_out(model), x=x), run(written_out(made.model), x=x)) > 20.0


def test_what_is_left_out_for_another_reason_stays_out() -> None:
    model = mobile_network()
    plan = plan_int8(model, exclude=["d2"])
    assert chain_layers(model, plan, KERNELS) == convolutions(model) - {"d2/Conv"}


def test_what_is_left_out_far_from_the_chain_stays_out() -> None:
    """A plan that has one part of the model in 8 bits, as a search tries it."""
    model = mobile_network()
    asked = {"p1/Conv", "e2/Conv", "p2/Conv", "top/Conv"}
    layers = [
        LayerPlan(p.layer, Scheme.STATIC if p.layer in asked else Scheme.FLOAT, p.reason)
        for p in plan_int8(model).layers
    ]
    found = chain_layers(model, PrecisionPlan(tuple(layers)), KERNELS)
    assert found >= asked
    assert "e1/Conv" not in found
    assert "stem/Conv" not in found


@pytest.mark.parametrize("missing", ["QuantizedConv", "QuantizedGate", "QuantizedChannelPool"])
def test_without_one_of_the_kernels_there_is_no_chain(missing: str) -> None:
    model = residual_network()
    assert chain_layers(model, plan_int8(model), KERNELS - {missing}) == frozenset()


def test_convolutions_in_groups_are_left_to_onnx_runtime() -> None:
    """Nearly all of the work would stay outside."""
    text = "net (float[n, 16, 8, 8] x) => (float[n, 16, 8, 8] y) { "
    for number in range(5):
        text += conv(f"c{number}", "x" if number == 0 else f"v{number}", f"w{number}", group=2)
        text += f"[r{number}__Relu] {'y' if number == 4 else f'v{number + 1}'} = Relu (w{number}) "
    model = network(text + "}", **weights(*((f"c{n}", 16, 8, 3) for n in range(5))))
    assert chain_layers(model, plan_int8(model), KERNELS) == frozenset()


# -- scales -----------------------------------------------------------------------------------------------------------


def statistics_of(low: list[float], high: list[float]) -> ValueStatistics:
    return ValueStatistics(
        min(low), max(high), channel_low=np.array(low, np.float32), channel_high=np.array(high, np.float32)
    )


def test_one_scale_spans_the_whole_range() -> None:
    scale = map_scale(statistics_of([0.0, -1.0], [4.1, 0.5]), 0.0)
    assert scale.scale == pytest.approx([5.1 / 255])
    assert scale.zero == 50


def test_every_channel_has_all_levels_where_they_are_read_by_themselves() -> None:
    scale = map_scale(statistics_of([0.0, 0.0], [1.0, 8.0]), 1.0)
    assert scale == MapScale(pytest.approx(np.array([1.0, 8.0]) / 255), 0)


def test_the_shared_zero_point_clips_no_channel() -> None:
    low, high = [-0.3, -0.3, -2.0, 0.0], [1.0, 6.0, 2.0, 3.0]
    scale = map_scale(statistics_of(low, high), 1.0)
    assert (-scale.zero * scale.scale <= np.array(low) + 1e-6).all()
    assert ((255 - scale.zero) * scale.scale >= np.array(high) - 1e-6).all()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_channels_that_are_always_zero_have_a_scale(strength: float) -> None:
    for low, high in (([0.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, 2.0]), ([-1.0, 0.0], [0.0, 0.0])):
        scale = map_scale(statistics_of(low, high), strength)
        assert (scale.scale > 0).all()
        assert np.isfinite(scale.scale).all()
        assert 0 <= scale.zero <= 255


def test_the_shift_of_rounded_weights_is_that_of_the_mean() -> None:
    weight, mean = normal(5, 3, 3, 3), np.array([1.0, -2.0, 0.5])
    rounded = weight + 0.01
    x = np.broadcast_to(mean, (4, 3)).astype(np.float64)  # any patch of a map that is its mean everywhere
    expected = (np.einsum("bc,oc->bo", x, (rounded - weight).astype(np.float64).sum(axis=(2, 3)))).mean(axis=0)
    np.testing.assert_allclose(rounding_shift(weight, rounded, mean), expected)
    depthwise = normal(3, 1, 3, 3)
    np.testing.assert_allclose(rounding_shift(depthwise, depthwise + 0.5, mean), 4.5 * mean, rtol=1e-5)
