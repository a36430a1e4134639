"""Block operators for ONNX Runtime's CPU: what one takes in, what it leaves alone, and the same numbers."""

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

from attn_deploy.errors import UsageError
from attn_deploy.export.lower.cpu_linear import linear_layers
from attn_deploy.export.lower.cpu_rows import keep_tokens_flat
from attn_deploy.export.lower.cpu_selected_rows import select_rows_early
from attn_deploy.export.lower.cpu_units import fuse_units
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.parity import sqnr_db

Array = np.ndarray[Any, Any]

CHANNELS, HIDDEN = 8, 12


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "weight": normal(8, 8, seed=1),
    "weight_t": normal(8, 8, seed=9),
    "bias": normal(8, seed=2),
    "up": normal(8, 12, seed=3),
    "up_bias": normal(12, seed=4),
    "down": normal(12, 8, seed=5),
    "scale": normal(8, seed=6),
    "shift": normal(8, seed=7),
    "gamma": normal(8, seed=8),
    "position": normal(6, 8, seed=10),
    "per_sample": normal(1, 6, 1, seed=11),
    "half_weight": normal(8, 8, seed=1).astype(np.float16),
    "half": np.float32(0.5), "one": np.float32(1.0), "two": np.float32(2.0), "three": np.float32(3.0),
    "six": np.float32(6.0), "zero": np.float32(0.0), "root_two": np.float32(np.sqrt(2.0)),
    "inverse_root": np.float32(1 / np.sqrt(2.0)), "cubic": np.float32(0.044715), "minus_one": np.float32(-1.0),
    "tanh_scale": np.float32(np.sqrt(2.0 / np.pi)), "quick": np.float32(1.702), "rough": np.float32(0.71),
    "to_grid": np.array([0, 2, 3, 8]), "to_tokens": np.array([0, 6, 8]), "first": np.array(0), "pair": np.array([0, 2]),
    "all_tokens": np.arange(6), "windows": np.array([-1, 1, 2, 3, 1, 8]), "mean_axes": np.array([1]),
}  # fmt: skip


def network(body: str, *outputs: str, grid: bool = False) -> ir.Model:
    """`x` and `y` [batch, 6, 8] ([batch, 2, 3, 8] with `grid`) -> `outputs`, by `body`; shapes are inferred."""
    shape = "float[batch, 2, 3, 8]" if grid else "float[batch, 6, 8]"
    given = ", ".join(f"float[] {name}" for name in outputs or ("out",))
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]>\nnet ({shape} x, {shape} y) => ({given})\n{{\n{body}\n}}'
    )
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(w), n) for n, w in CONSTANTS.items() if n in used
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    for number, node in enumerate(model.graph):
        node.name = f"block/{node.op_type}_{number}"
    return model


def outputs_of(model: ir.Model, batch: int) -> list[Array]:
    feeds = {}
    for number, value in enumerate(model.graph.inputs):
        feeds[str(value.name)] = normal(batch, *list(value.shape)[1:], seed=20 + number)  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def require_same(one: ir.Model, other: ir.Model, min_db: float = 115.0) -> None:
    for batch in (1, 3):
        for expected, got in zip(outputs_of(one, batch), outputs_of(other, batch), strict=True):
            assert got.shape == expected.shape
            assert sqnr_db(expected, got) > min_db


def fused(
    model: ir.Model, levels: dict[str, str] | None = None, kernels: frozenset[str] = frozenset(FORMS)
) -> Counter[str]:
    """Operators after all is fused, and the same numbers by the bodies as before."""
    lowered = model.clone()
    fuse_units(lowered, kernels, levels)
    onnx.checker.check_model(ir.to_proto(lowered))
    require_same(model, lowered)
    return Counter(node.op_type for node in lowered.graph)


NORM = "n = LayerNormalization <axis: int = -1, epsilon: float = 0.01> (x, scale, shift) "
LINEAR = "m = MatMul (x, weight) l = Add (m, bias) "


