"""Cross-layer equalization: the same function, alike channels, and where it stops."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.equalize import GREATEST_FACTOR, chains, equalize, wanted_for_equalization
from attn_deploy.export.precision.int8_conv import quantize_convs, values_to_calibrate
from attn_deploy.export.precision.plan import weighted_nodes
from attn_deploy.export.precision.statistics import Statistics, Wanted, collect_statistics
from attn_deploy.parity import sqnr_db

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import Array, network, normal, open_model, run

BLOCK = """net (float[batch, 3, 8, 8] x) => (float[batch, 4, 8, 8] y)
<float[batch, 8, 8, 8] a, float[batch, 8, 8, 8] ra, float[batch, 8, 8, 8] d, float[batch, 8, 8, 8] rd,
 float[batch, 8, 1, 1] p, float[batch, 4, 1, 1] e, float[batch, 8, 1, 1] s, float[batch, 8, 1, 1] g,
 float[batch, 8, 8, 8] gated, float[batch, 4, 8, 8] z, float[batch, 4, 1, 1] re>
{
    [expand__Conv] a = Conv (x, wa, ba)
    [expand__Relu] ra = Relu (a)
    [dw__Conv] d = Conv <group: int = 8, pads: ints = [1, 1, 1, 1]> (ra, wd, bd)
    [dw__Relu] rd = Relu (d)
    [se__ChannelPoolMean] p = attn_deploy.ChannelPoolMean (rd)
    [se_fc1__Conv] e = Conv (p, we, be)
    [se__Relu] re = Relu (e)
    [se_fc2__Conv] s = Conv (re, ws)
    [se__Sigmoid] g = Sigmoid (s)
    [se__Gate] gated = attn_deploy.Gate (rd, g)
    [project__Conv] z = Conv (gated, wp, bp)
    [last__HardSwish] y = HardSwish (z)
}"""


def weights() -> dict[str, Array]:
    """Channels of very different size, as training leaves them where BatchNormalization was folded in."""
    sizes = np.logspace(-1.5, 1, 8, dtype=np.float32)[[3, 0, 7, 2, 5, 1, 6, 4]]
    return {
        "wa": normal(8, 3, 1, 1, seed=1) * sizes[:, None, None, None], "ba": np.abs(normal(8, seed=2)) * sizes,
        "wd": normal(8, 1, 3, 3, seed=3) * sizes[::-1, None, None, None], "bd": np.abs(normal(8, seed=4)) * sizes,
        "we": normal(4, 8, 1, 1, seed=5) / sizes[::-1, None, None] / 8, "be": normal(4, seed=6),
        "ws": normal(8, 4, 1, 1, seed=7) / 2,
        "wp": normal(4, 8, 1, 1, seed=8), "bp": normal(4, seed=9),
    }  # fmt: skip


def block() -> ir.Model:
    return network(BLOCK, **weights())


def batches(seeds: tuple[int, ...] = (20, 21)) -> list[dict[str, Array]]:
    return [{"x": normal(4, 3, 8, 8, seed=seed)} for seed in seeds]


def statistics(model: ir.Model) -> Statistics:
    return collect_statistics(model, wanted_for_equalization(model), batches(), open_model)


def equalized(text: str = BLOCK, **given: Array) -> ir.Model:
    model = network(text, **(given or weights()))
    equalize(model, statistics(model))
    return model


def test_the_model_computes_what_it_did() -> None:
    x = normal(3, 3, 8, 8, seed=50)
    assert sqnr_db(run(block(), x=x), run(equalized(), x=x)) > 110


def test_chains_go_through_relu_depthwise_pool_and_gate() -> None:
    found = {str(c.producer.name): {str(r.name) for r in c.readers} for c in chains(block())}
    assert found == {
        "expand/Conv": {"dw/Conv"},
        "dw/Conv": {"se.fc1/Conv", "project/Conv"},
        "se.fc1/Conv": {"se.fc2/Conv"},
    }


def test_before_a_depthwise_convolution_every_channel_reaches_as_far() -> None:
    model = equalized()
    names = [w for w in wanted_for_equalization(model) if w.name.startswith("ra")]
    (value,) = collect_statistics(model, names, batches(), open_model).values.values()
    before = statistics(block()).values["ra"].channel_largest()
    after = value.channel_largest()
    assert before.max() / before.min() > 20
    assert after.max() / after.min() < 1.01 * max(1.0, before.max() / before.min() / GREATEST_FACTOR)


def test_before_other_convolutions_activation_and_weight_share_the_difference() -> None:
    model, before = equalized(), statistics(block()).values["gated"].channel_largest()
    (value,) = (w.name for w in wanted_for_equalization(model) if w.name.startswith("gated"))
    after = statistics(model).values[value].channel_largest()
    assert after.max() / after.min() < before.max() / before.min()


def test_values_that_changed_have_other_names() -> None:
    model = equalized()
    names = {str(o.name) for node in model.graph for o in node.outputs}
    assert {"a/equalized", "ra/equalized", "rd/equalized", "gated/equalized", "s", "g", "z", "y"} <= names
    assert names.isdisjoint({"a", "ra", "d", "rd", "gated"})


@pytest.mark.parametrize("old", ["Relu (a)", "Relu (d)"])
@pytest.mark.parametrize("new", ["HardSwish", "Sigmoid", "Clip"])
def test_a_chain_ends_at_an_activation_that_is_not_homogeneous(old: str, new: str) -> None:
    text = BLOCK.replace(old, old.replace("Relu", new))
    producer = {"a": "expand/Conv", "d": "dw/Conv"}[old[-2]]
    assert producer not in {c.producer.name for c in chains(network(text, **weights()))}


def test_a_chain_ends_at_a_residual_and_at_an_output() -> None:
    text = BLOCK.replace("HardSwish (z)", "Add (z, z)")
    assert "project/Conv" not in {c.producer.name for c in chains(network(text, **weights()))}
    shown = BLOCK.replace("(float[batch, 4, 8, 8] y)", "(float[batch, 4, 8, 8] y, float[batch, 8, 8, 8] ra)").replace(
        " float[batch, 8, 8, 8] ra,", ""
    )
    assert "expand/Conv" not in {c.producer.name for c in chains(network(shown, **weights()))}


def test_grouped_convolutions_take_each_channels_factor() -> None:
    text = """net (float[batch, 3, 8, 8] x) => (float[batch, 6, 8, 8] y)
    <float[batch, 8, 8, 8] a, float[batch, 8, 8, 8] r>
    {
        [one__Conv] a = Conv (x, wa, ba)
        [one__Relu] r = Relu (a)
        [two__Conv] y = Conv <group: int = 2> (r, wg)
    }"""
    given = {**{k: weights()[k] for k in ("wa", "ba")}, "wg": normal(6, 4, 1, 1, seed=3)}
    x = normal(3, 3, 8, 8, seed=50)
    model = equalized(text, **given)
    assert sqnr_db(run(network(text, **given), x=x), run(model, x=x)) > 110
    assert "wg" not in model.graph.initializers


def test_only_chains_that_touch_a_quantized_layer_change() -> None:
    model = block()
    assert [w.name for w in wanted_for_equalization(model, ["expand/Conv"])] == ["ra"]
    equalize(model, statistics(model), ["expand/Conv"])
    assert {"wa", "wd"}.isdisjoint(model.graph.initializers)
    assert "wp" in model.graph.initializers


def test_channels_that_are_always_zero_are_said_and_divide_nothing_by_zero() -> None:
    given = weights()
    given["wa"][4] = given["ba"][4] = 0
    model = network(BLOCK, **given)
    (note,) = equalize(model, statistics(model))
    assert note == "1 channel is always zero on the calibration data: expand/Conv (4)"
    x = normal(3, 3, 8, 8, seed=50)
    assert sqnr_db(run(network(BLOCK, **given), x=x), run(model, x=x)) > 110


def test_a_model_without_convolutions_is_left_alone() -> None:
    model = network("net (float[n, 4] x) => (float[n, 4] y) { [a__MatMul] y = MatMul (x, w) }", w=normal(4, 4))
    assert wanted_for_equalization(model) == []
    assert equalize(model, Statistics()) == ()
    assert "w" in model.graph.initializers


def test_statistics_without_a_chain_are_refused() -> None:
    with pytest.raises(UsageError, match="do not hold"):
        equalize(block(), Statistics())


def test_int8_loses_less_behind_it() -> None:
    x = normal(8, 3, 8, 8, seed=50)
    expected = run(block(), x=x)

    def in_int8(model: ir.Model) -> float:
        convs = [n for n in weighted_nodes(model) if not str(n.name).startswith("se")]
        wanted = [Wanted(name) for name in values_to_calibrate(convs)]
        ranges = collect_statistics(model, wanted, batches(), open_model).ranges()
        quantize_convs(model, convs, ranges)
        return float(sqnr_db(expected, run(model, x=x)))

    assert in_int8(equalized()) > in_int8(block()) + 3
