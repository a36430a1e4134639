"""Every operator form: its ONNX function body, its torch op and its shape rule against its float64 reference."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attn_deploy.export import torch_ops
from attn_deploy.export.forms import form_and_operands
from attn_deploy.export.functions import attach_functions
from attn_deploy.ops import BLOCK_FORMS, DOMAIN, FORMS, VERSION
from attn_deploy.ops.form import BODY_OPSET
from attn_deploy.ops.packed_attention import FORMS as PACKED_FORMS

Array = np.ndarray[Any, Any]
Attributes = Mapping[str, float | int]
ONNX_TYPES = {"float32": "float", "int64": "int64", "bool": "bool"}

CANONICAL_FORMS = {name: form for name, form in FORMS.items() if name not in BLOCK_FORMS}
"""Those that only lowering makes have no torch op; their cases are in test_block_ops.py."""

TOLERANCE = 16 * float(np.finfo(np.float32).eps)
"""Of the reference's largest magnitude: sums of at most 64 products in float32."""


def open_text(text: str) -> onnxruntime.InferenceSession:
    model = ir.from_proto(onnx.parser.parse_model(text))
    attach_functions(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _newest_opset() -> int:
    for opset in range(onnx.defs.onnx_opset_version(), BODY_OPSET, -1):
        try:
            open_text(
                f'<ir_version: 10, opset_import: ["" : {opset}]> g (float[n] x) => (float[n] y) {{ y = Relu (x) }}'
            )
        except Exception:  # ONNX Runtime knows fewer opsets than onnx
            continue
        return opset
    return BODY_OPSET


OPSETS = (BODY_OPSET, _newest_opset())


@functools.cache
def one_node(name: str, attributes: tuple[tuple[str, float | int], ...], opset: int) -> onnxruntime.InferenceSession:
    """A model of one operator with its body; nothing is known of its shapes beforehand."""
    form = FORMS[name]
    given = ", ".join(f"{key}: {'float' if isinstance(v, float) else 'int'} = {v}" for key, v in attributes)
    given = f"<{given}>" if given else ""
    inputs = ", ".join(f"{ONNX_TYPES[i.dtype]}[] {i.name}" for i in form.inputs)
    outputs = ", ".join(f"float[] {o}" for o in form.outputs)
    return open_text(
        f"""<ir_version: 10, opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>
        one_node ({inputs}) => ({outputs})
        {{
            [site] {", ".join(form.outputs)} = {DOMAIN}.{name} {given} ({", ".join(i.name for i in form.inputs)})
        }}"""
    )


@dataclass(frozen=True)
class Case:
    form: str
    about: str
    make: Callable[[np.random.Generator], list[Array]]
    attributes: Attributes

    def __str__(self) -> str:
        return f"{self.form}-{self.about}"

    def arrays(self) -> list[Array]:
        return self.make(np.random.default_rng(7))

    def expected(self) -> tuple[Array, ...]:
        return FORMS[self.form].reference(*self.arrays(), **self.attributes)

    def run_body(self, opset: int) -> list[Array]:
        names = [i.name for i in FORMS[self.form].inputs]
        feeds = dict(zip(names, self.arrays(), strict=True))
        return list(one_node(self.form, tuple(self.attributes.items()), opset).run(None, feeds))


def floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def some_keys(rng: np.random.Generator, *shape: int) -> Array:
    """A mask under which every query sees the first key at least."""
    keep: Array = rng.random(shape) < 0.5
    keep[..., 0] = True
    return keep


def biased_and_masked(
    rng: np.random.Generator, form: str, *, heads: int, bias: tuple[int, ...], mask: tuple[int, ...]
) -> list[Array]:
    """The optional inputs that the form's name asks for."""
    extra = [4 * np.abs(floats(rng, heads))] if "Cosine" in form else []
    extra += [floats(rng, *bias)] if "Bias" in form else []
    return extra + ([some_keys(rng, *mask)] if "Mask" in form else [])


# batch, query_len, key_len, heads, head_dim, value_dim
ATTENTION_SIZES = {
    "one token": (1, 1, 1, 1, 1, 1),
    "primes": (3, 7, 7, 5, 11, 11),
    "value_dim below head_dim": (1, 5, 5, 2, 8, 3),
    "value_dim above head_dim": (3, 5, 5, 2, 3, 8),
    "one query of many keys": (3, 1, 13, 2, 4, 4),
    "more keys than queries": (1, 4, 13, 2, 8, 8),
    "fewer keys than queries": (3, 13, 4, 2, 8, 8),
    "whole vectors": (1, 16, 16, 2, 64, 64),
}
PACKED_SIZES = {
    "one token": (1, 1, 1, 1),
    "primes": (3, 7, 5, 11),
    "one head": (1, 13, 1, 8),
    "whole vectors": (1, 16, 2, 64),
}  # batch, tokens, heads, head_dim


def attention_case(form: str, size: str, bias_rows: str = "of its own") -> Case:
    batch, query_len, key_len, heads, head_dim, value_dim = ATTENTION_SIZES[size]
    kv_heads = heads
    if "Grouped" in form:
        heads *= 3

    def make(rng: np.random.Generator) -> list[Array]:
        leading = {
            "of its own": (batch, heads),
            "shared by the batch": (1, heads),
            "shared by the heads": (batch, 1),
            "shared by all": (1, 1),
        }[bias_rows]
        return [
            floats(rng, batch, query_len, heads, head_dim),
            floats(rng, batch, key_len, kv_heads, head_dim),
            floats(rng, batch, key_len, kv_heads, value_dim),
            *biased_and_masked(
                rng, form, heads=heads, bias=(*leading, query_len, key_len), mask=(*leading, query_len, key_len)
            ),
        ]

    about = size if bias_rows == "of its own" else f"{size}, bias and mask {bias_rows}"
    return Case(form, about, make, scaled(form, 0.375))


def scaled(form: str, scale: float) -> Attributes:
    """The attributes of an attention form; the cap is in the range of the scores, so that it bends them."""
    return {"scale": scale} | ({"softcap": 1.5} if "Softcap" in form else {})


def key_mask_case(form: str) -> Case:
    """A mask of keys alone, as padded text has: [batch, 1, 1, key_len]."""

    def make(rng: np.random.Generator) -> list[Array]:
        arrays = [floats(rng, 3, n, 2, 4) for n in (5, 7, 7)]
        return arrays + biased_and_masked(rng, form, heads=2, bias=(1, 2, 5, 7), mask=(3, 1, 1, 7))

    return Case(form, "mask of keys", make, scaled(form, 0.5))


def large_scores_case(form: str) -> Case:
    """Scores in the thousands: their exponential alone overflows."""
    heads = 6 if "Grouped" in form else 2

    def make(rng: np.random.Generator) -> list[Array]:
        arrays = [floats(rng, 1, 5, count, 4) for count in (heads, 2, 2)]
        return arrays + biased_and_masked(rng, form, heads=heads, bias=(1, heads, 5, 5), mask=(1, heads, 5, 5))

    return Case(form, "scores in the thousands", make, scaled(form, 1024.0))


def packed_case(form: str, size: str) -> Case:
    batch, tokens, heads, head_dim = PACKED_SIZES[size]

    def make(rng: np.random.Generator) -> list[Array]:
        optional = biased_and_masked(
            rng, form, heads=heads, bias=(1, heads, tokens, tokens), mask=(batch, 1, tokens, tokens)
        )
        return [floats(rng, batch, tokens, 3, heads, head_dim), *optional]

    return Case(form, size, make, scaled(form, 0.375))


INDEX_MAPS = {
    "one window of one token": [[0]],
    "windows in order": [[0, 1, 2], [3, 4, 5]],
    "windows out of order": [[5, 0, 3], [2, 4, 1]],
    "as many windows as tokens": [[2], [0], [1]],
}
PADDED_MAPS = {
    **INDEX_MAPS,
    "padding inside and behind": [[3, -1, 0], [1, 2, -1]],
    "a window of padding alone": [[0, 1], [-1, -1], [2, 3]],
    "tokens in no window": [[6, 0], [2, 4]],
}


def indexed_case(form: str, about: str, batch: int) -> Case:
    index = np.array(PADDED_MAPS[about], np.int64)
    windows, length = index.shape
    tokens, heads, head_dim = int(index.max()) + 1, 2, 5

    def make(rng: np.random.Generator) -> list[Array]:
        arrays = [floats(rng, batch, tokens, 3, heads, head_dim), index]
        arrays += [floats(rng, 3, heads, head_dim)] if "Padded" in form else []
        arrays += [4 * np.abs(floats(rng, heads))] if "Cosine" in form else []
        if "Bias" in form:  # fewer biases than windows, in no order
            distinct = max(1, windows - 1)
            chosen = np.array([distinct - 1, *rng.integers(0, distinct, windows - 1)], np.int64)
            arrays += [floats(rng, distinct, heads, length, length), chosen]
        return arrays

    return Case(form, f"{about}, batch {batch}", make, {"scale": 0.5, "tokens": tokens})


def pool_case(form: str, *shape: int) -> Case:
    # below zero throughout: a maximum that starts at 0 shows
    return Case(form, "x".join(map(str, shape)), lambda rng: [floats(rng, *shape) - 10.0], {})


GATE_SHAPES = {
    "gate per channel": ((3, 5, 7, 11), (3, 5, 1, 1)),
    "gate per pixel": ((3, 5, 7, 11), (3, 1, 7, 11)),
    "full gate": ((1, 5, 3, 2), (1, 5, 3, 2)),
    "one gate for the batch": ((3, 2, 3, 3), (1, 2, 1, 1)),
    "one element": ((1, 1, 1, 1), (1, 1, 1, 1)),
    "tokens": ((3, 7, 5), (3, 1, 5)),
}


def gate_case(form: str, about: str) -> Case:
    x, gate = GATE_SHAPES[about]

    def make(rng: np.random.Generator) -> list[Array]:
        arrays = [floats(rng, *x) * 4, rng.random(gate, np.float32)]
        return [*arrays, floats(rng, *x)] if "Residual" in form else arrays

    return Case(form, about, make, {})


def channel_attention_case(form: str, size: str) -> Case:
    batch, tokens, heads, head_dim = PACKED_SIZES[size]

    def make(rng: np.random.Generator) -> list[Array]:
        qkv = floats(rng, batch, tokens, 3, heads, head_dim)
        qkv[:, :, :2, 0, 0] = 0.0  # a channel of length zero: divided by the least length, not by zero
        if form.endswith("ChannelsFirst"):
            qkv = np.ascontiguousarray(np.moveaxis(qkv, 1, -1))
        return [qkv, rng.uniform(0.5, 2.0, heads).astype(np.float32)]

    return Case(form, size, make, {})


# batch, groups, tokens, channels
CONTEXT_SIZES = {
    "one token": (1, 1, 1, 1),
    "primes": (3, 2, 7, 5),
    "one group": (3, 1, 64, 11),
    "pixels": (1, 4, 16, 8),
}


def context_pool_case(form: str, size: str, largest_score: float = 4.0) -> Case:
    batch, groups, tokens, channels = CONTEXT_SIZES[size]
    values = (batch, channels, groups, tokens) if form.endswith("ChannelsFirst") else (batch, tokens, channels)

    def make(rng: np.random.Generator) -> list[Array]:
        return [largest_score * floats(rng, batch, groups, tokens), floats(rng, *values)]

    return Case(form, f"{size}, scores to {largest_score}", make, {})


BRANCH_SHAPES = {
    "score per channel": ((3, 2, 5, 7, 11), (3, 2, 5, 1, 1)),
    "score per pixel": ((3, 3, 5, 2, 3), (3, 3, 1, 2, 3)),
    "one score per branch": ((1, 4, 3, 2, 2), (1, 4, 1, 1, 1)),
    "one branch": ((2, 1, 3, 2, 2), (2, 1, 3, 1, 1)),
}


def branch_pool_case(about: str) -> Case:
    x, scores = BRANCH_SHAPES[about]
    return Case("BranchPool", about, lambda rng: [floats(rng, *x), 4 * floats(rng, *scores)], {})


def hard_attention_case(tokens: int, k: int, distinct: int = 0) -> Case:
    """With `distinct` scores there are ties, which the lower token wins."""

    def make(rng: np.random.Generator) -> list[Array]:
        scores = rng.integers(0, distinct, (3, tokens)).astype(np.float32) if distinct else floats(rng, 3, tokens)
        return [scores, floats(rng, 3, tokens, 5)]

    return Case("HardAttention", f"{k} of {tokens}" + (", with ties" if distinct else ""), make, {"k": k})


def rotary_case(form: str, about: str) -> Case:
    batch, tokens, heads, head_dim = {"smallest": (1, 1, 1, 2), "primes": (3, 7, 5, 22), "own": (3, 5, 2, 8)}[about]

    def make(rng: np.random.Generator) -> list[Array]:
        angles = floats(rng, batch if about == "own" else 1, tokens, head_dim)  # of its own: every channel differs
        angles[:, 0] = 0.0
        return [floats(rng, batch, tokens, heads, head_dim), np.cos(angles), np.sin(angles)]

    return Case(form, f"{about}, angles {'of each sample' if about == 'own' else 'shared'}", make, {})


def _pooling_cases(name: str) -> list[Case]:
    """Of the softmax that is not between tokens, and of what stands around attention."""
    if name.startswith("ChannelAttention"):
        return [channel_attention_case(name, size) for size in PACKED_SIZES]
    if name.startswith("ContextPool"):
        ordinary = [context_pool_case(name, size) for size in CONTEXT_SIZES]
        return [*ordinary, context_pool_case(name, "primes", largest_score=4096.0)]
    if name == "BranchPool":
        return [branch_pool_case(about) for about in BRANCH_SHAPES]
    if name == "HardAttention":
        return [hard_attention_case(*n) for n in ((1, 1), (7, 1), (13, 4), (9, 9), (16, 1, 3), (16, 11, 3))]
    if name.startswith("RotaryEmbedding"):
        return [rotary_case(name, about) for about in ("smallest", "primes", "own")]
    return []


def _cases() -> list[Case]:
    cases: list[Case] = []
    for name, form in CANONICAL_FORMS.items():
        if form.operator == "Attention":
            cases += [attention_case(name, size) for size in ATTENTION_SIZES]
            if "Cosine" not in name:  # cosines times their scale stay small
                cases.append(large_scores_case(name))
            if "Bias" in name or "Mask" in name:
                shared = ("shared by the batch", "shared by the heads", "shared by all")
                cases += [attention_case(name, "primes", rows) for rows in shared]
            if "Mask" in name and "Grouped" not in name:
                cases.append(key_mask_case(name))
        elif "Indexed" in name:
            maps = PADDED_MAPS if "Padded" in name else INDEX_MAPS
            cases += [indexed_case(name, about, batch) for about in maps for batch in (1, 3)]
        elif form.operator == "PackedAttention":
            cases += [packed_case(name, size) for size in PACKED_SIZES]
        elif form.operator in ("ChannelPool", "SpatialPool"):
            cases += [pool_case(name, *shape) for shape in ((1, 1, 1, 1), (3, 5, 7, 11), (1, 16, 1, 13), (2, 3, 8, 8))]
        elif form.operator == "Gate":
            cases += [gate_case(name, about) for about in GATE_SHAPES]
        cases += _pooling_cases(name)
    return cases


CASES = _cases()


def assert_close(got: Array, expected: Array) -> None:
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * max(1.0, float(np.abs(expected).max())))


