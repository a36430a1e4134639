"""Operators that lowering makes of a site and its neighbours: reference, function body and shape rule agree.

The references are checked against PyTorch's own layers in float64, the bodies against the references.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from attn_deploy.export.functions import attach_functions
from attn_deploy.ops import BLOCK_FORMS, DOMAIN, FORMS, VERSION
from attn_deploy.ops.activation import ACTIVATIONS
from attn_deploy.ops.form import BODY_OPSET
from attn_deploy.ops.quantized import rows_of_levels, weights
from attn_deploy.ops.quantized_feed_forward import groups_of

Array = np.ndarray[Any, Any]

TOLERANCE = 32 * float(np.finfo(np.float32).eps)
"""Of the reference's largest magnitude: two products with sums of at most 32 terms, and a norm."""

BATCH, TOKENS, CHANNELS, OUT, HEADS, WINDOWS, LENGTH = 2, 12, 10, 7, 2, 4, 3
HIDDEN, GROUPS = 12, 3
EPSILON = 1e-3

OPERATORS = ("Linear", "FeedForward", "AttentionBlock")
FORMS_HERE = [n for n, form in BLOCK_FORMS.items() if form.operator.removeprefix("Quantized") in OPERATORS]
"""Those for tokens; quantized maps have tests of their own."""

TORCH_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "": lambda x: x,
    "Relu": F.relu,
    "Silu": F.silu,
    "Gelu": F.gelu,
    "GeluTanh": lambda x: F.gelu(x, approximate="tanh"),
    "Hardswish": F.hardswish,
}


@dataclass(frozen=True)
class Call:
    form: str
    operands: dict[str, Array]
    attributes: dict[str, float | int]

    def expected(self) -> Array:
        return FORMS[self.form].reference(*self.operands.values(), **self.attributes)[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(a.astype(np.float64)) for name, a in self.operands.items()}

    def body(self) -> Array:
        kinds = {"float32": "float", "int64": "int64", "bool": "bool", "uint8": "uint8"}
        form = FORMS[self.form]
        inputs = ", ".join(f"{kinds[i.dtype]}[] {i.name}" for i in form.inputs)
        given = ", ".join(
            f"{k}: {'float' if isinstance(v, float) else 'int'} = {v}" for k, v in self.attributes.items()
        )
        text = f"""<ir_version: 10, opset_import: ["" : {BODY_OPSET}, "{DOMAIN}" : {VERSION}]>
            one ({inputs}) => (float[] output)
            {{ [blk] output = {DOMAIN}.{self.form} <{given}> ({", ".join(i.name for i in form.inputs)}) }}"""
        model = ir.from_proto(onnx.parser.parse_model(text if given else text.replace("<>", "")))
        attach_functions(model)
        session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
        )
        result: Array = session.run(None, self.operands)[0]
        return result


def call(name: str) -> Call:
    form, rng = FORMS[name], np.random.default_rng(11)
    in_blocks = "AttentionBlock" in form.operator
    out = CHANNELS if "FeedForward" in form.operator else OUT
    keep = rng.random((BATCH, 1, TOKENS, TOKENS)) < 0.6
    keep[..., 0] = True
    keep[1, :, 2] = False  # a query that sees nothing
    shapes = {
        "x": (BATCH, TOKENS, CHANNELS), "weight": (CHANNELS, OUT), "bias": (OUT,), "norm_scale": (CHANNELS,),
        "norm_bias": (CHANNELS,), "residual": (BATCH, TOKENS, OUT), "weight1": (CHANNELS, HIDDEN), "bias1": (HIDDEN,),
        "weight2": (HIDDEN, CHANNELS), "bias2": (out,), "weight_qkv": (CHANNELS, 3 * CHANNELS),
        "bias_qkv": (3 * CHANNELS,), "weight_out": (CHANNELS, CHANNELS), "bias_out": (CHANNELS,),
        "fill": (3, HEADS, CHANNELS // HEADS), "windows_bias": (2, HEADS, LENGTH, LENGTH), "head_scale": (HEADS,),
    }  # fmt: skip
    if in_blocks:
        shapes["bias"] = (1, HEADS, TOKENS, TOKENS)
    index = rng.permutation(TOKENS).reshape(WINDOWS, LENGTH)
    given: dict[str, Array] = {
        "mask": keep,
        "index": np.where(index > 8, -1, index) if "Padded" in name else index,
        "bias_index": np.arange(WINDOWS) % 2,
    }
    shapes |= {f"{name}_scale": shapes[name][1:] for name in list(shapes) if name.startswith("weight")}
    for i in form.inputs:
        if i.dtype == "uint8":
            given[i.name] = rng.integers(1, 256, shapes[i.name]).astype(np.uint8)
            given[f"{i.name}_scale"] = rng.uniform(0.004, 0.012, shapes[i.name][1:]).astype(np.float32)
    operands = {
        i.name: given[i.name] if i.name in given else rng.standard_normal(shapes[i.name]).astype(np.float32)
        for i in form.inputs
    }
    attributes = {"epsilon": EPSILON, "heads": HEADS, "scale": 0.4, "softcap": 1.5, "tokens": TOKENS, "groups": GROUPS}
    return Call(name, operands, {key: attributes[key] for key in form.attributes})


def assert_close(got: Array, expected: Array) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max())))


