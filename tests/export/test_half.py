"""FP16 and BF16 graphs: their types, what stays FP32 and why, and their numbers, by emulation on the CPU."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.half_ranges import float_activations
from attn_deploy.export.precision.half_rules import STATISTICS, HalfKernels, Kept
from attn_deploy.parity import sqnr_db
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))

from half_models import (
    BF16,
    FP16,
    HALF_IR,
    HALVES,
    LOWEST,
    MLP,
    MLP_WEIGHTS,
    Array,
    X,
    halved,
    kept,
    network,
    normal,
    run,
    types,
)  # fmt: skip

# -- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_a_network_becomes_half_between_one_cast_in_and_one_cast_out(precision: Precision) -> None:
    model = network(MLP, **MLP_WEIGHTS)
    plan = halved(model, precision, {"x": X})
    assert kept(plan) == {"head/Add": Kept.LOGITS}
    assert plan.casts == Counter(n.op_type for n in model.graph)["Cast"] == 2
    half = HALF_IR[precision].name
    assert {types(model)[name] for name in "nphgqrl"} == {half}
    assert types(model)["y"] == "FLOAT"
    stored = {v.dtype.name for name, v in model.graph.initializers.items() if name != "b3"}  # type: ignore[union-attr]
    assert stored == {half}
    assert model.graph.initializers["b3"].dtype == ir.DataType.FLOAT
    assert plan.unmeasured == ()


@pytest.mark.parametrize(("precision", "least_db"), [(FP16, 58.0), (BF16, 40.0)])
def test_half_is_close_to_float32_and_not_equal(precision: Precision, least_db: float) -> None:
    expected = run(network(MLP, **MLP_WEIGHTS), x=X)
    model = network(MLP, **MLP_WEIGHTS)
    halved(model, precision, {"x": X})
    got = run(emulate(model), x=X)
    assert least_db < sqnr_db(expected, got) < least_db + 25


def test_onnx_runtime_loads_a_half_graph_and_any_batch_goes_through() -> None:
    model = network(MLP, **MLP_WEIGHTS)
    halved(model, FP16, {"x": X})
    for batch in (1, 2, 7):
        assert run(model, x=normal(batch, 5, 16)).shape == (batch, 5, 8)


def test_an_output_that_a_half_node_makes_is_cast_under_its_own_name() -> None:
    model = network(
        "net (float[n, 16] x) => (float[n, 8] y, float[n, 8] z) {"
        " [fc__MatMul] y = MatMul (x, w) [act__Relu] h = Relu (y) [b__Neg] z = Neg (h) }",
        w=normal(16, 8),
    )  # fmt: skip
    halved(model, FP16)
    assert [(o.name, o.dtype) for o in model.graph.outputs] == [("y", ir.DataType.FLOAT), ("z", ir.DataType.FLOAT)]
    assert types(model)["y/float16"] == "FLOAT16"
    relu = next(n for n in model.graph if n.op_type == "Relu")
    assert relu.inputs[0].name == "y/float16"  # not through FP32 and back


SHAPES = """net (float[batch, 4, 6] x, int64[batch] ids) => (float[batch, 24] y)
{
    [a__Relu] h = Relu (x)
    [a__Shape] dims = Shape <end: int = 1> (h)
    [a__Concat] target = Concat <axis: int = 0> (dims, rest)
    [a__Reshape] flat = Reshape (h, target)
    [table__Gather] e = Gather <axis: int = 0> (table, ids)
    [a__Add] y = Add (flat, e)
}"""


def test_shapes_and_indices_stay_integers() -> None:
    model = network(SHAPES, rest=np.array([24], np.int64), table=normal(10, 24))
    feeds = {"x": normal(2, 4, 6), "ids": np.array([3, 7])}
    expected = run(model, **feeds)
    halved(model, FP16, feeds)
    found = types(model)
    assert (found["dims"], found["target"], found["flat"], found["e"]) == ("INT64", "INT64", "FLOAT16", "FLOAT16")
    assert model.graph.initializers["rest"].dtype == ir.DataType.INT64
    assert next(n for n in model.graph if n.op_type == "Shape").inputs[0].name == "h"  # no cast for a shape
    assert sqnr_db(expected, run(emulate(model), **feeds)) > 60


def test_an_integer_is_cast_to_the_half_type_at_once() -> None:
    text = "net (bool[n, 8] m, float[n, 8] x) => (float[n, 8] y) { [a__Cast] f = Cast <to: int = 1> (m) "
    text += "[a__Pow] p = Pow (x, two) [a__Mul] g = Mul (f, x) [b__Mul] h = Mul (f, p) [c__Add] y = Add (g, h) }"
    model = network(text, two=np.array(2, np.float32))
    feeds = {"m": normal(3, 8) > 0, "x": normal(3, 8, seed=1)}
    expected = run(model, **feeds)
    plan = halved(model, FP16, feeds, keep=["b/Mul"])
    assert kept(plan) == {"a/Pow": Kept.POWER, "b/Mul": Kept.REQUESTED}
    from_mask = [n.outputs[0].dtype.name for n in model.graph if n.op_type == "Cast" and n.inputs[0].name == "m"]
    assert sorted(from_mask) == ["FLOAT", "FLOAT16"]
    assert sqnr_db(expected, run(emulate(model), **feeds)) > 60


def test_a_cast_that_only_float32_reads_has_no_half_twin() -> None:
    text = "net (bool[n, 8] m, float[n, 8] x) => (float[n, 8] y) { [a__Cast] f = Cast <to: int = 1> (m) "
    model = network(text + "[a__Pow] p = Pow (x, f) [z__Neg] y = Neg (p) }")
    halved(model, FP16)
    assert [n.outputs[0].dtype for n in model.graph if n.inputs[0].name == "m"] == [ir.DataType.FLOAT]  # type: ignore[union-attr]


def test_the_shape_of_a_float32_value_is_read_without_a_cast() -> None:
    text = "net (float[n, 8] x) => (int64[2] d, float[n, 8] y) { [a__Shape] d = Shape (x) [z__Neg] y = Neg (x) }"
    model = network(text)
    halved(model, FP16)
    assert next(n for n in model.graph if n.op_type == "Shape").inputs[0].name == "x"  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_the_statistics_that_a_layer_norm_gives_out_are_float32(precision: Precision) -> None:
    middle = "[m__Ln] l, mean, deviation = LayerNormalization (h, c) [m__Mul] g = Mul (l, mean)"
    model = chain(middle, c=normal(8))
    halved(model, precision)
    half = HALF_IR[precision].name
    assert [types(model)[name] for name in ("l", "mean", f"mean/{half.lower()}")] == [half, "FLOAT", half]


def test_a_movement_between_two_float32_nodes_is_not_cast() -> None:
    text = "net (float[n, 4, 6] x) => (float[n, 6, 4] y) { [a__Pow] p = Pow (x, two) "
    text += "[a__Transpose] t = Transpose <perm: ints = [0, 2, 1]> (p) [a__Identity] i = Identity (t) "
    text += "[b__Pow] q = Pow (i, two) [c__Neg] y = Neg (q) }"
    model = network(text, two=np.array(2, np.float32))
    plan = halved(model, FP16)
    assert kept(plan)["a/Transpose"] == kept(plan)["a/Identity"] == Kept.BETWEEN
    assert plan.casts == 2  # into Neg and out of it


def test_a_weight_that_both_sides_read_is_stored_in_both_types() -> None:
    text = "net (float[n, 8] x) => (float[n, 8] y) { [a__MatMul] p = MatMul (x, w) [b__MatMul] q = MatMul (p, w) "
    model = network(text + "[c__Relu] y = Relu (q) }", w=normal(8, 8))
    halved(model, FP16, keep=["b"])
    assert {n: v.dtype.name for n, v in model.graph.initializers.items()} == {"w": "FLOAT", "w/float16": "FLOAT16"}  # type: ignore[union-attr]


# -- rules -----------------------------------------------------------------------------------------------------------


def chain(middle: str, **weights: Array) -> ir.Model:
    """x -> Relu -> `middle`, from h to g -> Neg -> y."""
    text = f"net (float[n, 4, 8] x) => (y) {{ [a__Relu] h = Relu (x) {middle} [z__Neg] y = Neg (g) }}"
    model = network(text.replace("(y)", "(float y)"), **weights)
    model.graph.outputs[0].shape = None
    return model


@pytest.mark.parametrize(
    ("middle", "weights", "expected"),
    [
        ("[m__Pow] g = Pow (h, c)", {"c": np.array(3, np.float32)}, Kept.POWER),
        ("[m__Sum] g = ReduceSum <keepdims: int = 1> (h, c)", {"c": np.array([2])}, Kept.SUM),
        ("[m__Mean] g = ReduceMean <keepdims: int = 1> (h, c)", {"c": np.array([2])}, Kept.SUM),
        ("[m__L2] g = ReduceL2 <keepdims: int = 1> (h, c)", {"c": np.array([2])}, Kept.SUM),
        ("[m__Max] g = ReduceMax <keepdims: int = 1> (h, c)", {"c": np.array([2])}, None),
        ("[m__Add] g = Add (h, c)", {"c": np.array(1e-6, np.float32)}, Kept.UNDERFLOW),
        ("[m__Add] g = Add (h, c)", {"c": np.array(1e-3, np.float32)}, None),
        ("[m__Mul] g = Mul (h, c)", {"c": np.full(8, 1e-6, np.float32)}, Kept.UNDERFLOW),
        ("[m__Mul] g = Mul (h, c)", {"c": np.array([1e-8] + [0.3] * 7, np.float32)}, None),
        ("[m__Mul] g = Mul (h, c)", {"c": np.array(65504, np.float32)}, None),
        ("[m__Mul] g = Mul (h, c)", {"c": np.array(65600, np.float32)}, Kept.WEIGHT),
        ("[m__Mul] g = Mul (h, c)", {"c": np.array([-7e4] + [0.3] * 7, np.float32)}, Kept.WEIGHT),
        ("[m__Softmax] g = Softmax <axis: int = -1> (h)", {}, None),
        ("[m__Ln] g = LayerNormalization <stash_type: int = 1> (h, c)", {"c": normal(8)}, None),
        ("[m__Cos] g = Cos (h)", {}, Kept.ANGLE),
    ],
    ids=["Pow", "ReduceSum", "ReduceMean", "ReduceL2", "ReduceMax", "underflow", "small", "layer scale",
         "one small weight", "largest half", "beyond it", "negative beyond it", "Softmax", "LayerNormalization",
         "Cos"],
)  # fmt: skip
def test_each_rule_keeps_its_node_and_no_other(middle: str, weights: dict[str, Array], expected: Kept | None) -> None:
    plan = halved(chain(middle, **weights), FP16)
    assert [k.reason for k in plan.kept] == ([] if expected is None else [expected])


def test_bf16_has_the_range_of_float32() -> None:
    constants = {"c": np.array(1e6, np.float32), "e": np.array(1e-6, np.float32)}
    model = chain("[m__Mul] p = Mul (h, c) [m__Add] g = Add (p, e)", **constants)
    assert halved(model, BF16, {"x": normal(2, 4, 8)}).kept == ()


def test_statistics_stay_float32_where_the_target_would_sum_in_half() -> None:
    middle = "[m__Softmax] s = Softmax <axis: int = -1> (h) [m__Ln] g = LayerNormalization (s, c)"
    kernels = HalfKernels(statistics=STATISTICS - {"LayerNormalization"})
    plan = halved(chain(middle, c=normal(8)), FP16, kernels=kernels)
    assert kept(plan) == {"m/Ln": Kept.STATISTICS}


def test_what_the_target_has_no_kernel_for_stays_float32() -> None:
    kernels = HalfKernels(lacks=lambda node: node.op_type == "Erf")
    assert kept(halved(chain("[m__Erf] g = Erf (h)"), FP16, kernels=kernels)) == {"m/Erf": Kept.NO_KERNEL}


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [("32, 64", None), ("32, 65", Kept.GLOBAL_MEAN), ("height, 4", Kept.GLOBAL_MEAN)],
    ids=["2048", "2080", "unknown"],
)
def test_a_global_mean_over_many_pixels_stays_float32(pixels: str, expected: Kept | None) -> None:
    text = f"net (float[n, 2, {pixels}] x) => (float[n, 2, 1, 1] y) {{ [a__Relu] h = Relu (x) "
    plan = halved(network(text + "[se__GlobalAveragePool] g = GlobalAveragePool (h) [z__Neg] y = Neg (g) }"), FP16)
    assert kept(plan) == ({} if expected is None else {"se/GlobalAveragePool": expected})


NORMS = {
    "LayerNorm": (
        "[n__ReduceMean] mu = ReduceMean (h, axis) [n__Sub] d = Sub (h, mu) [n__Mul] sq = Mul (d, d) "
        "[n__ReduceMean_2] var = ReduceMean (sq, axis) [n__Add] ve = Add (var, eps) [n__Sqrt] sd = Sqrt (ve) "
        "[n__Div] u = Div (d, sd) [n__Mul_2] s = Mul (u, gamma) [n__Add_2] g = Add (s, beta)"
    ),
    "RMSNorm": (
        "[n__Pow] sq = Pow (h, two) [n__ReduceMean] ms = ReduceMean (sq, axis) [n__Add] me = Add (ms, eps) "
        "[n__Sqrt] rms = Sqrt (me) [n__Reciprocal] r = Reciprocal (rms) [n__Mul] u = Mul (h, r) "
        "[n__Mul_2] g = Mul (u, gamma)"
    ),
    "unit vectors": "[n__ReduceL2] l = ReduceL2 (h, axis) [n__Max] m = Max (l, tiny) [n__Div] g = Div (h, m)",
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("precision", [FP16, BF16])
def test_a_normalization_that_is_written_out_stays_float32_as_a_whole(norm: str, precision: Precision) -> None:
    """Also for rows of zeros, and for values whose squares pass 65504."""
    constants = {
        "axis": np.array([-1]), "eps": np.array(1e-5, np.float32), "two": np.array(2, np.float32),
        "tiny": np.array(1e-12, np.float32), "gamma": normal(8, seed=1), "beta": normal(8, seed=2),
    }  # fmt: skip
    used = {k: v for k, v in constants.items() if f" {k})" in NORMS[norm]}
    model = chain(NORMS[norm], **used)
    x = normal(3, 4, 8)
    x[0, 0], x[1] = 0.0, x[1] * 400
    expected = run(model, x=x)
    plan = halved(model, precision, {"x": x / 400})
    inside = {str(n.name) for n in chain(NORMS[norm], **used).graph if str(n.name).startswith("n/")}
    assert kept(plan).keys() == inside
    got = run(emulate(model), x=x)
    assert np.isfinite(got).all()
    assert sqnr_db(expected, got) > (55 if precision is FP16 else 38)


def test_a_large_activation_keeps_its_neighbours_float32_and_says_how_large() -> None:
    model = chain("[big__Mul] g = Mul (h, c)", c=np.array(300, np.float32))
    x = np.full((1, 4, 8), 2.0, np.float32)
    plan = halved(model, FP16, {"x": x / 3}, {"x": x})
    assert kept(plan) == {"big/Mul": Kept.RANGE, "z/Neg": Kept.RANGE}
    assert plan.kept[0].detail == "g reaches 600"
    assert plan.notes[0] == "big: Mul in float32: a value is too large on the calibration data (g reaches 600)"
    assert list(plan.by_module) == ["big", "z"]


def overflowing() -> ir.Model:
    """h * 60000 / 60000 in two layers: an activation that FP16 cannot hold."""
    middle = "[big__MatMul] l = MatMul (h, w) [small__MatMul] g = MatMul (l, v)"
    return chain(middle, w=np.eye(8, dtype=np.float32) * 60000, v=np.eye(8, dtype=np.float32) / 60000 * 2)


def test_without_the_range_rule_the_overflow_would_be_infinite() -> None:
    """The planted fault: what the calibration data says is what keeps the network whole."""
    x = normal(2, 4, 8) * 4
    expected = run(overflowing(), x=x)
    with_rule, without = overflowing(), overflowing()
    plan = halved(with_rule, FP16, {"x": x})
    assert {n for n, reason in kept(plan).items() if reason is Kept.RANGE} == {"big/MatMul", "small/MatMul"}
    assert sqnr_db(expected, run(emulate(with_rule), x=x)) > 60
    blind = to_half(without, FP16, dict.fromkeys(float_activations(without), 1.0))
    assert Kept.RANGE not in kept(blind).values()
    assert not np.isfinite(run(emulate(without), x=x)).all()


def test_magnitudes_that_are_missing_are_told() -> None:
    assert halved(chain("[m__Neg] g = Neg (h)"), FP16).unmeasured == ("x", "h", "g", "y")


def test_positions_and_their_angles_stay_float32() -> None:
    """Position 300 times a frequency of 0.37 has 111.0 in 11 bits: an error of a sixteenth of a radian."""
    text = """net (int64[n] position, float[n, 4] x) => (float[n, 4] y) {
        [rope__Cast] p = Cast <to: int = 1> (position) [rope__Unsqueeze] column = Unsqueeze (p, axis)
        [rope__Mul] angle = Mul (column, frequency) [rope__Cos] c = Cos (angle)
        [rope__Mul_2] r = Mul (x, c) [z__Neg] y = Neg (r) }"""
    model = network(text, axis=np.array([1]), frequency=np.array([0.37, 0.11, 0.05, 0.01], np.float32))
    feeds = {"position": np.arange(300), "x": normal(300, 4)}
    expected = run(model, **feeds)
    plan = halved(model, FP16, feeds)
    assert {n for n, r in kept(plan).items() if r is Kept.ANGLE} == {
        "rope/Cast", "rope/Unsqueeze", "rope/Mul", "rope/Cos"
    }  # fmt: skip
    assert "rope/Mul.2" not in kept(plan)
    assert sqnr_db(expected, run(emulate(model), **feeds)) > 60


def test_what_decides_between_values_stays_float32_and_its_indices_are_the_same() -> None:
    middle = "[m__TopK] v, i = TopK (h, k) [m__GatherElements] g = GatherElements <axis: int = 2> (h, i)"
    assert kept(halved(chain(middle, k=np.array([3])), FP16)) == {"m/TopK": Kept.DECISION}


def test_a_convolution_has_a_bf16_form_from_opset_22_on() -> None:
    text = "net (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) { [c__Conv] h = Conv (x, w) [z__Relu] y = Relu (h) }"
    model = network(text, w=normal(4, 3, 1, 1))
    assert halved(model, BF16).kept == ()
    assert model.opset_imports[""] == 22
    old = network(text.replace("[z__Relu]", "[g__Gate] k = attn_deploy.Gate (h, h) [z__Relu]"), w=normal(4, 3, 1, 1))
    assert old.functions  # written for opset 20
    assert kept(halved(old, BF16))["c/Conv"] == Kept.NO_FORM
    assert old.opset_imports[""] == 20


def test_operators_of_ours_stay_float32_unless_they_have_a_half_kernel() -> None:
    text = "net (float[n, 3, 8, 8] x) => (float[n, 3, 8, 8] y) { [a__Relu] h = Relu (x) "
    text += "[g__Gate] k = attn_deploy.Gate (h, h) [z__Relu] y = Relu (k) }"
    assert kept(halved(network(text), FP16)) == {"g/Gate": Kept.NO_FORM}
    model = network(text)
    assert to_half(model, FP16, {}, kernels=HalfKernels(own=frozenset({"Gate"}))).kept == ()
    assert types(model)["k"] == "FLOAT16"


@pytest.mark.parametrize(("keep", "nodes"), [("fc1", {"fc1/MatMul", "fc1/Add"}), ("fc1/Add", {"fc1/Add"})])
def test_a_module_or_node_is_kept_when_it_is_asked_for(keep: str, nodes: set[str]) -> None:
    model = network(MLP, **MLP_WEIGHTS)
    plan = halved(model, FP16, {"x": X}, keep=[keep])
    assert {n for n, reason in kept(plan).items() if reason is Kept.REQUESTED} == nodes
    assert model.graph.initializers["b1"].dtype == ir.DataType.FLOAT


def test_a_name_that_the_model_lacks_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="to keep in float32") as caught:
        to_half(network(MLP, **MLP_WEIGHTS), FP16, {}, keep=["fc3"])
    assert "fc1" in str(caught.value.expected)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_only_a_half_type_makes_a_half_graph(precision: Precision) -> None:
    with pytest.raises(UsageError, match="FP16 or BF16"):
        to_half(network(MLP, **MLP_WEIGHTS), precision, {})


def test_a_graph_inside_a_node_reads_float32() -> None:
    branch = "{ [t__Add] r = Add (h, c) }", "{ [e__Sub] s = Sub (h, c) }"
    text = f"""net (float[n, 8] x, bool yes) => (float[n, 8] y) {{
        [a__Relu] h = Relu (x)
        [i__If] k = If (yes) <then_branch = t () => (float[n, 8] r) {branch[0]},
                              else_branch = e () => (float[n, 8] s) {branch[1]}>
        [z__Neg] y = Neg (k) }}"""
    model = network(text, c=np.array(0.5, np.float32))
    feeds = {"x": normal(2, 8), "yes": np.array(True)}
    expected = run(model, **feeds)
    plan = halved(model, FP16)
    assert kept(plan) == {"i/If": Kept.CONTROL_FLOW}
    assert sqnr_db(expected, run(emulate(model), **feeds)) > 60


# -- masks -----------------------------------------------------------------------------------------------------------

REPLACED = "[m__Where] k = Where (mask, s, low) "
ADDED = "[m__Where] b = Where (mask, zero, low) [m__Add] k = Add (s, b) "
MULTIPLIED = "[m__Cast] f = Cast <to: int = 1> (mask) [m__Sub] o = Sub (one, f) [m__Mul] b = Mul (o, low) "
MULTIPLIED += "[m__Add] k = Add (s, b) "


def masked(spelling: str, low: float) -> ir.Model:
    text = f"""net (float[n, 4, 8] q, bool[n, 1, 4] mask) => (float[n, 4, 8] y) {{
        [a__Transpose] t = Transpose <perm: ints = [0, 2, 1]> (q) [a__MatMul] s = MatMul (q, t) {spelling}
        [m__Softmax] p = Softmax <axis: int = -1> (k) [a__MatMul_2] o2 = MatMul (p, q) [z__Neg] y = Neg (o2) }}"""
    constants = {"low": np.float32(low), "zero": np.float32(0), "one": np.float32(1)}
    return network(text, **{k: np.array(v) for k, v in constants.items() if k in spelling})


@pytest.mark.parametrize("spelling", [REPLACED, ADDED, MULTIPLIED], ids=["replaced", "added", "multiplied"])
@pytest.mark.parametrize("low", [LOWEST, -1e9, -1e12, -65504.0, -1e4], ids=["lowest", "-1e9", "-1e12", "half", "-1e4"])
@pytest.mark.parametrize("precision", [FP16, BF16])
def test_a_mask_is_clamped_and_its_range_keeps_nothing_float32(spelling: str, low: float, precision: Precision) -> None:
    """Sample 0 has two tokens; of sample 1 every token is masked: no NaN there either."""
    q = normal(2, 4, 8) / 4
    feeds = {"q": q, "mask": np.array([[[True, True, False, False]], [[False] * 4]])}
    expected = run(masked(spelling, low), **feeds)
    model = masked(spelling, low)
    plan = halved(model, precision, feeds)
    assert kept(plan) == {}
    lowest = float(ml_dtypes.finfo(HALVES[precision]).min)
    held = lowest / 4 if precision is FP16 and spelling is not REPLACED else lowest
    constant = next(v.const_value.numpy() for n, v in model.graph.initializers.items() if n.startswith("low/"))
    assert float(constant) == pytest.approx(max(low, held), rel=4e-3)
    assert (plan.clamped == ("low",)) == (low < held)
    got = run(emulate(model), **feeds)
    assert np.isfinite(got).all()
    assert sqnr_db(expected[0], got[0]) > (55 if precision is FP16 else 38)


def test_a_large_number_that_ends_in_no_softmax_is_no_mask() -> None:
    model = chain("[m__Max] g = Max (h, low)", low=np.array(-1e9, np.float32))
    plan = halved(model, FP16)
    assert kept(plan) == {"m/Max": Kept.WEIGHT}
    assert plan.clamped == ()


def test_scores_themselves_still_have_a_range() -> None:
    model = masked(REPLACED, -1e9)
    feeds = {"q": normal(1, 4, 8) * 30, "mask": np.ones((1, 1, 4), bool)}
    assert kept(halved(model, FP16, feeds)).keys() >= {"a/MatMul", "m/Where"}


def test_minus_infinity_stays_where_the_softmax_is_asked_for_nan() -> None:
    text = ADDED + "[m__Softmax] w = Softmax <axis: int = -1> (k) [m__IsNaN] nan = IsNaN (w) "
    text += "[m__Where_2] p = Where (nan, zero, w) "
    model = network(
        f"""net (float[n, 4, 8] q, bool[n, 1, 4] mask) => (float[n, 4, 8] y) {{
        [a__Transpose] t = Transpose <perm: ints = [0, 2, 1]> (q) [a__MatMul] s = MatMul (q, t) {text}
        [a__MatMul_2] o2 = MatMul (p, q) [z__Neg] y = Neg (o2) }}""",
        low=np.array(-np.inf, np.float32), zero=np.array(0, np.float32),
    )  # fmt: skip
    feeds = {"q": normal(2, 4, 8), "mask": np.array([[[True] * 4], [[False] * 4]])}
    expected = run(model, **feeds)
    plan = halved(model, FP16, feeds)
    assert plan.clamped == ()
    got = run(emulate(model), **feeds)
    assert not expected[1].any()
    assert not got[1].any()
    assert sqnr_db(expected, got) > 55