def torch_operator(form: str) -> str:
    """The torch op that stands for the form."""
    if form.startswith("PackedAttentionIndexed"):
        return "packed_attention_indexed"
    pools = {"ChannelPoolMean": "_mean", "ChannelPoolMax": "_max", "ChannelPoolMeanMax": "_mean_max"}
    if form in pools:
        return "channel_pool" + pools[form]
    return re.sub("(?<!^)(?=[A-Z])", "_", FORMS[form].operator).lower()


FORM_ARGUMENTS: dict[str, list[Any]] = {
    "ChannelAttention": [False, False],
    "ChannelAttentionUnscaled": [True, False],
    "ChannelAttentionChannelsFirst": [False, True],
    "ChannelAttentionUnscaledChannelsFirst": [True, True],
    "ContextPool": [False],
    "ContextPoolChannelsFirst": [True],
    "BranchPool": [],
    "RotaryEmbedding": [False],
    "RotaryEmbeddingInterleaved": [True],
    **{f"SpatialPool{order}": [order] for order in ("Mean", "Max", "MeanMax", "MaxMean")},
}
"""What the torch op is told besides its tensors, by form, where that follows from the form's name alone."""


def torch_arguments(case: Case) -> list[Any]:
    """The torch op's arguments: what the form lacks is None."""
    names = [i.name for i in FORMS[case.form].inputs]
    given = {name: torch.from_numpy(a) for name, a in zip(names, case.arrays(), strict=True)}
    if case.form in FORM_ARGUMENTS:
        return [*given.values(), *FORM_ARGUMENTS[case.form]]
    operator = torch_operator(case.form)
    if operator == "hard_attention":
        return [*given.values(), case.attributes["k"]]
    if operator == "gate":
        activation = case.form.removeprefix("Gate").removeprefix("Residual")
        return [given["x"], given["gate"], given.get("residual"), activation]
    if operator.startswith("channel_pool"):
        return [given["x"]]
    scale, softcap = float(case.attributes["scale"]), float(case.attributes.get("softcap", 0.0))
    if operator == "packed_attention_indexed":
        bias = [given.get("windows_bias"), given.get("bias_index")]
        return [given["qkv"], given["index"], given.get("fill"), given.get("head_scale"), *bias, scale]
    parts = [given["query"], given["key"], given["value"]] if operator == "attention" else [given["qkv"]]
    extra = [given.get("bias"), given.get("mask"), given.get("head_scale")]
    return [*parts, *extra, scale, softcap, "Causal" in case.form]