@pytest.mark.parametrize("name", FORMS_HERE)
def test_function_body_computes_the_reference(name: str) -> None:
    made = call(name)
    assert_close(made.body(), made.expected())


@pytest.mark.parametrize("name", FORMS_HERE)
def test_shape_rule_gives_the_shape_that_comes_out(name: str) -> None:
    made = call(name)
    shapes = [a.shape for a in made.operands.values()]
    assert FORMS[name].infer_shapes(*shapes, **made.attributes) == (made.expected().shape,)


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMS if BLOCK_FORMS[name].operator == "Linear"])
def test_linear_is_what_torch_computes(name: str) -> None:
    made = call(name)
    t = made.tensors()
    x = F.layer_norm(t["x"], (CHANNELS,), t["norm_scale"], t["norm_bias"], EPSILON) if "Norm" in name else t["x"]
    activation = name.removeprefix("Norm").removeprefix("Linear").removesuffix("Residual")
    expected = TORCH_ACTIVATIONS[activation](F.linear(x, t["weight"].T, t["bias"])) + t.get("residual", 0.0)
    np.testing.assert_allclose(made.expected(), expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["Gelu", "Relu", "Silu", "GeluTanh"])
def test_feed_forward_is_what_torch_computes(activation: str) -> None:
    made = call("FeedForward" + activation)
    t = made.tensors()
    x = F.layer_norm(t["x"], (CHANNELS,), t["norm_scale"], t["norm_bias"], EPSILON)
    hidden = TORCH_ACTIVATIONS[activation](F.linear(x, t["weight1"].T, t["bias1"]))
    expected = t["x"] + F.linear(hidden, t["weight2"].T, t["bias2"])
    np.testing.assert_allclose(made.expected(), expected.numpy(), rtol=1e-12, atol=1e-12)


def test_attention_block_is_what_torch_computes() -> None:
    made = call("AttentionBlock")
    t = made.tensors()
    x = F.layer_norm(t["x"], (CHANNELS,), t["norm_scale"], t["norm_bias"], EPSILON)
    qkv = F.linear(x, t["weight_qkv"].T, t["bias_qkv"]).reshape(BATCH, TOKENS, 3, HEADS, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(query, key, value, scale=0.4).transpose(1, 2).flatten(2)
    expected = t["x"] + F.linear(attended, t["weight_out"].T, t["bias_out"])
    np.testing.assert_allclose(made.expected(), expected.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_far_from_zero(activation: str) -> None:
    """No overflow, no cancellation; at -inf what has a limit gives the limit."""
    x = np.array([-np.inf, -1000.0, -30.0, -8.0, -1e-20, 0.0, 1e-20, 8.0, 1000.0, np.inf])
    got = ACTIVATIONS[activation](x)
    assert got[-2] == 1000.0
    assert got[-1] == np.inf
    if activation:
        assert abs(got[0]) == 0.0
        np.testing.assert_allclose(got[1:-1], TORCH_ACTIVATIONS[activation](torch.from_numpy(x))[1:-1], atol=1e-14)
    assert np.isnan(ACTIVATIONS[activation](np.array([np.nan]))).all()


def test_there_is_an_attention_block_for_every_packed_attention() -> None:
    packed = [name for name in FORMS if name.startswith("PackedAttention")]
    assert [n for n in BLOCK_FORMS if n.startswith("AttentionBlock")] == [
        n.replace("PackedAttention", "AttentionBlock") for n in packed
    ]


# -- in 8 bits ---------------------------------------------------------------------------------------------------------


def test_there_is_a_quantized_form_of_every_form() -> None:
    for operator in OPERATORS:
        floating = [name for name, form in BLOCK_FORMS.items() if form.operator == operator]
        quantized = [name for name, form in BLOCK_FORMS.items() if form.operator == f"Quantized{operator}"]
        assert quantized == [f"Quantized{name}" for name in floating]


@pytest.mark.parametrize("name", [name for name in FORMS_HERE if name.startswith("Quantized")])
def test_quantized_form_is_near_the_one_in_floating_point(name: str) -> None:
    """On the weights that it holds: what is left are the levels of activations, 255 for the range of a row."""
    made = call(name)
    floating = FORMS[name.removeprefix("Quantized")]
    held = {
        key: weights(a, made.operands[f"{key}_scale"]) if a.dtype == np.uint8 else a for key, a in made.operands.items()
    }
    given = [held[i.name] for i in floating.inputs]
    expected = floating.reference(*given, **{key: made.attributes[key] for key in floating.attributes})[0]
    error, power = np.square(made.expected() - expected).mean(), np.square(expected).mean()
    assert 0 < error < power * 1e-3


def test_a_level_is_a_step_of_the_row_s_own_range() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 30)) * np.logspace(-6, 6, 40)[:, None] + rng.standard_normal((40, 1))
    step = (np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0)) / 255
    levels = rows_of_levels(rows) / step[:, None]
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-9)
    assert (np.abs(rows_of_levels(rows) - rows) <= 1.0001 * step[:, None]).all()
    np.testing.assert_array_equal(rows_of_levels(np.zeros((2, 5))), 0.0)
    np.testing.assert_allclose(rows_of_levels(np.array([[1.0, 1.0]])), 1.0)
    np.testing.assert_allclose(rows_of_levels(np.array([[-3.0, -1.5]])), [[-3.0, -1.5]], atol=3 / 255)


