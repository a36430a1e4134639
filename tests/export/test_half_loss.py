"""Magnitudes over calibration data, and the loss of half graphs block by block."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.half_loss import BLOCK_MIN_SQNR_DB, Reference, half_within, measure
from attn_deploy.export.precision.half_ranges import collect_magnitudes, float_activations
from attn_deploy.export.precision.half_rules import Kept
from attn_deploy.parity import sqnr_db
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import (
    BF16,
    FP16,
    MLP,
    MLP_WEIGHTS,
    Array,
    X,
    kept,
    network,
    normal,
    open_model,
    require_well_formed,
    run,
)

# -- magnitudes ------------------------------------------------------------------------------------------------------


def test_the_magnitude_of_every_float_activation_is_the_largest_over_all_batches() -> None:
    model = network(MLP, **MLP_WEIGHTS)
    assert float_activations(model) == ("x", *"nphgqrly")
    batches = [X[:1], X[1:] * 3, -X * 2]
    found = collect_magnitudes(model, ({"x": x} for x in batches), open_model, larger=1)
    assert found.keys() == {"x", *"nphgqrly"}
    assert found["x"] == pytest.approx(max(np.abs(x).max() for x in batches))
    assert found["y"] == pytest.approx(max(np.abs(run(model, x=x)).max() for x in batches), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=repr)
def test_what_is_not_finite_has_an_infinite_magnitude(bad: float) -> None:
    text = "net (float[n, 4] x) => (float[n, 4] y) { [a__Mul] h = Mul (x, c) [b__Neg] y = Neg (x) }"
    text = text.replace("[b__Neg] y = Neg (x)", "[b__Max] y = Max (h, x)")
    x = normal(2, 4)
    x[1, 2] = bad
    found = collect_magnitudes(network(text, c=np.array(0.5, np.float32)), [{"x": normal(2, 4)}, {"x": x}], open_model)
    assert np.isinf(found["h"])
    model = network(text, c=np.array(0.5, np.float32))
    plan = to_half(model, FP16, found)
    assert kept(plan)["a/Mul"] == Kept.RANGE


SCORES = """net (float[n, 4, 8] x, float[n, 1, 4] bias) => (float[n, 4, 4] y) {
    [a__Transpose] t = Transpose <perm: ints = [0, 2, 1]> (x) [a__MatMul] s = MatMul (x, t)
    [a__Add] k = Add (s, bias) [a__Softmax] p = Softmax <axis: int = -1> (k)
    [z__MatMul] y = MatMul (p, m) }"""


def test_what_grows_with_the_square_of_the_input_needs_more_room() -> None:
    """Scores of about 10 are 100000 on inputs a hundred times larger: infinite in FP16, and their softmax NaN."""
    x = normal(2, 4, 8)
    feeds = {"x": x, "bias": np.zeros((2, 1, 4), np.float32)}
    larger = {**feeds, "x": x * 100}
    blind, aware = network(SCORES, m=normal(4, 4)), network(SCORES, m=normal(4, 4))
    plan = to_half(blind, FP16, collect_magnitudes(blind, [feeds], open_model, larger=1))
    assert plan.kept == ()
    assert np.isnan(run(emulate(blind), **larger)).any()
    plan = to_half(aware, FP16, collect_magnitudes(aware, [feeds], open_model))
    ranged = {name for name, reason in kept(plan).items() if reason is Kept.RANGE}
    assert ranged == {"a/MatMul", "a/Add", "a/Softmax"}
    assert np.isfinite(run(emulate(aware), **larger)).all()


def test_a_mask_among_the_inputs_is_not_made_larger() -> None:
    model = network(SCORES, m=normal(4, 4))
    bias = np.where(normal(2, 1, 4) > 0, np.float32(0), np.finfo(np.float32).min)
    found = collect_magnitudes(model, [{"x": normal(2, 4, 8), "bias": bias}], open_model)
    assert found["bias"] == pytest.approx(np.finfo(np.float32).max)
    assert all(np.isfinite(value) for value in found.values())


def test_a_batch_comes_back_as_two_numbers_per_sample_and_activation_and_is_let_go() -> None:
    sizes, alive = [], []

    def watched(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        opened = open_model(model)

        def call(feeds: Mapping[str, Array]) -> dict[str, Array]:
            outputs = opened(feeds)
            sizes.append(sum(o.size for o in outputs.values()))
            return outputs

        return call

    def batches() -> Iterator[dict[str, Array]]:
        before: list[weakref.ref[Array]] = []
        for seed in range(5):
            alive.append(sum(r() is not None for r in before))
            x = normal(1 + seed, 5, 16, seed=seed)
            before.append(weakref.ref(x))
            yield {"x": x}

    collect_magnitudes(network(MLP, **MLP_WEIGHTS), batches(), watched)
    assert sizes == [2 * 9 * batch for batch in (1, 1, 2, 3, 4, 5)]  # the first one larger as well
    assert max(alive) <= 1


def test_magnitudes_without_a_batch_are_an_error() -> None:
    with pytest.raises(AttnDeployError, match="no sample"):
        collect_magnitudes(network(MLP, **MLP_WEIGHTS), [], open_model)


# -- loss ------------------------------------------------------------------------------------------------------------

BLOCKS = """net (float[batch, 6, 16] x) => (float[batch, 6, 8] y)
{
    [stem_norm__LayerNormalization] n = LayerNormalization (x, gamma)
    [stem_fc__MatMul] h = MatMul (n, w1)
    [fragile_a__Add] far = Add (h, offset)
    [fragile_a__Relu] far2 = Relu (far)
    [fragile_b__Sub] near = Sub (far2, offset)
    [body_fc__MatMul] q = MatMul (near, w2)
    [body_act__Gelu] g = Gelu (q)
    [head_fc__MatMul] l = MatMul (g, w3)
    [head_act__Sin] a = Sin (l)
    [head_out__Neg] y = Neg (a)
}"""


def fragile() -> tuple[ir.Model, Reference]:
    """Adds 200 to numbers of about 1 and takes it off again: within range, and most bits are gone. No rule sees it."""
    weights = {
        "gamma": normal(16, seed=1), "w1": normal(16, 16, seed=2) / 4, "w2": normal(16, 16, seed=3) / 4,
        "w3": normal(16, 8, seed=4) / 4, "offset": np.array(200, np.float32),
    }  # fmt: skip
    canonical = network(BLOCKS, **weights)
    portable = canonical.clone()
    inline_functions(portable)
    return portable, Reference(canonical, portable, ())


def batches() -> list[dict[str, Array]]:
    return [{"x": normal(2, 6, 16, seed=s)} for s in (20, 21)]


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_a_block_that_loses_too_much_goes_back_to_float32_with_its_number(precision: Precision) -> None:
    model, reference = fragile()
    magnitudes = collect_magnitudes(model, batches(), open_model)
    floor = BLOCK_MIN_SQNR_DB[precision]
    half, loss = half_within(model, precision, magnitudes, reference, batches, open_model)
    require_well_formed(half)
    back = {row.module: row for row in loss.rows if row.kept}
    assert loss.holds
    assert back.keys() == {"fragile.a", "fragile.b"}
    number = back["fragile.b"].sqnr_db
    assert number < floor < back["fragile.a"].sqnr_db
    assert back["fragile.b"].reason == f"{number:.1f} dB alone, {floor:g} dB or more is asked"
    assert (
        back["fragile.a"].reason
        == f"fragile.b has {number:.1f} dB on its rounded result, {floor:g} dB or more is asked"
    )
    lost = {k.node: k.detail for k in loss.plan.kept if k.reason is Kept.LOSS}
    assert lost == {name: row.reason for row in back.values() for name in row.nodes}
    assert any("its block alone loses too much" in note and " dB alone" in note for note in loss.plan.notes)


def test_the_loss_of_a_block_is_that_of_its_nodes_on_the_references_values() -> None:
    """Against the same computed by hand in NumPy."""
    model, reference = fragile()
    half = model.clone()
    to_half(half, FP16, {})
    rows, outputs = measure(half, FP16, reference, batches(), open_model)
    by_module = {row.module: row for row in rows}
    values = [open_model(_with_outputs(model, ["h", "far2"]))(feeds) for feeds in batches()]
    h = np.concatenate([v["h"] for v in values])
    got = np.maximum((h.astype(np.float16).astype(np.float32) + 200).astype(np.float16), 0).astype(np.float32)
    expected = np.concatenate([v["far2"] for v in values])
    assert by_module["fragile.a"].sqnr_db == pytest.approx(sqnr_db(expected, got), abs=0.01)
    whole = [run(model, **feeds) for feeds in batches()], [run(emulate(half), **feeds) for feeds in batches()]
    assert outputs == {"y": pytest.approx(sqnr_db(*map(np.concatenate, whole)), abs=0.01)}


def _with_outputs(model: ir.Model, names: list[str]) -> ir.Model:
    copy = model.clone()
    values = {o.name: o for n in copy.graph for o in n.outputs}
    copy.graph.outputs.clear()
    for name in names:
        values[name].type, values[name].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None, None])
        copy.graph.outputs.append(values[name])
    return copy


DEEP = """net (float[batch, 6, 16] x) => (float[batch, 6, 16] y)
{{
    [in__Relu] h0 = Relu (x)
    {}
    [out__Neg] y = Neg (h12)
}}"""


def test_when_each_block_holds_and_the_whole_does_not_the_worst_go_back_until_it_does() -> None:
    """Twelve layers, each of which rounds: together they lose more than any of them."""
    layers = "".join(f"[l{k}__MatMul] m{k} = MatMul (h{k}, w) [l{k}__Tanh] h{k + 1} = Tanh (m{k})" for k in range(12))
    canonical = network(DEEP.format(layers), w=np.float32(0.8) * normal(16, 16) / 2)
    model = canonical.clone()
    reference = Reference(canonical, model, ())
    half = model.clone()
    to_half(half, FP16, {})
    rows, outputs = measure(half, FP16, reference, batches(), open_model)
    floor = outputs["y"] + 2
    assert floor < min(row.sqnr_db for row in rows)
    _, loss = half_within(model, FP16, {}, reference, batches, open_model, floor_db=floor)
    assert loss.holds
    assert loss.outputs["y"] >= floor
    back = [row for row in loss.rows if row.kept]
    assert 0 < len(back) < len(loss.rows)
    assert all("the whole model has" in row.reason for row in back)
    assert min(row.sqnr_db for row in rows) == min(row.sqnr_db for row in back)


def test_a_floor_that_nothing_half_can_hold_leaves_float32() -> None:
    model, reference = fragile()
    half, loss = half_within(model, FP16, {}, reference, batches, open_model, floor_db=190.0)
    x = normal(2, 6, 16)
    np.testing.assert_allclose(run(half, x=x), run(model, x=x), atol=1e-6)
    assert loss.outputs["y"] > 100


def test_a_healthy_network_keeps_every_block_half() -> None:
    canonical = network(MLP, **MLP_WEIGHTS)
    portable = canonical.clone()
    inline_functions(portable)
    for precision, floor in BLOCK_MIN_SQNR_DB.items():
        _, loss = half_within(
            portable, precision, {}, Reference(canonical, portable, ()), lambda: [{"x": X}], open_model
        )
        assert loss.holds
        assert [row for row in loss.rows if row.kept] == []
        assert min(row.sqnr_db for row in loss.rows) > floor
        assert {row.module for row in loss.rows} == {"norm", "fc1", "act", "fc2", "skip", "head"}


def test_the_loss_of_no_sample_is_an_error() -> None:
    model, reference = fragile()
    with pytest.raises(AttnDeployError, match="without any sample"):
        half_within(model, FP16, {}, reference, lambda: [], open_model)
