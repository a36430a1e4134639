"""Every form of our attention operators, lowered for ONNX Runtime's CUDA provider, against the float64 reference.

The operators that it becomes have FP32 kernels on the CPU too: there the numbers are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.functions import attach_functions, inline_functions
from attn_deploy.export.lower.cuda_attention import ATTENTION, TABLE, fuse_attention
from attn_deploy.export.lower.cuda_operator import MAX_HEADS
from attn_deploy.export.lower.cuda_rotary import fuse_rotary
from attn_deploy.ops import DOMAIN, FORMS, Form
from attn_deploy.parity import sqnr_db

Array = np.ndarray[Any, Any]

MIN_DB = 100.0
BELOW, STANDARD = 20, 23
"""Opsets without and with an Attention of ONNX."""

FUSED = {"Attention", "MultiHeadAttention"}
ALL = sorted(name for name, form in FORMS.items() if form.operator in ATTENTION)


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    query_len: int = 5
    key_len: int = 7
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    windows: int = 4
    length: int = 7


@dataclass(frozen=True)
class Case:
    """One site: `operands` in the form's order; those named in `constants` are initializers."""

    form: Form
    operands: Mapping[str, Array]
    attributes: Mapping[str, Any]
    constants: frozenset[str] = field(default=frozenset({"index", "bias_index"}))


def case(name: str, sizes: Sizes, *, constants: str = "", seed: int = 0, clear_row: bool = True) -> Case:
    """Random operands; with a mask, the first row of the last sample sees nothing (`clear_row`)."""
    form, rng = FORMS[name], np.random.default_rng(seed)
    packed, indexed = form.operator == "PackedAttention", "Indexed" in name
    tokens = sizes.windows * sizes.length - (3 if "Padded" in name else 0)
    query_len = key_len = sizes.length
    if not indexed:
        query_len, key_len = (sizes.key_len,) * 2 if packed else (sizes.query_len, sizes.key_len)
    kv_heads = sizes.kv_heads if "Grouped" in name else sizes.heads
    numbers = rng.permutation(sizes.windows * sizes.length)
    index = np.where(numbers < tokens - 1, numbers, -1) if "Padded" in name else numbers
    mask = rng.random((sizes.batch, 1, query_len, key_len)) < 0.7
    mask[..., 0] = True
    if clear_row:
        mask[-1, :, 0] = False
    shapes = {
        "query": (sizes.batch, query_len, sizes.heads, sizes.head_dim),
        "key": (sizes.batch, key_len, kv_heads, sizes.head_dim),
        "value": (sizes.batch, key_len, kv_heads, sizes.head_dim),
        "qkv": (sizes.batch, tokens if indexed else key_len, 3, sizes.heads, sizes.head_dim),
        "fill": (3, sizes.heads, sizes.head_dim),
        "bias": (1, sizes.heads, query_len, key_len),
        "windows_bias": (3, sizes.heads, sizes.length, sizes.length),
    }
    given = {
        "mask": mask,
        "index": index.reshape(sizes.windows, sizes.length),
        "bias_index": np.arange(sizes.windows) % 3,
        "head_scale": rng.random(sizes.heads).astype(np.float32) * 5 + 5,
    }
    operands = {
        i.name: given[i.name] if i.name in given else rng.standard_normal(shapes[i.name]).astype(np.float32)
        for i in form.inputs
    }
    attributes: dict[str, Any] = {"scale": 0.6, "softcap": 2.0, "tokens": tokens}
    kept = {key: attributes[key] for key in form.attributes}
    return Case(form, operands, kept, frozenset({"index", "bias_index", *constants.split()}))


KINDS = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}


def model_of(site: Case, opset: int, *, symbols: Mapping[int, str] | None = None) -> ir.Model:
    """A model of the one node `block.attn/FORM`. The batch is a symbol; `symbols`: other sizes that are."""
    named = dict(symbols or {})
    inputs = []
    for operand in site.form.inputs:
        array = site.operands[operand.name]
        value = ir.Value(name=operand.name, type=ir.TensorType(KINDS[str(array.dtype)]))
        if operand.name in site.constants:
            value.const_value = ir.tensor(array, name=operand.name)
        batched = operand.name in ("x", "query", "key", "value", "qkv", "mask")
        value.shape = ir.Shape(
            ["batch" if axis == 0 and batched else named.get(size, size) for axis, size in enumerate(array.shape)]
        )
        inputs.append(value)
    output = ir.Value(name="output", type=ir.TensorType(ir.DataType.FLOAT))
    output.shape = ir.Shape([None] * (3 if site.form.operator == "PackedAttention" else 4))
    node = ir.node(
        site.form.name, inputs, dict(site.attributes), domain=DOMAIN, outputs=[output],
        name=f"block.attn/{site.form.name}",
    )  # fmt: skip
    fed = [v for v in inputs if v.name not in site.constants]
    held = [v for v in inputs if v.name in site.constants]
    graph = ir.Graph(fed, [output], nodes=[node], initializers=held, opset_imports={"": opset, DOMAIN: 1}, name="site")
    model = ir.Model(graph, ir_version=10)
    attach_functions(model)
    return model