def torch_outputs(case: Case, arguments: list[Any]) -> tuple[torch.Tensor, ...]:
    result = getattr(torch_ops, torch_operator(case.form))(*arguments)
    return result if isinstance(result, tuple) else (result,)


def test_every_form_has_a_case() -> None:
    assert {case.form for case in CASES} == set(CANONICAL_FORMS)


LAST_OF_FORM = {case.form: case for case in CASES}
"""What a newer opset changes in a body shows at any size: in `make test` at one of each form."""


@pytest.mark.parametrize(
    ("case", "opset"),
    [
        pytest.param(
            case, opset, id=f"{case}-opset {opset}",
            marks=() if opset == BODY_OPSET or LAST_OF_FORM[case.form] is case else pytest.mark.slow,
        )
        for opset in OPSETS
        for case in CASES
    ],
)  # fmt: skip
def test_function_body_computes_the_reference(case: Case, opset: int) -> None:
    for got, expected in zip(case.run_body(opset), case.expected(), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_op_computes_the_reference(case: Case) -> None:
    outputs = torch_outputs(case, torch_arguments(case))
    for got, expected in zip(outputs, case.expected(), strict=True):
        assert_close(got.numpy(), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shape_rule_gives_the_shapes_that_come_out(case: Case) -> None:
    form = FORMS[case.form]
    shapes = form.infer_shapes(*(a.shape for a in case.arrays()), **case.attributes)
    assert shapes == tuple(e.shape for e in case.expected())
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in torch_arguments(case)]
    with mode:
        assert tuple(tuple(o.shape) for o in torch_outputs(case, fakes)) == shapes


@pytest.mark.parametrize("case", {case.form: case for case in CASES}.values(), ids=lambda case: case.form)
def test_exporter_picks_the_form_from_what_is_given(case: Case) -> None:
    form, operands, attributes = form_and_operands(torch_operator(case.form), torch_arguments(case))
    assert form is FORMS[case.form]
    assert len(operands) == len(form.inputs)
    assert attributes == case.attributes


def masked_row_case(form: str) -> Case:
    """Of three samples the second sees nothing at all, and the third's last query sees nothing."""
    heads = 3 if "Grouped" in form else 1

    def make(rng: np.random.Generator) -> list[Array]:
        if form.startswith("Packed"):
            arrays = [floats(rng, 3, 5, 3, 2, 4)]
        else:
            arrays = [floats(rng, 3, 5, 2 * heads, 4), *(floats(rng, 3, 5, 2, 4) for _ in range(2))]
        extra = biased_and_masked(rng, form, heads=2 * heads, bias=(3, 2 * heads, 5, 5), mask=(3, 1, 5, 5))
        extra[-1][1] = False
        extra[-1][2, :, 4] = False
        return arrays + extra

    return Case(form, "masked rows", make, scaled(form, 0.5))


MASKED_FORMS = [name for name in CANONICAL_FORMS if name.endswith("Mask")]


@pytest.mark.parametrize("form", MASKED_FORMS)
def test_fully_masked_row_gives_exactly_zero(form: str) -> None:
    case = masked_row_case(form)
    expected = case.expected()[0]
    results = {
        "reference": expected,
        "torch": torch_outputs(case, torch_arguments(case))[0].numpy(),
        **{f"opset {opset}": case.run_body(opset)[0] for opset in OPSETS},
    }
    for name, got in results.items():
        assert not got[1].any(), name
        assert not got[2, 4].any(), name
        assert got[0].all(), name
        assert_close(got, expected)


def test_causal_query_sees_no_later_key() -> None:
    """Values of later keys are changed: what earlier queries give stays bit for bit."""
    rng = np.random.default_rng(3)
    query, key, value = (floats(rng, 1, n, 2, 4) for n in (3, 6, 6))
    session = one_node("AttentionCausal", (("scale", 0.5),), BODY_OPSET)
    before = session.run(None, {"query": query, "key": key, "value": value})[0]
    value[:, 2:] += 100.0
    after = session.run(None, {"query": query, "key": key, "value": value})[0]
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert (np.abs(after[:, 2] - before[:, 2]) > 1).all()


def test_token_in_no_window_gives_exactly_zero() -> None:
    case = indexed_case("PackedAttentionIndexedPadded", "tokens in no window", batch=3)
    for got in (case.run_body(BODY_OPSET)[0], torch_outputs(case, torch_arguments(case))[0].numpy()):
        assert not got[:, [1, 3, 5]].any()
        assert got[:, [0, 2, 4, 6]].all()


def test_padding_reads_fill() -> None:
    """Another fill changes what the tokens beside the padding get, and only that."""
    rng = np.random.default_rng(5)
    qkv, fill = floats(rng, 1, 4, 3, 2, 5), floats(rng, 3, 2, 5)
    index = np.array([[0, 1], [2, -1]], np.int64)
    session = one_node("PackedAttentionIndexedPadded", (("scale", 0.5), ("tokens", 4)), BODY_OPSET)
    first, second = (session.run(None, {"qkv": qkv, "index": index, "fill": f})[0] for f in (fill, fill + 1.0))
    np.testing.assert_array_equal(first[:, [0, 1, 3]], second[:, [0, 1, 3]])
    assert not np.allclose(first[:, 2], second[:, 2])


@pytest.mark.parametrize(
    ("form", "shapes", "attributes", "says"),
    [
        ("Attention", [(2, 5, 4), (2, 5, 4), (2, 5, 4)], {"scale": 1.0}, "rank 4"),
        ("Attention", [(2, 5, 3, 4), (2, 5, 3, 8), (2, 5, 3, 8)], {"scale": 1.0}, "head_dim differs"),
        ("Attention", [(2, 5, 3, 4), (2, 7, 3, 4), (2, 5, 3, 4)], {"scale": 1.0}, r"value \(2, 5, 3, 4\) differ"),
        ("Attention", [(2, 5, 3, 4), (1, 7, 3, 4), (1, 7, 3, 4)], {"scale": 1.0}, "batch or heads differ"),
        ("Attention", [(2, 5, 6, 4), (2, 7, 3, 4), (2, 7, 3, 4)], {"scale": 1.0}, "batch or heads differ"),
        ("AttentionBias", [(2, 5, 3, 4)] * 3 + [(2, 3, 5, 4)], {"scale": 1.0}, r"\(2, 3, 5, 4\) does not broadcast"),
        ("AttentionMask", [(2, 5, 3, 4)] * 3 + [(5, 5)], {"scale": 1.0}, r"mask \(5, 5\) does not broadcast"),
        ("PackedAttention", [(2, 5, 3, 4)], {"scale": 1.0}, "qkv must be"),
        ("PackedAttention", [(2, 5, 2, 3, 4)], {"scale": 1.0}, "qkv must be"),
        ("PackedAttentionBias", [(2, 5, 3, 3, 4), (1, 2, 5, 5)], {"scale": 1.0}, "does not broadcast"),
        (
            "PackedAttentionIndexedPadded",
            [(2, 5, 3, 3, 4), (2, 2), (3, 3, 4)],
            {"scale": 1.0, "tokens": 4},
            "tokens is 4",
        ),
        (
            "PackedAttentionIndexedPadded",
            [(2, 5, 3, 3, 4), (4,), (3, 3, 4)],
            {"scale": 1.0, "tokens": 5},
            "index must be",
        ),
        (
            "PackedAttentionIndexedPadded",
            [(2, 5, 3, 3, 4), (2, 2), (3, 12)],
            {"scale": 1.0, "tokens": 5},
            "fill must be",
        ),
        ("PackedAttentionIndexed", [(2, 5, 3, 3, 4), (2, 2)], {"scale": 1.0, "tokens": 5}, "5 tokens once each"),
        (
            "PackedAttentionIndexedPaddedBias",
            [(2, 5, 3, 3, 4), (2, 2), (3, 3, 4), (1, 3, 4, 4), (2,)],
            {"scale": 1.0, "tokens": 5},
            "does not fit index",
        ),
        (
            "PackedAttentionIndexedPaddedBias",
            [(2, 5, 3, 3, 4), (2, 2), (3, 3, 4), (1, 3, 2, 2), (3,)],
            {"scale": 1.0, "tokens": 5},
            r"bias_index \(3,\) does not fit",
        ),
        ("ChannelPoolMean", [(2, 5, 3)], {}, r"got \(2, 5, 3\)"),
        ("SpatialPoolMeanMax", [(2, 5, 3)], {}, r"got \(2, 5, 3\)"),
        ("ChannelAttention", [(2, 5, 3, 4), (3,)], {}, "qkv must be"),
        ("ChannelAttentionUnscaled", [(2, 5, 3, 3, 4), (3, 1, 1)], {}, r"temperature must be \[3\].*got \(3, 1, 1\)"),
        ("ChannelAttentionChannelsFirst", [(2, 5, 3, 3, 4), (3,)], {}, "qkv must be"),
        ("ContextPool", [(2, 5), (2, 5, 3)], {}, r"scores must be .* got \(2, 5\)"),
        ("ContextPool", [(2, 1, 5), (2, 3, 5)], {}, r"values must be \[2, 5, channels\]"),
        ("ContextPoolChannelsFirst", [(2, 4, 5), (2, 3, 1, 5)], {}, r"got \(2, 3, 1, 5\)"),
        ("BranchPool", [(2, 5, 3, 3), (2, 5, 1, 1)], {}, r"got \(2, 5, 3, 3\)"),
        ("BranchPool", [(2, 2, 5, 3, 3), (2, 1, 5, 1, 1)], {}, "a score for every branch"),
        ("HardAttention", [(2, 5, 1), (2, 5, 3)], {"k": 1}, r"got \(2, 5, 1\)"),
        ("HardAttention", [(2, 5), (2, 4, 3)], {"k": 1}, r"got \(2, 4, 3\)"),
        ("HardAttention", [(2, 5), (2, 5, 3)], {"k": 6}, "k is 6, of 5 tokens"),
        ("RotaryEmbedding", [(2, 5, 3, 7), (1, 5, 7), (1, 5, 7)], {}, r"even head_dim\], got \(2, 5, 3, 7\)"),
        ("RotaryEmbedding", [(2, 5, 3, 8), (1, 5, 4), (1, 5, 4)], {}, r"cos must be \[1 or 2, 5, 8\]"),
        ("RotaryEmbedding", [(2, 5, 3, 8), (1, 5, 8), (2, 5, 8)], {}, "differ"),
        ("Gate", [(2, 5, 3, 3), (2, 5)], {}, r"gate \(2, 5\) does not broadcast"),
        ("Gate", [(2, 5, 3, 3), (2, 4, 1, 1)], {}, r"gate \(2, 4, 1, 1\) does not broadcast"),
        ("GateResidual", [(2, 5, 3, 3), (2, 5, 1, 1), (2, 5, 1, 1)], {}, "residual"),
    ],
)
def test_shape_rule_names_the_shape_that_does_not_fit(
    form: str, shapes: list[tuple[int, ...]], attributes: Attributes, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        FORMS[form].infer_shapes(*shapes, **attributes)


@pytest.mark.parametrize(
    ("form", "shapes", "attributes", "by_hand"),
    [
        # 2 samples x 3 heads x 5 queries x 7 keys = 210 scores of 4 products, and 210 weights for 6 values each
        ("Attention", [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6)], {"scale": 1.0}, 840 + 1260),
        ("AttentionBias", [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6), (1, 3, 5, 7)], {"scale": 1.0}, 840 + 1260),
        # a causal product is computed whole and cut: the body does so
        ("AttentionCausal", [(2, 5, 3, 4), (2, 7, 3, 4), (2, 7, 3, 6)], {"scale": 1.0}, 840 + 1260),
        # 2 x 3 heads x 5 x 5 scores = 150, each with 4 products before and 4 after
        ("PackedAttention", [(2, 5, 3, 3, 4)], {"scale": 1.0}, 600 + 600),
        # 2 x 4 windows x 3 heads x 2 x 2 scores = 96; padding is computed like any token
        ("PackedAttentionIndexedPadded", [(2, 7, 3, 3, 4), (4, 2), (3, 3, 4)], {"scale": 1.0, "tokens": 7}, 384 + 384),
        ("ChannelPoolMean", [(2, 5, 3, 7)], {}, 210),
        ("ChannelPoolMeanMax", [(2, 5, 3, 7)], {}, 420),
        ("SpatialPoolMeanMax", [(2, 5, 3, 7)], {}, 420),
        # 2 samples x 3 heads x 4 x 4 scores = 96, each with 5 products before and 5 after
        ("ChannelAttention", [(2, 5, 3, 3, 4), (3,)], {}, 480 + 480),
        ("ChannelAttentionChannelsFirst", [(2, 3, 3, 4, 5), (3,)], {}, 480 + 480),
        ("ContextPool", [(2, 4, 5), (2, 5, 3)], {}, 120),
        ("ContextPoolChannelsFirst", [(2, 4, 5), (2, 3, 4, 5)], {}, 120),
        ("BranchPool", [(2, 2, 5, 3, 7), (2, 2, 5, 1, 1)], {}, 420),
        ("HardAttention", [(2, 5), (2, 5, 3)], {"k": 2}, 0),
        ("RotaryEmbedding", [(2, 5, 3, 8), (1, 5, 8), (1, 5, 8)], {}, 480),
        ("GateRelu", [(2, 5, 3, 7), (2, 5, 1, 1)], {}, 210),
        ("GateResidual", [(2, 5, 3, 7), (2, 5, 1, 1), (2, 5, 3, 7)], {}, 210),
    ],
)
def test_multiply_adds_are_those_counted_by_hand(
    form: str, shapes: list[tuple[int, ...]], attributes: Attributes, by_hand: int
) -> None:
    assert FORMS[form].multiply_adds(*shapes, **attributes) == by_hand


def test_every_attention_form_stands_once_with_each_set_of_flags() -> None:
    plain = {"", "Causal", "Bias", "Mask", "CausalBias", "CausalMask", "BiasMask", "CausalBiasMask"}
    plain |= {"Softcap" + s for s in plain}
    cosine = {"Cosine" + s for s in ("", "Bias", "Mask", "BiasMask")}
    assert {n for n in CANONICAL_FORMS if n.startswith("Attention")} == {
        *("Attention" + s for s in plain | cosine), *("AttentionGrouped" + s for s in plain)
    }  # fmt: skip
    assert {f.name for f in PACKED_FORMS if "Indexed" not in f.name} == {"PackedAttention" + s for s in plain | cosine}
    indexed = {padded + s for padded in ("", "Padded") for s in ("", "Bias", "Cosine", "CosineBias")}
    assert {f.name for f in PACKED_FORMS if "Indexed" in f.name} == {"PackedAttentionIndexed" + s for s in indexed}
