"""Recognition: what is an attention, what is not, why, and where it stands; and that the operator computes the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.interpret import run
from attn_deploy.export.recognize import recognize
from attn_deploy.export.recognize.site import Kind, Reason
from attn_deploy.export.rewrite import rewrite
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.parity import sqnr_db

Capture = Callable[..., Any]
TOKENS, DIM, HEADS = 6, 16, 2


class Layer(nn.Module):
    """An attention layer; `mix` is what a case fills in."""

    def __init__(self, mix: Callable[..., Tensor], packed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.table = nn.Parameter(torch.randn(1, HEADS, TOKENS, TOKENS))
        self.mix, self.packed = mix, packed

    def heads(self, x: Tensor) -> Any:
        """query, key, value [batch, heads, tokens, head_dim]."""
        if self.packed:
            return self.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return [f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)]

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        query, key, value = self.heads(x)
        return self.mix(query, key, value, self.table, extra).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Holds the attention under a name, so that a path can be checked: x + attention(x)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, **extra: Tensor) -> Tensor:
        return x + self.attention(x, **extra)


class BlockWithExtra(Block):
    def forward(self, x: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.attention(x, extra)


class BlockAlone(Block):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x + self.attention(x)


def fused(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def fused_scaled(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


def fused_causal(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def fused_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=table)


def fused_mask(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=extra)


def written(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v


def scale_on_query(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return ((q * 0.25) @ k.transpose(-2, -1)).softmax(-1) @ v


def written_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.35 + table).softmax(-1) @ v


def written_causal(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return (q @ k.transpose(-2, -1) * 0.35).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def written_float_mask(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    mask = torch.zeros(TOKENS, TOKENS)
    mask[:, 4:] = float("-inf")
    return (q @ k.transpose(-2, -1) * 0.35 + mask).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.35).masked_fill(~extra, -1e9).softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return (torch.tanh(q @ k.transpose(-2, -1) / 5) * 5).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-2) @ v


def softmax_alone(q: Tensor, k: Tensor, v: Tensor, table: Tensor, extra: Any) -> Tensor:
    return q.softmax(-1) * v


FUSED_MASK = ExampleInput("extra", (1, 1, TOKENS, TOKENS), "bool")
KEEP = ExampleInput("extra", (1, 1, 1, TOKENS), "bool")

ATTENTIONS: dict[str, tuple[Callable[..., Tensor], bool, str]] = {
    "fused, packed": (fused, True, "PackedAttention"),
    "fused, separate": (fused, False, "Attention"),
    "fused, own scale": (fused_scaled, True, "PackedAttention"),
    "fused, causal": (fused_causal, True, "PackedAttentionCausal"),
    "fused, constant bias": (fused_bias, False, "AttentionBias"),
    "fused, boolean mask": (fused_mask, False, "AttentionMask"),
    "written, packed": (written, True, "PackedAttention"),
    "written, separate": (written, False, "Attention"),
    "written, scale on the query": (scale_on_query, False, "Attention"),
    "written, bias table": (written_bias, True, "PackedAttentionBias"),
    "written, causal": (written_causal, False, "AttentionCausal"),
    "written, float mask with -inf": (written_float_mask, False, "AttentionBias"),
    "written, masked_fill": (filled, False, "AttentionMask"),
    "written, a cap on the scores": (capped, True, "PackedAttentionSoftcap"),
}


def block(case: str) -> tuple[nn.Module, list[Any]]:
    mix, packed, _ = ATTENTIONS[case]
    if mix is fused_mask:
        return BlockWithExtra(Layer(mix, packed)), [f"x=1x{TOKENS}x{DIM}", FUSED_MASK]
    if mix is filled:
        return BlockWithExtra(Layer(mix, packed)), [f"x=1x{TOKENS}x{DIM}", KEEP]
    return BlockAlone(Layer(mix, packed)), [f"x=1x{TOKENS}x{DIM}"]


def own_line(function: Callable[..., Any], text: str) -> int:
    """The line of the function's source that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.parametrize("case", ATTENTIONS)
def test_an_attention_becomes_its_operator_at_its_module_and_line(case: str, captured: Capture) -> None:
    module, inputs = block(case)
    model = captured(module, *inputs)
    rewritten = rewrite(model, recognize(model))
    assert rewritten.skipped == ()
    (site,) = rewritten.sites
    _, _, operator = ATTENTIONS[case]
    assert (site.operator, site.module, site.kind) == (operator, "attention", Kind.SELF_ATTENTION)
    assert site.source_line.endswith(f"test_recognize.py:{own_line(Layer.forward, 'self.mix(')}")