@pytest.mark.parametrize(
    ("body", "operator"),
    [
        ("out = MatMul (x, weight)", "Linear"),
        (LINEAR + "out = Identity (l)", "Linear"),
        ("m = MatMul (x, weight) out = Add (bias, m)", "Linear"),
        (LINEAR + "out = Relu (l)", "LinearRelu"),
        (LINEAR + "out = Gelu (l)", "LinearGelu"),
        (LINEAR + 'out = Gelu <approximate: string = "tanh"> (l)', "LinearGeluTanh"),
        (LINEAR + "out = HardSwish (l)", "LinearHardswish"),
        (LINEAR + "out = Add (l, y)", "LinearResidual"),
        (LINEAR + "out = Add (y, l)", "LinearResidual"),
        (LINEAR + "out = Add (x, l)", "LinearResidual"),
        (LINEAR + "r = Relu (l) out = Add (r, y)", "LinearReluResidual"),
        (NORM + "m = MatMul (n, weight) out = Add (m, bias)", "NormLinear"),
        ("n = LayerNormalization (x, scale) out = MatMul (n, weight)", "NormLinear"),
        (NORM + "m = MatMul (n, weight) l = Add (m, bias) out = Add (l, y)", "NormLinearResidual"),
        (NORM + "m = MatMul (n, up) l = Add (m, up_bias) out = Gelu (l)", "NormLinearGelu"),
        # a layer scale, before and without a bias, and one number for all channels
        (LINEAR + "s = Mul (l, gamma) out = Add (s, y)", "LinearResidual"),
        (LINEAR + "s = Mul (gamma, l) t = Mul (s, two) out = Add (y, t)", "LinearResidual"),
        ("m = MatMul (x, weight) s = Mul (m, gamma) out = Add (y, s)", "LinearResidual"),
    ],
)  # fmt: skip
def test_linear_layer_takes_in_what_stands_around_it(body: str, operator: str) -> None:
    counts = fused(network(body))
    counts.pop("Identity", None)
    assert counts == {operator: 1}


def test_gemm_on_rows_with_a_transposed_weight() -> None:
    body = "c = Gather <axis: int = 1> (x, first) g = Gemm <transB: int = 1> (c, weight_t, bias) out = Relu (g)"
    assert fused(network(body)) == {"Gather": 1, "LinearRelu": 1}


SPELLINGS = {
    "Silu": ["s = Sigmoid (l) out = Mul (l, s)", "s = Sigmoid (l) out = Mul (s, l)"],
    "Hardswish": [
        "h = HardSigmoid <alpha: float = 0.1666666716337204, beta: float = 0.5> (l) out = Mul (l, h)",
        "a = Add (l, three) c = Clip (a, zero, six) d = Div (c, six) out = Mul (l, d)",
        "a = Add (l, three) r = Relu (a) c = Min (r, six) p = Mul (l, c) out = Div (p, six)",
    ],
    "Gelu": [
        "d = Div (l, root_two) e = Erf (d) p = Add (e, one) m2 = Mul (l, p) out = Mul (m2, half)",
        "d = Mul (l, inverse_root) e = Erf (d) p = Add (one, e) h = Mul (half, l) out = Mul (h, p)",
        "d = Mul (l, inverse_root) e = Erf (d) p = Add (e, one) h = Mul (p, half) out = Mul (h, l)",
        "d = Div (l, root_two) e = Erf (d) p = Sub (e, minus_one) m2 = Mul (l, p) out = Div (m2, two)",
    ],
    "GeluTanh": [
        "c = Pow (l, three) k = Mul (c, cubic) s = Add (l, k) t = Mul (s, tanh_scale) u = Tanh (t) p = Add (u, one) "
        "h = Mul (l, half) out = Mul (h, p)",
        "q = Mul (l, l) c = Mul (q, l) k = Mul (cubic, c) s = Add (k, l) t = Mul (tanh_scale, s) u = Tanh (t) "
        "p = Add (one, u) m2 = Mul (l, p) out = Mul (m2, half)",
    ],
    "Relu": ["out = Max (l, zero)", "out = Clip (l, zero)"],
}


@pytest.mark.parametrize(("activation", "text"), [(name, text) for name, texts in SPELLINGS.items() for text in texts])
def test_activation_is_told_by_its_values(activation: str, text: str) -> None:
    assert fused(network(LINEAR + text)) == {f"Linear{activation}": 1}


@pytest.mark.parametrize(
    "text",
    [
        "q = Mul (l, quick) s = Sigmoid (q) out = Mul (l, s)",  # near GELU, and none
        "d = Mul (l, rough) e = Erf (d) p = Add (e, one) m2 = Mul (l, p) out = Mul (m2, half)",
        "out = Tanh (l)",
        "r = Relu (l) out = Mul (r, gamma)",
        "out = Clip (l, zero, six)",
    ],
)
def test_what_is_none_of_the_activations_stays(text: str) -> None:
    counts = fused(network(LINEAR + text))
    assert counts["Linear"] + counts["LinearRelu"] == 1
    assert sum(counts.values()) > 1


FEED_FORWARD = NORM + "a = MatMul (n, up) b = Add (a, up_bias) h = Gelu (b) c = MatMul (h, down) d = Add (c, bias) "


@pytest.mark.parametrize("tail", ["out = Add (x, d)", "out = Add (d, x)", "s = Mul (d, gamma) out = Add (x, s)"])
def test_feed_forward_block_is_one_operator(tail: str) -> None:
    assert fused(network(FEED_FORWARD + tail)) == {"FeedForwardGelu": 1}


