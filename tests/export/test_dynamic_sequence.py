"""A dynamic sequence from capture to ONNX: every attention is found, holds for every length, and says where it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy import nn as attn_nn
from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.recognize import recognize
from attn_deploy.export.recognize.site import Kind, Reason
from attn_deploy.export.rewrite import RewrittenModel, apply, rewrite
from attn_deploy.export.sources import SourceRequest, load_source
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.parity import sqnr_db
from attn_deploy.session import DimBounds

sys.path.insert(0, str(Path(__file__).parent))  # for text_bodies

import text_bodies as bodies
from text_bodies import BOTH, DIM, HEADS, IDS, LENGTH, LONGEST, WORDS, Mixed, Text, fused, own_layers

Capture = Callable[..., CapturedModel]
MASK = ExampleInput("mask", (1, LENGTH), "int64", mask=True)
CONFIGS = Path(__file__).parents[1] / "coverage" / "configs"

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], int]] = {
    "fused": (lambda: Mixed(fused), ["PackedAttention"], 0),
    "fused causal": (lambda: Mixed(bodies.fused_causal), ["PackedAttentionCausal"], 0),
    "triangle of a buffer": (lambda: Mixed(bodies.triangle_of_a_buffer), ["PackedAttentionMask"], 0),
    "triangle made anew": (lambda: Mixed(bodies.triangle_made_anew), ["PackedAttentionMask"], 0),
    "bias by distance": (lambda: Mixed(bodies.bias_by_distance), ["PackedAttentionBiasMask"], 0),
    "bmm of three dimensions": (lambda: Mixed(bodies.three_dimensional), ["PackedAttention"], 0),
    "whole tables, halves": (lambda: Mixed(bodies.turned(True, True)), ["Attention"], 2),
    "whole tables, pairs": (lambda: Mixed(bodies.turned(False, True)), ["Attention"], 2),
    "half tables, halves": (lambda: Mixed(bodies.turned(True, False)), ["Attention"], 2),
    "half tables, pairs": (lambda: Mixed(bodies.turned(False, False)), ["Attention"], 2),
    "a class token": (bodies.WithClass, ["PackedAttention"], 0),
    "nn.TransformerEncoder": (lambda: bodies.torch_encoder(True), ["Attention"] * 2, 0),
    "nn.TransformerEncoder, sequence first": (bodies.SequenceFirst, ["Attention"] * 2, 0),
    "attn_deploy.nn": (own_layers, ["PackedAttention"] * 2, 0),
    "attn_deploy.nn, causal": (lambda: own_layers(causal=True), ["PackedAttentionCausal"] * 2, 0),
    "attn_deploy.nn, multi-query": (lambda: own_layers(kv_heads=1), ["AttentionGrouped"] * 2, 0),
    "attn_deploy.nn, rotary pairs": (lambda: bodies.rotary(True), ["AttentionCausal"] * 2, 4),
    "attn_deploy.nn, rotary halves": (lambda: bodies.rotary(False), ["AttentionCausal"] * 2, 4),
}
"""Body, operators of its sites, and how many rotary embeddings there are."""


def rewritten_text(captured: Capture, body: nn.Module, dims: dict[str, DimBounds] | None = None) -> RewrittenModel:
    model = captured(Text(body), IDS, dims=dims or BOTH)
    return rewrite(model, recognize(model))


def require_same(canonical: CanonicalModel, model: CapturedModel, sizes: list[tuple[int, int]]) -> None:
    """Canonical and portable ONNX in ONNX Runtime give what PyTorch does, at every (batch, length)."""
    for graph in (canonical.model, portable(canonical)):
        session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
        for batch, length in sizes:
            feeds = make_feeds(model.inputs, batch=batch, seed=3, sequence=length)
            expected = model.reference(feeds)
            for name, got in zip(expected, session.run(list(expected), feeds), strict=True):
                assert sqnr_db(expected[name], got) > 100, (name, batch, length)


ALSO_SLOW = {
    "attn_deploy.nn, rotary halves", "attn_deploy.nn, rotary pairs", "nn.TransformerEncoder, sequence first",
    "bmm of three dimensions", "whole tables, pairs", "half tables, halves",
}  # fmt: skip
"""Under `make test-all`: others differ from them in little."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALSO_SLOW else ()) for name in MODELS]
)
def test_every_attention_is_found_and_holds_for_every_length(name: str, captured: Capture) -> None:
    torch.manual_seed(0)
    make, operators, turns = MODELS[name]
    rewritten = rewritten_text(captured, make())
    assert rewritten.skipped == ()
    assert [(s.kind, s.operator) for s in rewritten.sites] == [(Kind.SELF_ATTENTION, o) for o in operators]
    canonical = to_onnx(rewritten)
    assert canonical.inputs[0].shape == ("batch", "sequence")
    assert sum("RotaryEmbedding" in n.op_type for n in canonical.model.graph) == turns
    require_same(canonical, rewritten.captured, [(2, LENGTH), (1, 2), (3, 17), (1, 30)])


