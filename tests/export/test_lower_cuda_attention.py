"""Every form of our attention operators, lowered for ONNX Runtime's CUDA provider, against the float64 reference.

The operators that it becomes have FP32 kernels on the CPU too: there the numbers are taken.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cuda_attention import ATTENTION, TABLE, fuse_attention
from attn_deploy.export.lower.cuda_operator import MAX_HEADS
from attn_deploy.export.lower.cuda_rotary import fuse_rotary
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.parity import sqnr_db

sys.path.insert(0, str(Path(__file__).parent))  # for cuda_forms

from cuda_forms import BELOW, STANDARD, Array, Case, Sizes, case, model_of

MIN_DB = 100.0
FUSED = {"Attention", "MultiHeadAttention"}
ALL = sorted(name for name, form in FORMS.items() if form.operator in ATTENTION)


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
            row = next((key for key in TABLE if key.startswith("...") and rest.startswith(key[3:])), None)
            assert row is not None, (name, rest)
            rest = rest.removeprefix(row[3:])