@pytest.mark.parametrize("case", ATTENTIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_rewritten_graph_computes_what_the_model_computes(case: str, batch: int, captured: Capture) -> None:
    module, inputs = block(case)
    model = captured(module, *inputs)
    rewritten = rewrite(model, recognize(model))
    feeds = make_feeds(model.inputs, batch=batch, seed=5)
    if "extra" in feeds:
        feeds["extra"][..., 0] = True  # a row that is masked whole is NaN in the original
    got = run(rewritten.program, {k: torch.from_numpy(v) for k, v in feeds.items()})
    assert sqnr_db(model.reference(feeds)["output"], got.outputs[0].numpy()) > 100
    targets = {str(n.target) for n in rewritten.program.graph.nodes}
    assert not any("softmax" in t or "scaled_dot_product" in t for t in targets)


def test_masked_keys_have_no_weight_in_the_operator(captured: Capture) -> None:
    model = captured(BlockAlone(Layer(written_float_mask, False)), f"x=1x{TOKENS}x{DIM}")
    rewritten = rewrite(model, recognize(model))
    (node,) = [n for n in rewritten.program.graph.nodes if n.name == rewritten.sites[0].node]
    feeds = {k: torch.from_numpy(v) for k, v in make_feeds(model.inputs, batch=2, seed=1).items()}
    _, _, value, bias, *_ = run(rewritten.program, feeds, record={node.name}).arguments[node.name]
    assert (bias[..., 4:] < -1e30).all()
    assert bias.isfinite().all()
    assert value.shape == (2, TOKENS, HEADS, DIM // HEADS)


SKIPPED = {
    "a softmax over queries": (over_queries, Reason.NOT_LAST_AXIS),
    "a softmax not between products": (softmax_alone, Reason.NOT_SUMMED),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_no_plain_attention_is_skipped_with_its_reason(case: str, captured: Capture) -> None:
    mix, reason = SKIPPED[case]
    findings = recognize(captured(BlockAlone(Layer(mix, False)), f"x=1x{TOKENS}x{DIM}"))
    assert findings.sites == []
    (skipped,) = findings.skipped
    assert (skipped.module, skipped.reason) == ("attention", reason)
    assert "test_recognize.py:" in skipped.source_line


class TokensFirst(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = x if self.batch_first else x.transpose(0, 1)
        mixed = self.attn(tokens, tokens, tokens, need_weights=False)[0]
        return mixed if self.batch_first else mixed.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_s_own_multihead_attention_is_packed_attention(batch_first: bool, captured: Capture) -> None:
    model = captured(TokensFirst(batch_first), f"x=1x{TOKENS}x{DIM}")
    rewritten = rewrite(model, recognize(model))
    assert [(s.operator, s.module) for s in rewritten.sites] == [("PackedAttention", "attn")]


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM // 2)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        kv = self.kv(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, kv, kv, enable_gqa=True).transpose(1, 2).flatten(2)


def test_grouped_heads_have_a_form_of_their_own(captured: Capture) -> None:
    model = captured(Grouped(), f"x=1x{TOKENS}x{DIM}")
    rewritten = rewrite(model, recognize(model))
    assert [(s.operator, s.kind) for s in rewritten.sites] == [("AttentionGrouped", Kind.SELF_ATTENTION)]


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(x), self.k(context), self.v(context)))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_attention_to_another_input_is_cross_attention(captured: Capture) -> None:
    findings = recognize(captured(Cross(), "x=1x6x16", "context=1x9x16"))
    assert [s.kind for s in findings.sites] == [Kind.CROSS_ATTENTION]


def test_windows_with_and_without_a_shift_become_the_indexed_form(captured: Capture) -> None:
    import timm

    module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(2,), num_heads=(2,)
    )
    model = captured(module, "x=1x3x32x32")
    rewritten = rewrite(model, recognize(model))
    assert [(s.module, s.operator) for s in rewritten.sites] == [
        ("layers.0.blocks.0.attn", "PackedAttentionIndexedBias"),
        ("layers.0.blocks.1.attn", "PackedAttentionIndexedBias"),
    ]


class TwoOfThem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(fused, True), Layer(written, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_sites_come_in_the_order_of_the_graph_with_work_per_sample(captured: Capture) -> None:
    model = captured(TwoOfThem(), f"x=1x{TOKENS}x{DIM}")
    sites = rewrite(model, recognize(model)).sites
    assert [s.module for s in sites] == ["first", "second"]
    assert [s.flops for s in sites] == [2 * 2 * TOKENS * TOKENS * DIM] * 2


def test_the_captured_model_stays_as_it_was(captured: Capture) -> None:
    model = captured(BlockAlone(Layer(fused, True)), f"x=1x{TOKENS}x{DIM}")
    before = str(model.program.graph)
    rewrite(model, recognize(model))
    assert str(model.program.graph) == before


def test_a_site_that_gives_other_numbers_is_undone_and_said(captured: Capture) -> None:
    model = captured(TwoOfThem(), f"x=1x{TOKENS}x{DIM}")
    findings = recognize(model)
    wrong = findings.sites[0]
    findings.sites[0] = replace(wrong, match=replace(wrong.match, scale=wrong.match.scale * 1.1))  # type: ignore[arg-type]
    rewritten = rewrite(model, findings)
    assert [(s.module, s.reason) for s in rewritten.skipped] == [("first", Reason.DIFFERS)]
    assert [s.module for s in rewritten.sites] == ["second"]