def run(model: ir.Model, site: Case) -> Array:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {n: a for n, a in site.operands.items() if n not in site.constants}
    return np.asarray(session.run(None, feeds)[0])


def lowered(site: Case, opset: int, **options: Any) -> tuple[ir.Model, tuple[str, ...]]:
    model = model_of(site, opset, **options)
    notes = fuse_attention(model)
    inline_functions(model)
    return model, notes


def operators(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


def require_same(site: Case, model: ir.Model) -> None:
    (expected,) = site.form.reference(*site.operands.values(), **site.attributes)
    assert sqnr_db(expected, run(model, site)) >= MIN_DB
    assert all(str(n.name).startswith(f"block.attn/{site.form.name}") for n in model.graph)


def expressible(name: str, opset: int) -> bool:
    return opset >= STANDARD or not ("Grouped" in name or "Softcap" in name)


@pytest.mark.parametrize("opset", [BELOW, STANDARD])
@pytest.mark.parametrize("name", ALL)
def test_every_form_gives_what_its_reference_gives(name: str, opset: int) -> None:
    for sizes in (Sizes(), Sizes(batch=3, query_len=8, key_len=8, length=8)):
        site = case(name, sizes)
        model, notes = lowered(site, opset)
        assert bool(FUSED & set(operators(model))) == expressible(name, opset), notes
        require_same(site, model)


@pytest.mark.parametrize("name", [n for n in ALL if "Mask" in n or "Bias" in n])
def test_constant_masks_and_biases_are_folded(name: str) -> None:
    constants = " ".join(i.name for i in FORMS[name].inputs if i.name in ("mask", "bias", "windows_bias", "fill"))
    site = case(name, Sizes(batch=1), constants=constants)
    model, _ = lowered(site, STANDARD)
    assert not {"And", "ReduceMax", "Trilu"} & set(operators(model))
    require_same(site, model)


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("Attention") and "Cosine" not in n])
def test_lengths_may_be_symbols(name: str) -> None:
    site = case(name, Sizes(batch=2, query_len=6, key_len=6))
    model, notes = lowered(site, STANDARD, symbols={6: "sequence"})
    assert not notes
    require_same(site, model)


def test_a_mask_on_keys_alone_is_spread_over_the_queries() -> None:
    for causal in ("", "Causal"):
        site = case(f"Attention{causal}Mask", Sizes(batch=3, query_len=6, key_len=6))
        keys = site.operands["mask"][:, :, 1:2]
        keys[1] = False
        site = replace(site, operands={**site.operands, "mask": keys})
        for symbols in ({}, {6: "sequence"}):
            model, _ = lowered(site, STANDARD, symbols=symbols)
            require_same(site, model)
            assert not run(model, site)[1].any()


def test_rows_are_cut_only_where_some_may_be_without_a_key() -> None:
    full = case("AttentionMask", Sizes(), constants="mask", clear_row=False)
    assert operators(lowered(full, STANDARD)[0]).count("Where") == 1
    assert operators(lowered(case("AttentionMask", Sizes(), constants="mask"), STANDARD)[0]).count("Where") == 2


def test_layers_share_the_bias_made_of_their_mask() -> None:
    site = case("AttentionMask", Sizes(query_len=7))
    model = model_of(site, STANDARD)
    first = model.graph[0]
    inputs = [first.outputs[0], *first.inputs[1:]]
    second = ir.node(first.op_type, inputs, {"scale": 0.5}, domain=DOMAIN, name="next.attn/AttentionMask")
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    first.outputs[0].shape = ir.Shape(["batch", *site.operands["query"].shape[1:]])
    fuse_attention(model)
    assert operators(model).count("Attention") == 2
    assert operators(model).count("ReduceMax") == 1


