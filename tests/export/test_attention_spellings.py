"""One attention, spelled in every way that models spell it: each becomes the operator that computes the same."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_deploy.export.recognize.site import Kind
from attn_deploy.export.rewrite import RewrittenModel

sys.path.insert(0, str(Path(__file__).parent))  # for attention_layers

from attention_layers import (
    DIM,
    HEAD_DIM,
    HEADS,
    KEEP,
    KV_HEADS,
    MASK,
    SCORES,
    TOKENS,
    Layers,
    X,
    apart,
    attend,
    merged,
    model_of,
    scores_of,
)

Rewritten = Callable[..., RewrittenModel]

# Products.


def by_bmm(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.matrices(x)
    return apart(torch.bmm((torch.bmm(query, key.transpose(1, 2)) * 0.5).softmax(-1), value))


def by_bmm_bias_of_heads(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.matrices(x)
    scores = torch.bmm(query, key.transpose(1, 2)).reshape(-1, HEADS, TOKENS, TOKENS) + m.bias
    return apart(attend(scores.reshape(-1, TOKENS, TOKENS), value))


def by_bmm_cosines(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.matrices(x)
    cosines = torch.bmm(F.normalize(query, dim=-1), F.normalize(key, dim=-1).transpose(1, 2))
    scores = cosines.reshape(-1, HEADS, TOKENS, TOKENS) * m.temperature
    return apart(attend(scores.reshape(-1, TOKENS, TOKENS), value))


def by_bmm_masked(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    query, key, value = m.matrices(x)
    scores = torch.bmm(query, key.transpose(1, 2)).reshape(-1, HEADS, TOKENS, TOKENS).masked_fill(~mask, -1e9)
    return apart(attend(scores.reshape(-1, TOKENS, TOKENS), value))


def by_baddbmm(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.matrices(x)
    bias = m.bias.repeat(x.shape[0], 1, 1)
    return apart(attend(torch.baddbmm(bias, query, key.transpose(1, 2), beta=0.5, alpha=0.25), value))


def by_baddbmm_of_nothing(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.matrices(x)
    nothing = torch.zeros(1, 1, 1)
    return apart(attend(torch.baddbmm(nothing, query, key.transpose(1, 2), beta=0, alpha=0.5), value))


def by_einsum(m: Layers, x: Tensor) -> Tensor:
    query, key, value = (f(x).unflatten(-1, (HEADS, -1)) for f in (m.to_q, m.to_k, m.to_v))
    weights = (torch.einsum("bihd,bjhd->bhij", query, key) * 0.5).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, value).flatten(2)


def by_einsum_turned_round(m: Layers, x: Tensor) -> Tensor:
    query, key, value = (f(x).unflatten(-1, (HEADS, -1)) for f in (m.to_q, m.to_k, m.to_v))
    weights = (torch.einsum("bjhd,bihd->bhij", key, query) * 0.5).softmax(-1)
    return torch.einsum("bjhd,bhij->bihd", value, weights).flatten(2)


def values_first(m: Layers, x: Tensor) -> Tensor:
    """v attn^T, as CoAtNet and BoTNet have it."""
    query, key, value = (t.transpose(-2, -1) for t in m.heads(x))
    weights = (query.transpose(-2, -1) @ key * 0.5).softmax(-1)
    return (value @ weights.transpose(-2, -1)).permute(0, 3, 1, 2).flatten(2)


def channels_first(m: Layers, x: Tensor) -> Tensor:
    qkv = F.conv1d(x.transpose(1, 2), m.qkv.weight[:, :, None], m.qkv.bias)
    query, key, value = qkv.reshape(-1, HEADS, 3 * HEAD_DIM, TOKENS).chunk(3, 2)
    weights = (query.transpose(-2, -1) @ key * 0.5).softmax(-1)
    return (value @ weights.transpose(-2, -1)).reshape(-1, DIM, TOKENS)


def heads_before_samples(m: Layers, x: Tensor) -> Tensor:
    query, key, value = (f(x).unflatten(-1, (HEADS, -1)).permute(2, 0, 1, 3) for f in (m.to_q, m.to_k, m.to_v))
    return attend(query @ key.transpose(2, 3) * 0.5, value).permute(1, 2, 0, 3).flatten(2)


def one_head(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.qkv(x).chunk(3, -1)
    return attend(query @ key.transpose(1, 2) * 0.25, value)


# Scale and cap.


def scaled_key(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.packed(x)
    return merged(attend(query @ (key * 0.3).transpose(2, 3), value))


def scaled_value(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.packed(x)
    return merged(attend(query @ key.transpose(2, 3), value * 2))


def negated(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.heads(x)
    return merged(attend(-(query @ key.transpose(2, 3)), value))


def cosines_of_scaled(m: Layers, x: Tensor) -> Tensor:
    """Of a factor before the normalization only the sign is left."""
    query, key, value = m.packed(x)
    cosines = F.normalize(query * -0.5, dim=-1) @ F.normalize(key, dim=-1).transpose(2, 3)
    return merged(attend(cosines * m.temperature, value))


def capped(m: Layers, x: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    scores = torch.tanh(scores / 5) * 5 + m.bias
    return merged(attend(scores.masked_fill(~m.lower, -math.inf), value))


def guarded(m: Layers, x: Tensor) -> Tensor:
    """Cut off far beyond any score, against overflow."""
    scores, value = scores_of(m, x)
    return merged(attend(scores.clamp(-50000, 50000), value))


def cast(m: Layers, x: Tensor) -> Tensor:
    """As transformers writes it."""
    scores, value = scores_of(m, x)
    return merged(scores.softmax(-1, dtype=torch.float32).to(x.dtype) @ value)


# Masks.


def causal_float(m: Layers, x: Tensor) -> Tensor:
    mask = torch.full((TOKENS, TOKENS), -math.inf).triu(1)
    return merged(F.scaled_dot_product_attention(*m.heads(x), attn_mask=mask))


def causal_where(m: Layers, x: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(torch.where(m.lower, scores, torch.tensor(-1e9)), value))


def constant_boolean(m: Layers, x: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*m.heads(x), attn_mask=m.seen))


def where_seen(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(torch.where(mask, scores, -1e9), value))


def where_hidden(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(torch.where(~mask, torch.tensor(-math.inf), scores), value))


def added_infinity(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    return merged(F.scaled_dot_product_attention(*m.heads(x), attn_mask=added))


def added_at_run_time(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(scores + mask[:, None] + m.bias, value))


# Grouped heads.


def grouped_by_torch(m: Layers, x: Tensor) -> Tensor:
    return merged(F.scaled_dot_product_attention(*m.grouped(x), enable_gqa=True))


def grouped_by_hand(m: Layers, x: Tensor) -> Tensor:
    """repeat_kv of transformers."""
    query, *kv = m.grouped(x)
    key, value = (
        t[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).reshape(-1, HEADS, TOKENS, HEAD_DIM) for t in kv
    )
    return merged(attend(query @ key.transpose(2, 3) * 0.5, value))


def grouped_interleaved(m: Layers, x: Tensor) -> Tensor:
    query, *kv = m.grouped(x)
    return merged(F.scaled_dot_product_attention(query, *(t.repeat_interleave(HEADS // KV_HEADS, 1) for t in kv)))


def one_key_for_all(m: Layers, x: Tensor) -> Tensor:
    """Multi-query attention by broadcasting (Shazeer 2019)."""
    key, value = (t[:, None] for t in m.kv1(x).chunk(2, -1))
    return merged(attend(m.heads(x)[0] @ key.transpose(2, 3) * 0.5, value))


# Rotary embedding.


def turned(x: Tensor, pairs: bool = False) -> Tensor:
    angles = torch.arange(x.shape[-2])[:, None] * 0.3 ** torch.arange(HEAD_DIM // 2)
    if pairs:
        angles = angles.repeat_interleave(2, -1)
        return x * angles.cos() + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * angles.sin()
    first, second = x.chunk(2, -1)
    angles = torch.cat([angles, angles], -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def rotary_halves(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.heads(x)
    return merged(attend(turned(query) @ turned(key).transpose(2, 3) * 0.5, value))


def rotary_pairs(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.packed(x)
    return merged(F.scaled_dot_product_attention(turned(query, True), turned(key, True), value))


def rotary_behind_a_prefix(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.heads(x)
    query, key = (torch.cat([t[:, :, :1], turned(t[:, :, 1:])], 2) for t in (query, key))
    return merged(F.scaled_dot_product_attention(query, key, value))


def rotary_grouped(m: Layers, x: Tensor) -> Tensor:
    query, key, value = m.grouped(x)
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (turned(key), value))
    return merged(attend(turned(query) @ key.transpose(2, 3) * 0.5, value))


# torch's own module.


def tokens_first(m: Layers, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return m.tokens_first(x, x, x, need_weights=False)[0].transpose(0, 1)


def with_unused_weights(m: Layers, x: Tensor) -> Tensor:
    return m.batch_first(x, x, x, attn_mask=~m.lower)[0]


def with_padding_and_unused_weights(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    return m.batch_first(x, x, x, key_padding_mask=~mask)[0]


SPELLINGS: dict[Callable[..., Tensor], str] = {
    by_bmm: "Attention",
    by_bmm_bias_of_heads: "AttentionBias",
    by_bmm_cosines: "AttentionCosine",
    by_bmm_masked: "AttentionMask",
    by_baddbmm: "AttentionBias",
    by_baddbmm_of_nothing: "Attention",
    by_einsum: "Attention",
    by_einsum_turned_round: "Attention",
    values_first: "Attention",
    channels_first: "Attention",
    heads_before_samples: "Attention",
    one_head: "PackedAttention",
    scaled_key: "PackedAttention",
    scaled_value: "Attention",
    negated: "Attention",
    cosines_of_scaled: "AttentionCosine",
    capped: "AttentionSoftcapCausalBias",
    guarded: "Attention",
    cast: "Attention",
    causal_float: "AttentionCausal",
    causal_where: "AttentionCausal",
    constant_boolean: "AttentionBias",
    where_seen: "AttentionMask",
    where_hidden: "AttentionMask",
    added_infinity: "AttentionBiasMask",
    added_at_run_time: "AttentionBiasMask",
    grouped_by_torch: "AttentionGrouped",
    grouped_by_hand: "AttentionGrouped",
    grouped_interleaved: "AttentionGrouped",
    one_key_for_all: "AttentionGrouped",
    rotary_halves: "Attention",
    rotary_pairs: "Attention",
    rotary_behind_a_prefix: "Attention",
    rotary_grouped: "AttentionGrouped",
    tokens_first: "PackedAttention",
    with_unused_weights: "PackedAttentionCausal",
    with_padding_and_unused_weights: "PackedAttentionBiasMask",
}
INPUTS: dict[Callable[..., Any], tuple[Any, ...]] = {
    by_bmm_masked: (X, MASK),
    where_seen: (X, MASK),
    where_hidden: (X, MASK),
    added_infinity: (X, MASK),
    added_at_run_time: (X, SCORES),
    with_padding_and_unused_weights: (X, KEEP),
}
THROUGH_ONNX = {
    by_bmm_cosines, by_bmm_masked, by_baddbmm, by_einsum_turned_round, channels_first, heads_before_samples, capped,
    added_infinity, grouped_by_hand, one_key_for_all, rotary_halves, rotary_pairs, rotary_grouped,
    with_padding_and_unused_weights, constant_boolean,
}  # fmt: skip


def with_a_seen_key(feeds: dict[str, Any]) -> None:
    """A row that is masked whole is NaN in some of the originals; where it is 0, it is tested on its own."""
    if "mask" in feeds and feeds["mask"].dtype == bool:
        feeds["mask"][..., 0] = True


@pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.__name__)
def test_a_spelling_becomes_its_operator_and_computes_the_same(
    case: Callable[..., Tensor], rewritten: Rewritten
) -> None:
    model = rewritten(model_of(case), *INPUTS.get(case, (X,)), onnx=case in THROUGH_ONNX, prepare=with_a_seen_key)
    assert model.skipped == ()
    assert [(s.operator, s.kind) for s in model.sites] == [(SPELLINGS[case], Kind.SELF_ATTENTION)]
    targets = {str(n.target) for n in model.program.graph.nodes}
    assert not any("softmax" in t or "scaled_dot_product" in t for t in targets)


@pytest.mark.parametrize("case", [rotary_halves, rotary_pairs, rotary_behind_a_prefix, rotary_grouped])
def test_a_rotary_embedding_becomes_two_operators_of_ours(case: Callable[..., Tensor], rewritten: Rewritten) -> None:
    model = rewritten(model_of(case), X)
    turns = [n for n in model.program.graph.nodes if n.target is torch.ops.attn_deploy.rotary_embedding.default]
    assert [n.args[3] for n in turns] == [case is rotary_pairs] * 2


def test_a_row_that_is_masked_whole_is_zero(rewritten: Rewritten) -> None:
    """scaled_dot_product_attention defines it so."""

    def hide_all(feeds: dict[str, Any]) -> None:
        feeds["mask"][0] = False
        feeds["mask"][1:, ..., 0] = True

    model = rewritten(model_of(added_infinity), X, MASK, onnx=True, prepare=hide_all)
    assert [s.operator for s in model.sites] == ["AttentionBiasMask"]