def test_blocks_one_behind_the_other() -> None:
    again = FEED_FORWARD.replace("(x,", "(x2,")
    for name in "nabhcd":
        for before in (f"{name} =", f"({name},", f"({name})"):
            again = again.replace(before, before.replace(name, f"{name}2"))
    model = network(FEED_FORWARD + "x2 = Add (x, d) " + again + "out = Add (x2, d2)")
    assert fused(model) == {"FeedForwardGelu": 2}


@pytest.mark.parametrize(
    ("body", "outputs", "expected"),
    [
        # something else reads a value inside
        (FEED_FORWARD + "o = Add (x, d) out = Add (o, n)", ("out",), {"LinearGelu": 1, "LinearResidual": 1}),
        (FEED_FORWARD + "o = Add (x, d) z = ReduceSum (h) out = Add (o, z)", ("out",),
         {"NormLinearGelu": 1, "LinearResidual": 1}),
        (LINEAR + "r = Relu (l) out = Add (r, m)", ("out",), {"Linear": 1, "Add": 2, "Relu": 1}),
        # a value inside is given out
        (FEED_FORWARD + "out = Add (x, d)", ("out", "h"), {"NormLinearGelu": 1, "LinearResidual": 1}),
        (LINEAR + "out = Relu (l)", ("out", "l"), {"Linear": 1, "Relu": 1}),
        # the residual is another value than the norm's
        (FEED_FORWARD + "out = Add (y, d)", ("out",), {"NormLinearGelu": 1, "LinearResidual": 1}),
        # what is added is broadcast, constant, or no bias
        (LINEAR + "z = ReduceMean (y, mean_axes) out = Add (l, z)", ("out",), {"Linear": 1, "ReduceMean": 1, "Add": 1}),
        (LINEAR + "out = Add (l, position)", ("out",), {"Linear": 1, "Add": 1}),
        ("m = MatMul (x, weight) out = Add (m, per_sample)", ("out",), {"Linear": 1, "Add": 1}),
        # a scale per token is no layer scale, and one behind the activation does not go through it
        (LINEAR + "out = Mul (l, per_sample)", ("out",), {"Linear": 1, "Mul": 1}),
        (LINEAR + "g = Gelu (l) out = Mul (g, gamma)", ("out",), {"LinearGelu": 1, "Mul": 1}),
        # two layers read the norm
        (NORM + "a = MatMul (n, weight) b = MatMul (n, weight_t) out = Add (a, b)", ("out",),
         {"LayerNormalization": 1, "Linear": 1, "LinearResidual": 1}),
        # the norm is over more than the last axis, or gives out its mean
        ("n = LayerNormalization <axis: int = 1> (x, position) out = MatMul (n, weight)", ("out",),
         {"LayerNormalization": 1, "Linear": 1}),
        ("n, mean = LayerNormalization (x, scale) o = MatMul (n, weight) out = Add (o, mean)", ("out",),
         {"LayerNormalization": 1, "Linear": 1, "Add": 1}),
        # no constant weight
        ("t = Transpose <perm: ints = [0, 2, 1]> (y) m = MatMul (x, t) out = Relu (m)", ("out",),
         {"Transpose": 1, "MatMul": 1, "Relu": 1}),
    ],
)  # fmt: skip
def test_what_does_not_belong_is_left_alone(body: str, outputs: tuple[str, ...], expected: dict[str, int]) -> None:
    counts = fused(network(body, *outputs))
    for operator, count in expected.items():
        assert counts[operator] == count, counts
    assert sum(n for op, n in counts.items() if op in FORMS) == sum(n for op, n in expected.items() if op in FORMS)


def test_half_precision_is_not_taken() -> None:
    model = network("h = Cast <to: int = 10> (x) m = MatMul (h, half_weight) out = Cast <to: int = 1> (m)")
    assert list(linear_layers(model)) == []


def test_shared_weight_stays_one_tensor() -> None:
    model = network("a = MatMul (x, weight) b = Relu (a) c = MatMul (b, weight) out = Add (c, bias)")
    assert fused(model) == {"LinearRelu": 1, "Linear": 1}
    lowered = model.clone()
    fuse_units(lowered, frozenset(FORMS), None)
    assert sum(v.const_value.size == 64 for v in lowered.graph.initializers.values()) == 1  # type: ignore[union-attr]


def test_only_what_the_library_has() -> None:
    model = network(FEED_FORWARD + "out = Add (x, d)")
    has = frozenset({"Linear", "LinearGelu"})
    assert fused(model, kernels=has) == {"LayerNormalization": 1, "LinearGelu": 1, "Linear": 1, "Add": 1}
    bare = fused(model, kernels=frozenset({"NormLinear"}))
    assert bare == {"NormLinear": 1, "Gelu": 1, "MatMul": 1, "Add": 2}