TRANSFORMERS: dict[str, tuple[dict[str, int], str, int | None, int]] = {
    "bert": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": LONGEST},
        "AttentionMask", LONGEST, 0,
    ),
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LONGEST}, "PackedAttentionMask", LONGEST, 0),
    "llama": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "head_dim": 8},
        "AttentionGroupedMask", None, 4,
    ),
    "t5_encoder": (
        {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 48}, "AttentionBiasMask", None, 0
    ),
    "clip_text": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": LONGEST},
        "AttentionMask", LONGEST, 0,
    ),
}  # fmt: skip
"""Sizes in miniature, the operator of both sites, the longest sequence, and how many rotary embeddings there are."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "bert" else pytest.mark.slow) for name in TRANSFORMERS]
)
def test_text_models_of_transformers_hold_for_every_length(name: str) -> None:
    pytest.importorskip("transformers")
    sizes, operator, longest, turns = TRANSFORMERS[name]
    shape = (1, LENGTH)
    inputs = [
        ExampleInput("input_ids", shape, "int64", high=WORDS),
        ExampleInput("attention_mask", shape, "int64", mask=True),
    ]
    request = SourceRequest("", None, {**sizes, "vocab_size": WORDS}, inputs)
    model = capture(load_source(f"hf:{CONFIGS / name}", request), BOTH)
    assert model.dims["sequence"] == DimBounds(2, longest)
    rewritten = rewrite(model, recognize(model))
    assert [(s.kind, s.operator, s.proven) for s in rewritten.sites] == [(Kind.SELF_ATTENTION, operator, True)] * 2
    assert not [s for s in rewritten.skipped if s.kind is Kind.SELF_ATTENTION]
    canonical = to_onnx(rewritten)
    assert sum("RotaryEmbedding" in n.op_type for n in canonical.model.graph) == turns
    outputs = {o.name: o.shape for o in canonical.outputs}
    assert next(iter(outputs.values()))[0] == "batch"
    assert any(shape[1] == "sequence" for shape in outputs.values())
    require_same(canonical, model, [(2, LENGTH), (1, 2), (3, longest or 30)])


def test_the_sequence_may_be_dynamic_alone(captured: Capture) -> None:
    torch.manual_seed(0)
    rewritten = rewritten_text(captured, Mixed(fused), {"sequence": DimBounds(2, 20)})
    canonical = to_onnx(rewritten)
    assert canonical.inputs[0].shape == (1, "sequence")
    assert [s.operator for s in rewritten.sites] == ["PackedAttention"]
    require_same(canonical, rewritten.captured, [(1, 2), (1, 20)])


def test_a_mask_of_the_inputs_is_as_long_as_they_are(captured: Capture) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(WORDS, DIM)
            self.attention = attn_nn.MultiHeadAttention(DIM, HEADS)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.attention(self.embedding(ids), mask=mask[:, None, None, :] > 0)

    torch.manual_seed(0)
    model = captured(Masked(), IDS, MASK, dims=BOTH)
    rewritten = rewrite(model, recognize(model))
    assert [s.operator for s in rewritten.sites] == ["PackedAttentionMask"]
    require_same(to_onnx(rewritten), model, [(2, LENGTH), (3, 5), (1, 33)])


def scaled_by_length(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / torch.sym_sqrt(q.shape[2])).softmax(-1) @ v


def test_scores_scaled_by_the_length_are_no_constant_scale(captured: Capture) -> None:
    rewritten = rewritten_text(captured, Mixed(scaled_by_length))
    assert [s.reason for s in rewritten.skipped] == [Reason.NOT_AFFINE]
    assert rewritten.sites == ()


class ChannelsOverTokens(nn.Module):
    """Attention between channels, whose operator counts the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 4, 1).unbind(0)
        weights = (F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * 2.0).softmax(-1)
        return x + (weights @ value).permute(0, 3, 1, 2).reshape(batch, length, DIM)


