"""Residual sums with their norms, and biases with their GELU: what is fused, what is not, and the same numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.lower.cuda_bias_gelu import fuse_bias_gelu
from attn_deploy.export.lower.cuda_idle import drop_idle_movement
from attn_deploy.export.lower.cuda_linear import merge_linears
from attn_deploy.export.lower.cuda_opset import raise_for_attention
from attn_deploy.export.lower.cuda_skip_norm import fuse_skip_norm
from attn_deploy.parity import sqnr_db

Array = np.ndarray[Any, Any]


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


WEIGHTS = {
    "weight": normal(8, 8, seed=1),
    "bias": normal(8, seed=2),
    "scale": normal(8, seed=3),
    "shift": normal(8, seed=4),
    "nothing": np.zeros(6, np.int64),
    "something": np.array([0, 0, 0, 0, 1, 0]),
    "axis_1": np.array([1]),
    "axis_3": np.array([3]),
    "wide": normal(8, 16, seed=5),
    "bias_wide": normal(16, seed=6),
    "to_grid": np.array([0, 2, 3, 8]),
    "to_tokens": np.array([0, 6, 8]),
}


def network(body: str, outputs: str = "float[batch, 6, 8] out", grid: bool = False, opset: int = 20) -> ir.Model:
    """`x` and `y` [batch, 6, 8] ([batch, 2, 3, 8] with `grid`) -> `outputs`, by `body`; shapes are inferred."""
    shape = "float[batch, 2, 3, 8]" if grid else "float[batch, 6, 8]"
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]>\nnet ({shape} x, {shape} y) => ({outputs})\n{{\n{body}\n}}'
    )
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(w, n) for n, w in WEIGHTS.items() if n in used)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    for number, node in enumerate(model.graph):
        node.name = f"block/{node.op_type}_{number}"
    return model


def outputs_of(model: ir.Model, batch: int) -> list[Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()  # nothing is fused that is not in the model
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes = {i.name: [batch, *i.shape[1:]] for i in session.get_inputs()}
    feeds = {name: normal(*shape, seed=len(name) + ord(name[0])) for name, shape in shapes.items()}
    return [np.asarray(o) for o in session.run(None, feeds)]


def require_same(model: ir.Model, fused: ir.Model) -> None:
    for batch in (1, 3):
        for expected, got in zip(outputs_of(model, batch), outputs_of(fused, batch), strict=True):
            assert sqnr_db(expected, got) >= 100


def operators(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


NORM = "out = LayerNormalization <axis = -1, epsilon = 0.001> (sum, scale, shift)"
LINEAR = "product = MatMul (y, weight)  linear = Add (product, bias)"


def fused_norm(model: ir.Model, expected: int = 1) -> ir.Model:
    copy = model.clone()
    assert fuse_skip_norm(copy) == expected
    require_same(model, copy)
    return copy


def test_a_sum_and_its_norm_are_one_operator() -> None:
    fused = fused_norm(network(f"sum = Add (x, y) {NORM}"))
    assert operators(fused) == {"SkipLayerNormalization": 1}
    assert fused.graph[0].name == "block/LayerNormalization_1/SkipLayerNormalization"
    assert [o.name for o in fused.graph.outputs] == ["out"]


def test_a_norm_by_the_root_mean_square_too() -> None:
    body = "sum = Add (x, linear) more = Relu (sum) out = RMSNormalization <axis = -1, epsilon = 0.01> (sum, scale)"
    model = network(f"{LINEAR} {body}", "float[batch, 6, 8] out, float[batch, 6, 8] more", opset=23)
    fused = fused_norm(model)
    assert operators(fused) == {"MatMul": 1, "SkipSimplifiedLayerNormalization": 1, "Relu": 1}
    assert len(fused.graph[1].inputs) == 4


def test_the_bias_of_the_layer_before_goes_in() -> None:
    for order in ("(x, linear)", "(linear, x)"):
        fused = fused_norm(network(f"{LINEAR} sum = Add {order} {NORM}"))
        assert operators(fused) == {"MatMul": 1, "SkipLayerNormalization": 1}
        assert len(fused.graph[1].inputs) == 5


def test_a_bias_that_is_read_elsewhere_stays() -> None:
    model = network(f"{LINEAR} sum = Add (x, linear) {NORM}", "float[batch, 6, 8] out, float[batch, 6, 8] linear")
    assert operators(fused_norm(model)) == {"MatMul": 1, "Add": 1, "SkipLayerNormalization": 1}


@pytest.mark.parametrize("use", ["more = Relu (sum)", "more = Identity (sum)"])
def test_a_sum_that_is_read_again_is_the_fourth_output(use: str) -> None:
    model = network(f"sum = Add (x, y) {use} {NORM}", "float[batch, 6, 8] out, float[batch, 6, 8] more")
    fused = fused_norm(model)
    assert operators(fused)["Add"] == 0
    assert [o.name for o in fused.graph[0].outputs][3] == "sum"


def test_a_sum_that_the_model_gives_keeps_its_name() -> None:
    fused = fused_norm(network(f"sum = Add (x, y) {NORM}", "float[batch, 6, 8] out, float[batch, 6, 8] sum"))
    assert [o.name for o in fused.graph.outputs] == ["out", "sum"]


def test_rows_and_columns_are_tokens() -> None:
    body = f"{LINEAR} sum = Add (x, linear) more = Relu (sum) {NORM}"
    fused = fused_norm(network(body, "float[batch, 2, 3, 8] out, float[batch, 2, 3, 8] more", grid=True))
    assert operators(fused) == {"MatMul": 1, "SkipLayerNormalization": 1, "Reshape": 4, "Relu": 1}


def test_a_reshape_between_layer_sum_and_norm_is_looked_through() -> None:
    body = (
        f"{LINEAR} grid = Reshape (linear, to_grid) other = Reshape (x, to_grid) total = Add (other, grid) "
        f"sum = Reshape (total, to_tokens) {NORM} more = Add (sum, out) same = Relu (total)"
    )
    model = network(body, "float[batch, 6, 8] more, float[batch, 2, 3, 8] same")
    fused = fused_norm(model)
    assert operators(fused)["SkipLayerNormalization"] == 1
    assert operators(fused)["Add"] == 1
    skip = next(n for n in fused.graph if n.op_type == "SkipLayerNormalization")
    assert len(skip.inputs) == 5
    assert all(len(i.shape) == 3 for i in skip.inputs[:2])


@pytest.mark.parametrize(
    "body",
    [
        "row = ReduceMean <keepdims = 1> (y) sum = Add (x, row) " + NORM,
        "sum = Mul (x, y) " + NORM,
        "sum = Add (x, y) out = LayerNormalization <axis = 1> (sum, y, y)",
        "sum = Add (x, y) out = LayerNormalization <axis = -1> (sum, scale)",
    ],
    ids=["broadcast", "product", "other-axes", "without-shift"],
)
def test_other_sums_and_norms_are_left_alone(body: str) -> None:
    fused_norm(network(body), expected=0)


@pytest.mark.parametrize(("kind", "operator"), [("none", "BiasGelu"), ("tanh", "FastGelu")])
def test_a_bias_and_its_gelu_are_one_operator(kind: str, operator: str) -> None:
    model = network(f'{LINEAR} out = Gelu <approximate = "{kind}"> (linear)')
    fused = model.clone()
    assert fuse_bias_gelu(fused) == 1
    assert operators(fused) == {"MatMul": 1, operator: 1}
    assert fused.graph[1].name == f"block/Gelu_2/{operator}_1"
    require_same(model, fused)


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (f"{LINEAR} out = Gelu (linear)", "float[batch, 6, 8] out, float[batch, 6, 8] linear"),
        ("linear = Add (x, y) out = Gelu (linear)", "float[batch, 6, 8] out"),
        ("out = Gelu (x)", "float[batch, 6, 8] out"),
    ],
    ids=["sum-is-an-output", "no-bias", "no-sum"],
)
def test_another_gelu_is_left_alone(body: str, outputs: str) -> None:
    assert fuse_bias_gelu(network(body, outputs)) == 0


LAYERS = (
    "a = MatMul (x, weight) first = Add (a, bias) b = MatMul (x, wide) second = Add (bias_wide, b) "
    "left, right = Split <axis = -1, num_outputs = 2> (second) sum = Add (first, left) out = Mul (sum, right)"
)


def test_layers_that_read_the_same_are_one_product() -> None:
    model = network(LAYERS, "float[batch, 6, 8] out, float[batch, 6, 8] first")
    fused = model.clone()
    assert merge_linears(fused) == 1
    assert operators(fused)["MatMul"] == 1
    assert [n.name for n in fused.graph][:3] == [f"block/MatMul_0/{o}" for o in ("MatMul_1", "Add_2", "Split_3")]
    assert [o.name for o in fused.graph[2].outputs] == ["first", "second"]
    require_same(model, fused)


def test_layers_without_a_bias_are_merged_apart_from_those_with_one() -> None:
    model = network(
        "a = MatMul (x, weight) b = MatMul (x, wide) c = MatMul (x, weight) d = Add (c, bias) "
        "left, right = Split <axis = -1, num_outputs = 2> (b) e = Mul (a, left) f = Mul (d, right) out = Add (e, f)"
    )
    fused = model.clone()
    assert merge_linears(fused) == 1
    assert operators(fused)["MatMul"] == 2
    require_same(model, fused)


def test_excluded_layers_are_not_merged() -> None:
    model = network(LAYERS)
    model.graph[2].name = "block.other/MatMul"
    assert merge_linears(model.clone(), ["block.other"]) == 0
    assert merge_linears(model.clone(), ["others"]) == 0  # of another module
    model.graph[2].name = "block/MatMul"
    assert merge_linears(model, ["others"]) == 1


def test_what_moves_nothing_is_dropped() -> None:
    model = network(
        "a = Pad (x, nothing) b = Unsqueeze (a, axis_1) c = Transpose <perm = [0, 2, 3, 1]> (b) "
        "d = Squeeze (c, axis_3) e = Transpose <perm = [0, 2, 1]> (y) "
        "f = Transpose <perm = [0, 2, 1]> (e) out = Add (d, f)"
    )
    fused = model.clone()
    assert drop_idle_movement(fused) == 2
    assert operators(fused) == {"Unsqueeze": 1, "Reshape": 1, "Squeeze": 1, "Transpose": 2, "Add": 1}
    require_same(model, fused)


@pytest.mark.parametrize("body", ["out = Pad (x, nothing)", "padded = Pad (x, something) out = Relu (padded)"])
def test_a_pad_that_is_an_output_or_pads_stays(body: str) -> None:
    assert drop_idle_movement(network(body)) == 0


def test_the_opset_is_raised_only_where_no_kernel_is_lost() -> None:
    plain = network("out = Add (x, y)")
    assert raise_for_attention(plain)
    assert plain.opset_imports[""] == 23
    pooled = network(
        "rows = Reshape (x, to_grid) small = MaxPool <kernel_shape = [1, 1]> (rows) out = Reshape (small, to_tokens)"
    )
    assert not raise_for_attention(pooled)
    assert pooled.opset_imports[""] == 20
