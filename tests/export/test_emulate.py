"""Emulation of half graphs: the same roundings, bit by bit, whatever ONNX Runtime's optimizer does."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.precision.half import to_half
from attn_deploy.export.precision.half_rules import Kept
from attn_deploy.parity import sqnr_db
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import BF16, FP16, HALVES, Array, halved, kept, network, normal, open_model, run, types

STEPS = """net (float[n, 64] x) => (float[n, 64] y) {
    [a__Mul] p = Mul (x, x) [b__Add] s = Add (p, c) [c__Mul] q = Mul (s, x) [d__Relu] y = Relu (q) }"""


def rounded(value: Array, precision: Precision) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(value.astype(HALVES[precision]).astype(np.float32))


@pytest.mark.parametrize("precision", [FP16, BF16])
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0], ids=["subnormal", "normal", "up to infinity"])
def test_every_result_is_rounded_as_numpy_rounds_it(precision: Precision, size: float) -> None:
    """Under all of ONNX Runtime's optimizations."""
    x, c = normal(5, 64) * np.float32(size), normal(64, seed=1)
    model = network(STEPS, c=c)
    to_half(model, precision, {})
    h = rounded(x, precision)
    with np.errstate(over="ignore"):
        total = rounded(rounded(h * h, precision) + rounded(c, precision), precision)
        expected = np.maximum(rounded(total * h, precision), 0)
    got = run(emulate(model), x=x)
    np.testing.assert_array_equal(got, expected)
    exact = np.maximum((x * x + c) * x, 0)
    assert not np.array_equal(got, exact)


def test_onnx_runtime_by_itself_leaves_roundings_out() -> None:
    """Why there is an emulation at all: a half graph on the CPU is computed in FP32 and rounded where it pleases."""
    x, c = normal(5, 64), normal(64, seed=1)
    model = network(STEPS, c=c)
    to_half(model, FP16, {})
    assert not np.array_equal(run(model, x=x), run(emulate(model), x=x))


def test_no_rounding_is_optimized_away(tmp_path: Path) -> None:
    model = network(STEPS, c=normal(64))
    to_half(model, FP16, {})
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    proto = ir.to_proto(emulate(model)).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    casts = [n for n in onnx.load(tmp_path / "optimized.onnx").graph.node if n.op_type == "Cast"]
    to = Counter(onnx.helper.get_node_attr_value(c, "to") for c in casts)
    assert to[onnx.TensorProto.FLOAT16] == 4  # x, p, s, q; Relu rounds nothing


def test_the_emulated_model_has_the_same_names_and_float32_alone() -> None:
    model = network(STEPS, c=normal(64))
    to_half(model, BF16, {})
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    emulated = emulate(model)
    onnx.checker.check_model(ir.to_proto(emulated), full_check=True)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert {types(emulated)[name] for name in ("p", "s", "q", "y")} == {"FLOAT"}
    assert types(emulated)["p/narrow"] == "BFLOAT16"
    assert {v.dtype for v in emulated.graph.initializers.values()} == {ir.DataType.FLOAT}


def test_a_split_is_rounded_where_it_is_made_and_not_again() -> None:
    text = "net (float[n, 8] x) => (float[n, 4] y) { [a__Exp] e = Exp (x) "
    text += "[s__Split] u, v = Split <axis: int = 1, num_outputs: int = 2> (e) [b__Mul] y = Mul (u, v) }"
    model = network(text)
    to_half(model, FP16, {})
    x = normal(3, 8)
    e = rounded(np.exp(rounded(x, FP16)), FP16)
    got = run(emulate(model), x=x)
    np.testing.assert_allclose(got, rounded(e[:, :4] * e[:, 4:], FP16), rtol=1e-3)
    narrow = [str(o.name) for n in emulate(model).graph for o in n.outputs if o.dtype == ir.DataType.FLOAT16]
    assert narrow == ["x/float16/narrow", "e/narrow", "y/float16/narrow"]


CONTRIB = """net (float[n, 6, 32] x, float[n, 6, 32] r) => (float[n, 6, 16] y, float[n, 6, 32] z) {
    [qkv__MatMul] q = MatMul (x, wq)
    [a__MultiHeadAttention] a = com.microsoft.MultiHeadAttention <num_heads: int = 4> (q, x, r)
    [s__SkipLayerNormalization] n, m, i, t = com.microsoft.SkipLayerNormalization <epsilon: float = 1e-5> (a, r, g, b)
    [f__FusedMatMul] p = com.microsoft.FusedMatMul <alpha: float = 0.5> (n, w1)
    [f__BiasGelu] e = com.microsoft.BiasGelu (p, b1)
    [f__Gelu] u = com.microsoft.Gelu (e)
    [o__MatMul] y = MatMul (u, w2)
    [o__Neg] z = Neg (t) }"""


@pytest.mark.parametrize("precision", [FP16, BF16])
def test_fused_operators_of_onnx_runtime_are_half_and_emulated(precision: Precision) -> None:
    """The CPU has FP32 kernels for them alone; mean and deviation of a SkipLayerNormalization stay FP32."""
    weights = {
        "wq": normal(32, 32, seed=1) / 6, "g": normal(32, seed=2), "b": normal(32, seed=3), "b1": normal(48, seed=5),
        "w1": normal(32, 48, seed=4) / 6, "w2": normal(48, 16, seed=6) / 7,
    }  # fmt: skip
    feeds = {"x": normal(2, 6, 32, seed=7), "r": normal(2, 6, 32, seed=8)}
    model = network(CONTRIB, **weights)
    expected = open_model(model)(feeds)
    plan = to_half(model, precision, {})
    assert plan.kept == ()
    found, half = types(model), {FP16: "FLOAT16", BF16: "BFLOAT16"}[precision]
    assert {found[name] for name in "qantpeu"} == {half}
    assert (found["m"], found["i"]) == ("FLOAT", "FLOAT")
    got = open_model(emulate(model))(feeds)
    for name, value in expected.items():
        assert (55 if precision is FP16 else 36) < sqnr_db(value, got[name]) < 80, name


def test_an_emulated_model_of_ours_keeps_its_function() -> None:
    text = "net (float[n, 3, 8, 8] x) => (float[n, 3, 8, 8] y) { [a__Relu] h = Relu (x) "
    text += "[g__Gate] k = attn_deploy.GateSilu (h, h) [z__Neg] y = Neg (k) }"
    model = network(text)
    x = normal(2, 3, 8, 8)
    expected = run(model, x=x)
    plan = halved(model, FP16)
    assert kept(plan) == {"g/Gate": Kept.NO_FORM}
    assert sqnr_db(expected, run(emulate(model), x=x)) > 60


def test_a_constant_of_shape_is_made_in_the_half_type() -> None:
    text = "net (float[n, 8] x) => (float[n, 8] y) { [a__Relu] h = Relu (x) [a__Shape] d = Shape (h) "
    text += "[a__ConstantOfShape] o = ConstantOfShape <value: tensor = float[1] v {0.1}> (d) [b__Add] y = Add (h, o) }"
    model = network(text)
    halved(model, FP16)
    assert types(model)["o"] == "FLOAT16"
    x = np.zeros((2, 8), np.float32)
    np.testing.assert_array_equal(run(emulate(model), x=x), np.full((2, 8), np.float32(np.float16(0.1))))