def test_a_site_that_would_fix_the_length_is_left_as_it_is(captured: Capture) -> None:
    rewritten = rewritten_text(captured, nn.Sequential(ChannelsOverTokens(), Mixed(fused)))
    assert [(s.kind, s.reason) for s in rewritten.skipped] == [(Kind.CHANNEL_ATTENTION, Reason.FIXED_LENGTH)]
    assert [s.operator for s in rewritten.sites] == ["PackedAttention"]
    require_same(to_onnx(rewritten), rewritten.captured, [(2, LENGTH), (3, 19)])


def test_a_site_that_holds_for_the_example_alone_is_undone(captured: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewriting that adds a bias of the example's length: it is right there, and cannot run at another."""

    class Rewriter:
        @staticmethod
        def rewrite(editor: Any, match: Any) -> Any:
            return apply.attention.rewrite(editor, replace(match, constant_bias=torch.zeros(1, 1, LENGTH, LENGTH)))

        original_layout = staticmethod(apply.attention.original_layout)

    match_type = type(recognize(captured(Text(Mixed(fused)), IDS, dims=BOTH)).sites[0].match)
    monkeypatch.setitem(apply.REWRITERS, match_type, Rewriter)
    torch.manual_seed(0)
    rewritten = rewritten_text(captured, Mixed(fused))
    assert [s.reason for s in rewritten.skipped] == [Reason.FIXED_LENGTH]
    assert rewritten.sites == ()


def test_a_saved_program_keeps_its_dynamic_sequence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch, sequence = torch.export.Dim("b"), torch.export.Dim("s", min=2, max=24)
    module = Text(own_layers()).eval()
    example = torch.zeros(3, LENGTH, dtype=torch.int64)
    program = torch.export.export(module, (example,), dynamic_shapes={"ids": {0: batch, 1: sequence}}, strict=False)
    torch.export.save(program, tmp_path / "text.pt2")
    model = capture(load_source(str(tmp_path / "text.pt2"), SourceRequest("", None, {}, ())), {})
    assert model.dims == {"batch": DimBounds(), "sequence": DimBounds(2, 24)}
    assert (model.batch, model.sequence) == (3, LENGTH)
    rewritten = rewrite(model, recognize(model))
    assert [s.operator for s in rewritten.sites] == ["PackedAttention"] * 2
    canonical = to_onnx(rewritten)
    assert canonical.inputs[0].shape == ("batch", "sequence")
    session = onnxruntime.InferenceSession(ir.to_proto(canonical.model).SerializeToString())
    ids = np.arange(10).reshape(2, 5)
    np.testing.assert_allclose(session.run(None, {"ids": ids})[0], module(torch.from_numpy(ids)).detach(), atol=1e-5)