def test_levels_are_those_asked_for() -> None:
    model = network(FEED_FORWARD + "out = Add (x, d)")
    assert fused(model, {"block/FeedForward": "linear"}) == {"NormLinearGelu": 1, "LinearResidual": 1}
    assert not fused(model, {}).keys() & FORMS.keys()
    assert not fused(model, {"block/FeedForward": "stock"}).keys() & FORMS.keys()
    with pytest.raises(UsageError, match="no such unit") as caught:
        fused(model, {"blok/FeedForward": "linear"})
    assert "block/FeedForward" in str(caught.value.expected)
    with pytest.raises(UsageError, match="no such level"):
        fused(model, {"block/FeedForward": "site"})


def test_operators_are_named_after_the_layer_and_keep_names_of_values() -> None:
    lowered = network(FEED_FORWARD + "out = Add (x, d)")
    product = next(str(n.name) for n in lowered.graph if n.op_type == "MatMul")
    fuse_units(lowered, frozenset(FORMS), None)
    (node,) = lowered.graph
    assert node.name == f"{product}/FeedForwardGelu"
    assert node.domain == DOMAIN
    assert [o.name for o in lowered.graph.outputs] == ["out"]
    assert [i.name for i in node.inputs] == ["x", "scale", "shift", "up", "up_bias", "down", "bias"]


# -- rows ------------------------------------------------------------------------------------------------------------

WINDOWED = (
    "t = Reshape (x, to_tokens) m = MatMul (t, weight) l = Add (m, bias) g = Reshape (l, to_grid) a = Add (x, g) "
    "n = LayerNormalization (a, scale, shift) "
)


@pytest.mark.parametrize(
    ("body", "reshapes"),
    [
        (WINDOWED + "out = Identity (n)", 2),
        (WINDOWED + "f = Reshape (n, to_tokens) out = MatMul (f, weight_t)", 1),
        (WINDOWED + "f = Reshape (n, to_tokens) p = MatMul (f, weight_t) q = Reshape (p, to_grid) out = Add (a, q)", 2),
        (WINDOWED + "out = Transpose <perm: ints = [0, 3, 1, 2]> (n)", 2),
        (WINDOWED + "out = Reshape (n, windows)", 2),
    ],
)
def test_rows_stay_flat_through_a_stage(body: str, reshapes: int) -> None:
    model = network(body, grid=True)
    flat = model.clone()
    keep_tokens_flat(flat)
    require_same(model, flat)
    assert Counter(n.op_type for n in flat.graph)["Reshape"] == reshapes
    assert [o.name for o in flat.graph.outputs] == ["out"]
    shapes = [list(n.outputs[0].shape or ()) for n in flat.graph if n.op_type in ("MatMul", "LayerNormalization")]
    assert all(len(shape) == 3 for shape in shapes)


@pytest.mark.parametrize(
    "body",
    [
        "out = Relu (x)",  # no row starts here: maps of a convolution stay as they are
        "t = Transpose <perm: ints = [0, 3, 1, 2]> (x) s = Sigmoid (t) out = Mul (t, s)",
    ],
)
def test_maps_are_not_reshaped(body: str) -> None:
    model = network(body, grid=True)
    before = [n.op_type for n in model.graph]
    keep_tokens_flat(model)
    assert [n.op_type for n in model.graph] == before


LAST = FEED_FORWARD + "z = Add (x, d) f = LayerNormalization (z, scale, shift) "


@pytest.mark.parametrize("chosen", ["first", "pair"])
def test_last_layer_is_computed_for_the_tokens_that_are_read(chosen: str) -> None:
    model = network(LAST + f"chosen = Gather <axis: int = 1> (f, {chosen}) out = MatMul (chosen, weight_t)")
    selected = model.clone()
    assert select_rows_early(selected) == 8
    require_same(model, selected)
    assert next(iter(selected.graph)).op_type == "Gather"
    tokens = () if chosen == "first" else (2,)
    for node in selected.graph:
        assert tuple((node.outputs[0].shape or ())[1:-1]) == tokens, node.name


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (LAST + "out = Gather <axis: int = 1> (f, all_tokens)", ("out",)),
        (LAST + "out = Gather <axis: int = 1> (f, first)", ("out", "f")),
        (LAST + "g = Gather <axis: int = 1> (f, first) s = ReduceSum (f) out = Add (g, s)", ("out",)),
        (LAST + "out = Gather <axis: int = 0> (f, first)", ("out",)),
        ("p = Add (x, position) out = Gather <axis: int = 1> (p, first)", ("out",)),
        ("s = Softmax <axis: int = 1> (x) out = Gather <axis: int = 1> (s, first)", ("out",)),
    ],
)
def test_tokens_that_are_read_are_computed(body: str, outputs: tuple[str, ...]) -> None:
    model = network(body, *outputs)
    before = [n.op_type for n in model.graph]
    assert select_rows_early(model) == 0
    assert [n.op_type for n in model.graph] == before