def body_and_reference(name: str, **operands: Array) -> tuple[Array, Array]:
    made = call(name)
    made = Call(name, made.operands | operands, made.attributes)
    with np.errstate(invalid="ignore"):
        return made.body(), made.expected()


@pytest.mark.parametrize("name", ["QuantizedLinear", "QuantizedNormLinearGeluResidual", "QuantizedFeedForwardRelu"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_gives_one_that_is_not_and_no_other(name: str, bad: float) -> None:
    x = call(name).operands["x"].copy()
    x[1, 3, 4] = bad
    for result in body_and_reference(name, x=x):
        finite = np.isfinite(result).all(axis=-1)
        assert not finite[1, 3]
        assert finite.sum() == finite.size - 1


def test_a_row_of_zeros_gives_exactly_the_bias() -> None:
    x = call("QuantizedLinear").operands["x"].copy()
    x[0, 2] = 0.0
    for result in body_and_reference("QuantizedLinear", x=x):
        np.testing.assert_array_equal(result[0, 2].astype(np.float32), call("QuantizedLinear").operands["bias"])


@pytest.mark.parametrize("weight", [1, 255])
def test_no_sum_saturates(weight: int) -> None:
    """The largest products there are, all of one sign, more of them than float32 counts exactly."""
    rows = np.concatenate([np.full((1, 2, 4000), 255.0), np.full((1, 2, 4000), -255.0)]).astype(np.float32)
    given = {
        "x": rows, "weight": np.full((4000, 7), weight, np.uint8), "weight_scale": np.ones(7, np.float32),
        "bias": np.zeros(7, np.float32),
    }  # fmt: skip
    body, reference = body_and_reference("QuantizedLinear", **given)
    np.testing.assert_array_equal(np.abs(reference), 4000 * 255 * 127)
    np.testing.assert_allclose(body, reference, rtol=1e-6)


@pytest.mark.parametrize(
    ("hidden", "groups"),
    [(768, 2), (1536, 3), (3072, 6), (384, 1), (512, 1), (516, 3), (24, 1), (2048, 4), (30, None), (4 * 131, None)],
)
def test_hidden_layer_is_cut_into_as_few_groups_as_there_can_be(hidden: int, groups: int | None) -> None:
    assert groups_of(hidden) == groups


X, SQUARE = (2, 5, 8), ((8,), (8,), (8, 24), (24,), (8, 8), (8,))


@pytest.mark.parametrize(
    ("form", "shapes", "attributes", "says"),
    [
        ("Linear", [(8,), (8, 4), (4,)], {}, "rank 2 or more"),
        ("Linear", [X, (4, 8), (8,)], {}, r"weight must be \[8, out\]"),
        ("Linear", [X, (8, 4), (8,)], {}, r"bias must be \[4\]"),
        ("NormLinear", [X, (8, 4), (4,), (4,), (4,)], {"epsilon": 0.1}, r"must be \[8\]"),
        ("LinearResidual", [X, (8, 4), (4,), (1, 5, 4)], {}, r"residual must be \(2, 5, 4\)"),
        ("FeedForwardGelu", [X, (8,), (8,), (8, 9), (9,), (9, 4), (4,)], {"epsilon": 0.1}, r"weight2 must be \[9, 8\]"),
        ("FeedForwardGelu", [X, (8,), (4,), (8, 9), (9,), (9, 8), (8,)], {"epsilon": 0.1}, "norm_bias"),
        ("AttentionBlock", [X[1:], *SQUARE], {"epsilon": 0.1, "heads": 2, "scale": 1.0}, "x must be"),
        ("AttentionBlock", [X, *SQUARE], {"epsilon": 0.1, "heads": 3, "scale": 1.0}, "no multiple of heads"),
        ("AttentionBlockBias", [X, *SQUARE, (1, 2, 5, 4)], {"epsilon": 0.1, "heads": 2, "scale": 1.0}, "broadcast"),
        ("QuantizedLinear", [X, (8, 4), (8,), (4,)], {}, r"weight_scale must be \[4\]"),
        ("QuantizedLinear", [X, (8, 4), (4,), (5,)], {}, r"bias must be \[4\]"),
        ("QuantizedLinear", [(2, 65537), (65537, 1), (1,), (1,)], {}, "65536 inputs"),
        (
            "QuantizedFeedForwardGelu",
            [X, (8,), (8,), (8, 9), (9,), (9,), (9, 8), (8,), (8,)],
            {"epsilon": 0.1, "groups": 2},
            "2 equal groups",
        ),
        (
            "QuantizedAttentionBlock",
            [X, (8,), (8,), (8, 24), (24,), (24,), (8, 8), (24,), (8,)],
            {"epsilon": 0.1, "heads": 2, "scale": 1.0},
            r"weight_scale must be \[8\]",
        ),
    ],
)
def test_shape_rule_names_the_shape_that_does_not_fit(
    form: str, shapes: list[tuple[int, ...]], attributes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        FORMS[form].infer_shapes(*shapes, **attributes)


@pytest.mark.parametrize(
    ("form", "shapes", "attributes", "by_hand"),
    [
        ("NormLinearGelu", [X, (8, 4), (4,), (8,), (8,)], {"epsilon": 0.1}, 2 * 5 * 8 * 4),
        ("FeedForwardGelu", [X, (8,), (8,), (8, 9), (9,), (9, 8), (8,)], {"epsilon": 0.1}, 2 * 5 * 8 * 9 * 2),
        # three projections and one back, then 2 x 2 heads x 5 x 5 scores of 4 products before and 4 after
        ("AttentionBlock", [X, *SQUARE], {"epsilon": 0.1, "heads": 2, "scale": 1.0}, 2 * 5 * 8 * 32 + 100 * 8),
        # 5 tokens in 3 windows of 2, one place padded: 2 x 3 windows x 2 heads x 2 x 2 scores
        ("AttentionBlockIndexedPadded", [X, *SQUARE, (3, 2), (3, 2, 4)],
         {"epsilon": 0.1, "heads": 2, "scale": 1.0, "tokens": 5}, 2 * 5 * 8 * 32 + 48 * 8),
        ("QuantizedNormLinear", [X, (8, 4), (4,), (4,), (8,), (8,)], {"epsilon": 0.1}, 2 * 5 * 8 * 4),
        ("QuantizedFeedForwardGelu", [X, (8,), (8,), (8, 9), (9,), (9,), (9, 8), (8,), (8,)],
         {"epsilon": 0.1, "groups": 3}, 2 * 5 * 8 * 9 * 2),
        ("QuantizedAttentionBlock", [X, (8,), (8,), (8, 24), (24,), (24,), (8, 8), (8,), (8,)],
         {"epsilon": 0.1, "heads": 2, "scale": 1.0}, 2 * 5 * 8 * 32 + 100 * 8),
    ],
)  # fmt: skip
def test_multiply_adds_are_those_counted_by_hand(
    form: str, shapes: list[tuple[int, ...]], attributes: dict[str, Any], by_hand: int
) -> None:
    assert FORMS[form].multiply_adds(*shapes, **attributes) == by_hand