@pytest.mark.parametrize("opset", [BELOW, STANDARD])
def test_windows_with_one_bias_go_into_the_batch_and_others_into_the_heads(opset: int) -> None:
    sizes = Sizes(batch=2)
    shifted = case("PackedAttentionIndexedBias", sizes, constants="windows_bias")
    shared = replace(shifted, operands={**shifted.operands, "bias_index": np.zeros(4, np.int64)})
    for site, heads in ((shifted, 4 * 4), (shared, 4)):
        model, _ = lowered(site, opset)
        attention = next(n for n in model.graph if n.op_type in FUSED)
        name = "q_num_heads" if opset >= STANDARD else "num_heads"
        assert attention.attributes[name].as_int() == heads
        assert operators(model).count("Gather") == 4
        require_same(site, model)


def test_too_many_windows_for_the_heads_repeat_their_bias_for_the_batch() -> None:
    sizes = Sizes(batch=2, heads=64, head_dim=8, windows=MAX_HEADS // 64 + 1, length=3)
    for constants in ("", "windows_bias"):
        site = case("PackedAttentionIndexedBias", sizes, constants=constants)
        model, _ = lowered(site, STANDARD)
        assert "Expand" in operators(model)
        require_same(site, model)


def test_a_biased_window_is_filled_up_to_whole_pieces_of_keys() -> None:
    for name in ("PackedAttentionIndexedBias", "PackedAttentionBias", "AttentionBias"):
        site = case(name, Sizes(query_len=5, key_len=7, length=7))
        model, notes = lowered(site, STANDARD)
        attention = next(n for n in model.graph if n.op_type == "Attention")
        key = attention.inputs[1]
        while key.producer().op_type != "Gather":
            key = key.producer().inputs[0]
        assert 8 in key.producer().inputs[1].const_value.shape
        assert not notes


def test_shapes_that_no_kernel_takes_are_named() -> None:
    plain, windows = case("Attention", Sizes(head_dim=6)), case("PackedAttentionIndexed", Sizes())
    _, notes = lowered(plain, STANDARD)
    assert notes == ("block.attn/Attention: one operator, but not a fused kernel: head_dim 6 is no multiple of 8",)
    computed = replace(windows, constants=frozenset())
    model, notes = lowered(computed, STANDARD)
    assert notes == ("block.attn/PackedAttentionIndexed: inlined: the index map is computed in the model",)
    require_same(computed, model)


def test_a_value_of_another_width_stays_one_operator() -> None:
    site = case("Attention", Sizes())
    wide = np.random.default_rng(1).standard_normal((1, 7, 4, 16)).astype(np.float32)
    site = replace(site, operands={**site.operands, "value": wide})
    for opset in (BELOW, STANDARD):
        model, notes = lowered(site, opset)
        assert not notes
        require_same(site, model)


def test_native_forms_are_left_alone() -> None:
    model = model_of(case("PackedAttentionIndexedBias", Sizes()), STANDARD)
    assert fuse_attention(model, frozenset({"PackedAttentionIndexedBias"})) == ()
    assert operators(model) == ["PackedAttentionIndexedBias"]


@pytest.mark.parametrize("name", ["RotaryEmbedding", "RotaryEmbeddingInterleaved"])
def test_a_rotary_embedding_with_constant_tables_is_one_operator(name: str) -> None:
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((3, 5, 4, 8)).astype(np.float32), rng.random((1, 5, 4)).astype(np.float32)
    spread = np.repeat(angles, 2, -1) if name.endswith("Interleaved") else np.concatenate([angles, angles], -1)
    apart = rng.random((1, 5, 8)).astype(np.float32)
    for table, fused in ((spread, 1), (spread + apart * 1e-7, 1), (apart, 0)):
        operands = {"x": x, "cos": np.cos(table), "sin": np.sin(table)}
        site = Case(FORMS[name], operands, {}, frozenset({"cos", "sin"}))
        model = model_of(site, STANDARD)
        assert fuse_rotary(model) == fused
        inline_functions(model)
        require_same(site, model)
    assert fuse_rotary(model_of(replace(site, constants=frozenset()), STANDARD)) == 0


def test_the_table_has_a_row_for_every_part_of_a_name() -> None:
    for name in ALL:
        rest = name.removeprefix("Packed").removeprefix("Attention").removeprefix("Indexed").removeprefix("Padded")
        while rest:
            row = next(key for key in TABLE if key.startswith("...") and rest.startswith(key[3:]))
            rest = rest.removeprefix(row[3:])
