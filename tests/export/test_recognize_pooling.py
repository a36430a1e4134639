"""Recognition of the softmax that is not between tokens: over channels, over the tokens of a context, over branches;
and of hard attention. Each in the spellings that models have, compared with its operator in PyTorch and in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.canonical import portable
from attn_deploy.export.interpret import run
from attn_deploy.export.recognize import recognize
from attn_deploy.export.recognize.site import Kind, Reason
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import sqnr_db

Capture = Callable[..., Any]
Mix = Callable[[Any, Tensor], Tensor]
TOKENS, DIM, HEADS, SIZE = 10, 12, 2, 6
SEQUENCE, IMAGE = f"x=1x{TOKENS}x{DIM}", f"x=1x3x{SIZE}x{SIZE}"


class Layers(nn.Module):
    """Layers for the cases; `mix` is what a case does with them."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor([1.5, 4.0]).reshape(HEADS, 1, 1))
        self.score, self.rows = nn.Linear(DIM, 1), nn.Linear(DIM, 3)
        self.attend = nn.Linear(DIM, DIM)
        self.stem, self.other = nn.Conv2d(3, DIM, 3, padding=1), nn.Conv2d(3, DIM, 5, padding=2)
        self.conv_qkv, self.conv_score = nn.Conv2d(DIM, 3 * DIM, 1), nn.Conv2d(DIM, 1, 1)
        self.conv_heads, self.conv_each = nn.Conv2d(DIM, HEADS, 1), nn.Conv2d(DIM, DIM, 1)
        self.squeeze, self.select = nn.Linear(DIM, 6), nn.Linear(6, 2 * DIM)
        for layer in (self.score, self.rows, self.conv_score, self.conv_heads, self.select, self.conv_each):
            nn.init.normal_(layer.weight)  # a softmax that chooses
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self, x)


class Model(nn.Module):
    """Holds the layers under a name, so that a path can be checked."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.layers = Layers(mix)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# -- over channels ---------------------------------------------------------------------------------------------------


def channel_parts(m: Any, x: Tensor) -> Any:
    """query, key, value [batch, heads, head_dim, tokens]."""
    return m.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, -1).permute(2, 0, 3, 4, 1).unbind(0)


def tokens_first(out: Tensor) -> Tensor:
    return out.permute(0, 3, 1, 2).flatten(2)


def xcit(m: Any, x: Tensor) -> Tensor:
    q, k, v = channel_parts(m, x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.temperature
    return tokens_first(scores.softmax(-1) @ v)


def xcit_fused(m: Any, x: Tensor) -> Tensor:
    q, k, v = channel_parts(m, x)
    q = F.normalize(q, dim=-1) * m.temperature
    return tokens_first(F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, scale=1.0))


def xcit_by_hand(m: Any, x: Tensor) -> Tensor:
    """Lengths divided out of the products, and the temperature on the key."""
    q, k, v = channel_parts(m, x)
    lengths = q.pow(2).sum(-1, keepdim=True).sqrt() @ k.pow(2).sum(-1).sqrt().unsqueeze(-2)
    return tokens_first((q @ (k * m.temperature).transpose(-2, -1) / lengths).softmax(-1) @ v)


def davit(m: Any, x: Tensor) -> Tensor:
    """Query and value have changed places: the product of key and value weights the query."""
    q, k, v = m.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    weights = ((k * 0.4).transpose(-1, -2) @ v).softmax(-1)
    return (weights @ q.transpose(-1, -2)).transpose(-1, -2).transpose(1, 2).flatten(2)


def restormer(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    q, k, v = (t.unflatten(1, (HEADS, -1)).flatten(3) for t in m.conv_qkv(y).chunk(3, dim=1))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * m.temperature
    return (scores.softmax(-1) @ v).reshape(y.shape)


def convolved_unscaled(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    q, k, v = m.conv_qkv(y).reshape(x.shape[0], 3, HEADS, -1, SIZE * SIZE).unbind(1)
    return ((q @ k.transpose(-2, -1) * SIZE**-2).softmax(-1) @ v).reshape(y.shape)


# -- over the tokens of a context ------------------------------------------------------------------------------------


def global_context(m: Any, x: Tensor) -> Tensor:
    """GCNet's, as timm writes it."""
    y = m.stem(x)
    weights = m.conv_score(y).reshape(x.shape[0], 1, -1).softmax(-1).unsqueeze(3)
    context = (y.flatten(2).unsqueeze(1) @ weights).reshape(x.shape[0], DIM, 1, 1)
    return y + m.conv_each(context)


def global_context_of_pixels(m: Any, x: Tensor) -> Tensor:
    """As a product and a sum over height and width."""
    y = m.stem(x)
    weights = m.conv_score(y).flatten(1).softmax(-1).reshape(x.shape[0], 1, SIZE, SIZE)
    return y + m.conv_each((y * weights).sum((2, 3), keepdim=True))


def separable(m: Any, x: Tensor) -> Tensor:
    """MobileViTv2's: every pixel of a patch attends over the patches."""
    y = m.stem(x).reshape(x.shape[0], DIM, 2, 3, 2, 3).permute(0, 1, 3, 5, 2, 4).reshape(x.shape[0], DIM, 9, 4)
    query, key, value = m.conv_qkv(y)[:, : 2 * DIM + 1].split([1, DIM, DIM], dim=1)
    context = (key * F.softmax(3 * query, dim=-1)).sum(dim=-1, keepdim=True)
    return F.relu(value) * context.expand_as(value)


def additive(m: Any, x: Tensor) -> Tensor:
    return (m.score(torch.tanh(m.attend(x))).softmax(1) * x).sum(1)


def additive_product(m: Any, x: Tensor) -> Tensor:
    weights = m.score(torch.tanh(m.attend(x))).squeeze(-1).softmax(-1)
    return (weights.unsqueeze(1) @ x).squeeze(1)


def additive_bmm(m: Any, x: Tensor) -> Tensor:
    weights = m.score(torch.tanh(m.attend(x))).softmax(1)
    return torch.bmm(x.transpose(1, 2), weights).squeeze(-1)


def additive_einsum(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("bt,btc->bc", m.score(x).squeeze(-1).softmax(-1), m.attend(x))


def additive_masked(m: Any, x: Tensor) -> Tensor:
    scores = m.score(x).masked_fill(x[..., :1] > 1.0, float("-inf"))
    return (scores.softmax(1) * x).sum(1)


def several_rows(m: Any, x: Tensor) -> Tensor:
    """Lin et al. 2017: three sets of weights for the same values."""
    return m.rows(torch.tanh(m.attend(x))).transpose(1, 2).softmax(-1) @ x


def of_heads(m: Any, x: Tensor) -> Tensor:
    """Every head has its own scores and its own values."""
    weights = m.rows(x)[..., :HEADS].softmax(1).unsqueeze(-1)
    return (weights * m.to_v(x).unflatten(-1, (HEADS, -1))).sum(1).flatten(1)


def of_each_channel(m: Any, x: Tensor) -> Tensor:
    """Every channel has its own scores."""
    return (m.to_k(x).mul(3).softmax(1) * m.to_v(x)).sum(1)


def factorized(m: Any, x: Tensor) -> Tensor:
    """CoaT's: the softmax of the key pools the value, and the query reads what was pooled."""
    q, k, v = m.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    context = k.mul(3).softmax(dim=2).transpose(-1, -2) @ v
    return (q @ context).transpose(1, 2).flatten(2)


# -- over branches ---------------------------------------------------------------------------------------------------


def branch_scores(m: Any, total: Tensor) -> Tensor:
    return m.select(F.relu(m.squeeze(total.mean((2, 3)))))


def selective_kernel(m: Any, x: Tensor) -> Tensor:
    both = torch.stack([m.stem(x), m.other(x)], dim=1)
    weights = branch_scores(m, both.sum(1)).reshape(x.shape[0], 2, DIM, 1, 1).softmax(1)
    return (both * weights).sum(1)


def selective_kernel_stacked_first(m: Any, x: Tensor) -> Tensor:
    both = torch.stack([m.stem(x), m.other(x)])
    weights = branch_scores(m, both.sum(0)).reshape(x.shape[0], 2, DIM).transpose(0, 1).softmax(0)
    return (both * weights[..., None, None]).sum(0)


def selective_kernel_in_parts(m: Any, x: Tensor) -> Tensor:
    first, second = m.stem(x), m.other(x)
    weights = branch_scores(m, first + second).reshape(x.shape[0], 2, DIM, 1, 1).softmax(1)
    return first * weights[:, 0] + weights[:, 1].expand_as(second) * second


def split_attention(m: Any, x: Tensor) -> Tensor:
    """ResNeSt's, as timm writes it, with cardinality 2."""
    radix = m.conv_qkv(m.stem(x))[:, : 2 * DIM].reshape(x.shape[0], 2, DIM, SIZE, SIZE)
    scores = branch_scores(m, radix.sum(1)).reshape(x.shape[0], 2, 2, -1).transpose(1, 2)
    weights = scores.softmax(1).reshape(x.shape[0], -1).reshape(x.shape[0], -1, 1, 1)
    return (radix * weights.reshape(x.shape[0], 2, DIM, 1, 1)).sum(1)


def of_each_pixel(m: Any, x: Tensor) -> Tensor:
    both = torch.stack([m.stem(x), m.other(x)], dim=1)
    weights = m.conv_heads(both.sum(1)).softmax(1).unsqueeze(2)
    return (both * weights).sum(1)


def selective_kernel_by_einsum(m: Any, x: Tensor) -> Tensor:
    """The second einsum has three operands: with it, torch.export's graph keeps them all as they are written."""
    both = torch.stack([m.stem(x), m.other(x)], dim=1)
    weights = branch_scores(m, both.sum(1)).reshape(x.shape[0], 2, DIM).softmax(1)
    pooled = torch.einsum("brchw,brc->bchw", both, weights)
    return torch.einsum("bchw,bc,c->bhw", pooled, pooled.mean((2, 3)), m.attend.bias)


# -- hard attention --------------------------------------------------------------------------------------------------


def best_tokens(m: Any, x: Tensor) -> Tensor:
    best = m.score(x).squeeze(-1).topk(3, dim=1).indices
    return x.gather(1, best.unsqueeze(-1).expand(-1, -1, DIM))


def best_tokens_scored_in_a_column(m: Any, x: Tensor) -> Tensor:
    _, best = torch.topk(m.score(x), 3, dim=1)
    return torch.gather(m.to_v(x), 1, best.repeat(1, 1, DIM))


def best_tokens_indexed(m: Any, x: Tensor) -> Tensor:
    best = m.score(x).squeeze(-1).topk(3).indices
    return m.to_v(x)[torch.arange(x.shape[0])[:, None], best]


def best_pixels(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    best = m.conv_score(y).flatten(2).topk(4, dim=-1).indices
    return y.flatten(2).gather(2, best.expand(-1, DIM, -1))


def best_token(m: Any, x: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0]), m.score(x).squeeze(-1).argmax(-1)]


def best_token_by_maximum(m: Any, x: Tensor) -> Tensor:
    best = m.score(x).squeeze(-1).max(dim=1, keepdim=True).indices
    return x.gather(1, best.unsqueeze(-1).expand(-1, -1, DIM))


def best_token_one_hot(m: Any, x: Tensor) -> Tensor:
    chosen = F.one_hot(m.score(x).squeeze(-1).argmax(-1), TOKENS).float()
    return (chosen.unsqueeze(-1) * x).sum(1)


def best_token_scattered(m: Any, x: Tensor) -> Tensor:
    scores = m.score(x).squeeze(-1)
    chosen = torch.zeros(x.shape[0], TOKENS).scatter(1, scores.argmax(1, keepdim=True), 1.0)
    return (chosen.unsqueeze(1) @ x).squeeze(1)


CASES: dict[Mix, tuple[str, str, Kind]] = {
    xcit: (SEQUENCE, "ChannelAttention", Kind.CHANNEL_ATTENTION),
    xcit_fused: (SEQUENCE, "ChannelAttention", Kind.CHANNEL_ATTENTION),
    xcit_by_hand: (SEQUENCE, "ChannelAttention", Kind.CHANNEL_ATTENTION),
    davit: (SEQUENCE, "ChannelAttentionUnscaled", Kind.CHANNEL_ATTENTION),
    restormer: (IMAGE, "ChannelAttentionChannelsFirst", Kind.CHANNEL_ATTENTION),
    convolved_unscaled: (IMAGE, "ChannelAttentionUnscaledChannelsFirst", Kind.CHANNEL_ATTENTION),
    global_context: (IMAGE, "ContextPoolChannelsFirst", Kind.CONTEXT_POOL),
    global_context_of_pixels: (IMAGE, "ContextPoolChannelsFirst", Kind.CONTEXT_POOL),
    separable: (IMAGE, "ContextPoolChannelsFirst", Kind.CONTEXT_POOL),
    additive: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    additive_product: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    additive_bmm: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    additive_einsum: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    additive_masked: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    several_rows: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    of_heads: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    of_each_channel: (SEQUENCE, "ContextPoolChannelsFirst", Kind.CONTEXT_POOL),
    factorized: (SEQUENCE, "ContextPool", Kind.CONTEXT_POOL),
    selective_kernel: (IMAGE, "BranchPool", Kind.BRANCH_ATTENTION),
    selective_kernel_stacked_first: (IMAGE, "BranchPool", Kind.BRANCH_ATTENTION),
    selective_kernel_in_parts: (IMAGE, "BranchPool", Kind.BRANCH_ATTENTION),
    selective_kernel_by_einsum: (IMAGE, "BranchPool", Kind.BRANCH_ATTENTION),
    split_attention: (IMAGE, "BranchPool", Kind.BRANCH_ATTENTION),
    of_each_pixel: (IMAGE, "BranchPool", Kind.BRANCH_ATTENTION),
    best_tokens: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
    best_tokens_scored_in_a_column: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
    best_tokens_indexed: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
    best_pixels: (IMAGE, "HardAttention", Kind.HARD_ATTENTION),
    best_token: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
    best_token_by_maximum: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
    best_token_one_hot: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
    best_token_scattered: (SEQUENCE, "HardAttention", Kind.HARD_ATTENTION),
}


@pytest.mark.parametrize("mix", CASES, ids=lambda mix: mix.__name__)
def test_it_becomes_its_operator_and_computes_the_same(mix: Mix, captured: Capture) -> None:
    shape, operator, kind = CASES[mix]
    model = captured(Model(mix), shape)
    rewritten = rewrite(model, recognize(model))
    assert [(s.kind, s.reason) for s in rewritten.skipped] == []
    assert [(s.operator, s.kind, s.module, s.proven) for s in rewritten.sites] == [(operator, kind, "layers", True)]
    for batch in (1, 3):
        feeds = make_feeds(model.inputs, batch=batch, seed=5)
        (got,) = run(rewritten.program, {k: torch.from_numpy(v) for k, v in feeds.items()}).outputs
        assert sqnr_db(model.reference(feeds)["output"], got.numpy()) > 100
    left = {str(n.target) for n in rewritten.program.graph.nodes if n.op == "call_function"}
    replaced = ("softmax", "scaled_dot_product_attention", "topk", "argmax", "aten.max", "gather", "one_hot")
    assert not [target for target in left if any(name in target for name in replaced)]


@pytest.mark.parametrize(
    "mix",
    [
        xcit, pytest.param(davit, marks=pytest.mark.slow), pytest.param(restormer, marks=pytest.mark.slow),
        pytest.param(convolved_unscaled, marks=pytest.mark.slow), separable, of_heads, split_attention, best_pixels,
    ],
    ids=lambda mix: mix.__name__,
)  # fmt: skip
def test_onnx_computes_the_same_at_every_batch_size_with_and_without_the_operator(mix: Mix, captured: Capture) -> None:
    model = captured(Model(mix), CASES[mix][0])
    canonical = to_onnx(rewrite(model, recognize(model)))
    assert [(s.operator, s.node) for s in canonical.sites] == [(CASES[mix][1], f"layers/{CASES[mix][1]}")]
    for onnx_model in (canonical.model, portable(canonical)):
        content = ir.to_proto(onnx_model).SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        for batch in (1, 3):
            feeds = make_feeds(model.inputs, batch=batch, seed=5)
            (got,) = session.run(None, feeds)
            assert sqnr_db(model.reference(feeds)["output"], got) > 100


@pytest.mark.parametrize(
    "mix", [xcit, separable, of_heads, selective_kernel_stacked_first], ids=lambda mix: mix.__name__
)
def test_a_fixed_batch_of_one_is_recognized_as_well(mix: Mix, captured: Capture) -> None:
    model = captured(Model(mix), CASES[mix][0], dims={})
    rewritten = rewrite(model, recognize(model))
    assert [(s.operator, s.kind) for s in rewritten.sites] == [CASES[mix][1:]]
    feeds = make_feeds(model.inputs, batch=None, seed=5)
    (got,) = run(rewritten.program, {k: torch.from_numpy(v) for k, v in feeds.items()}).outputs
    assert sqnr_db(model.reference(feeds)["output"], got.numpy()) > 100


# -- several at once -------------------------------------------------------------------------------------------------


def statistics(m: Any, x: Tensor) -> Tensor:
    """Attentive statistics pooling: mean and second moment under the same weights."""
    weights = m.score(x).mul(0.3).softmax(1)
    return torch.cat([(weights * x).sum(1), (weights * x.square()).sum(1)], dim=-1)


def weights_given_out(m: Any, x: Tensor) -> Tensor:
    weights = m.score(x).softmax(1)
    return torch.cat([(weights * x).sum(1), weights.squeeze(-1)], dim=-1)


def best_tokens_of_two(m: Any, x: Tensor) -> Tensor:
    best = m.score(x).squeeze(-1).topk(3, dim=1).indices.unsqueeze(-1).expand(-1, -1, DIM)
    return x.gather(1, best) * m.to_v(x).gather(1, best)


@pytest.mark.parametrize(
    ("mix", "operators"),
    [
        (statistics, ["ContextPool", "ContextPool"]),
        (weights_given_out, ["ContextPool"]),
        (best_tokens_of_two, ["HardAttention", "HardAttention"]),
    ],
)
def test_every_sum_that_shares_a_softmax_is_a_site(mix: Mix, operators: list[str], captured: Capture) -> None:
    model = captured(Model(mix), SEQUENCE)
    rewritten = rewrite(model, recognize(model))
    assert [s.operator for s in rewritten.sites] == operators
    feeds = make_feeds(model.inputs, batch=3, seed=5)
    (got,) = run(rewritten.program, {k: torch.from_numpy(v) for k, v in feeds.items()}).outputs
    assert sqnr_db(model.reference(feeds)["output"], got.numpy()) > 100


# -- what is not recognized, and why ---------------------------------------------------------------------------------


def summed_over_channels(m: Any, x: Tensor) -> Tensor:
    return (m.score(x).softmax(1) * x).sum(2)


def averaged(m: Any, x: Tensor) -> Tensor:
    return (m.score(x).softmax(1) * x).mean(1)


def each_weight_twice(m: Any, x: Tensor) -> Tensor:
    weights = m.score(x[:, : TOKENS // 2]).softmax(1)
    return (torch.cat([weights, weights], dim=1) * x).sum(1)


def in_windows(m: Any, x: Tensor) -> Tensor:
    """A softmax over each half of the tokens, and one sum over both."""
    weights = m.score(x).unflatten(1, (2, -1)).softmax(2).flatten(1, 2)
    return (weights * x).sum(1)


def entropy(m: Any, x: Tensor) -> Tensor:
    weights = m.to_q(x).softmax(-1)
    return (weights * weights.log()).sum(-1)


def probabilities(m: Any, x: Tensor) -> Tensor:
    return m.attend(x.mean(1)).softmax(-1)


def pixel_classes(m: Any, x: Tensor) -> Tensor:
    return m.conv_each(m.stem(x)).softmax(1)


def constant_weights(m: Any, x: Tensor) -> Tensor:
    return (m.score.weight.reshape(1, DIM, 1)[:, :TOKENS].softmax(1) * x).sum(1)


def lowest(m: Any, x: Tensor) -> Tensor:
    best = m.score(x).squeeze(-1).topk(3, dim=1, largest=False).indices
    return x.gather(1, best.unsqueeze(-1).expand(-1, -1, DIM))


def by_number(m: Any, x: Tensor) -> Tensor:
    """Where a sequence ends, as CLIP finds it."""
    numbers = (x[..., 0] > 0.5).int()
    return x[torch.arange(x.shape[0]), numbers.argmax(-1)]


def parts_of_tokens(m: Any, x: Tensor) -> Tensor:
    """Half of the channels of each chosen token."""
    best = m.score(x).squeeze(-1).topk(3, dim=1).indices
    return x.gather(1, best.unsqueeze(-1).expand(-1, -1, DIM // 2))


def next_tokens(m: Any, x: Tensor) -> Tensor:
    """The tokens behind the chosen ones."""
    best = m.score(x[:, 1:]).squeeze(-1).topk(3, dim=1).indices
    return x.gather(1, best.add(1).unsqueeze(-1).expand(-1, -1, DIM))


NOT_RECOGNIZED: dict[Mix, tuple[str, Kind, Reason]] = {
    summed_over_channels: (SEQUENCE, Kind.CONTEXT_POOL, Reason.NOT_SUMMED),
    averaged: (SEQUENCE, Kind.CONTEXT_POOL, Reason.NOT_SUMMED),
    in_windows: (SEQUENCE, Kind.CONTEXT_POOL, Reason.NOT_SUMMED),
    entropy: (SEQUENCE, Kind.CONTEXT_POOL, Reason.NOT_SUMMED),
    each_weight_twice: (SEQUENCE, Kind.SOFTMAX, Reason.CLASSIFIER),
    probabilities: (SEQUENCE, Kind.SOFTMAX, Reason.CLASSIFIER),
    pixel_classes: (IMAGE, Kind.SOFTMAX, Reason.CLASSIFIER),
    constant_weights: (SEQUENCE, Kind.SOFTMAX, Reason.CONSTANT_WEIGHTS),
    lowest: (SEQUENCE, Kind.HARD_ATTENTION, Reason.LOWEST_CHOSEN),
    by_number: (SEQUENCE, Kind.HARD_ATTENTION, Reason.CHOSEN_BY_NUMBER),
    parts_of_tokens: (SEQUENCE, Kind.HARD_ATTENTION, Reason.TOKENS_IN_PARTS),
    next_tokens: (SEQUENCE, Kind.HARD_ATTENTION, Reason.TOKENS_IN_PARTS),
}


@pytest.mark.parametrize("mix", NOT_RECOGNIZED, ids=lambda mix: mix.__name__)
def test_what_is_almost_one_is_skipped_with_its_reason(mix: Mix, captured: Capture) -> None:
    shape, kind, reason = NOT_RECOGNIZED[mix]
    findings = recognize(captured(Model(mix), shape))
    assert findings.sites == []
    assert [(s.kind, s.reason, s.module) for s in findings.skipped] == [(kind, reason, "layers")]


def classes(m: Any, x: Tensor) -> Tensor:
    return m.attend(x.mean(1)).topk(2, dim=-1).values


def test_a_choice_that_takes_no_tokens_is_nothing_at_all(captured: Capture) -> None:
    findings = recognize(captured(Model(classes), SEQUENCE))
    assert findings.sites == []
    assert findings.skipped == []


def long_channels(m: Any, x: Tensor) -> Tensor:
    """Lengths with something added: other numbers than XCiT's, on short channels above all."""
    q, k, v = channel_parts(m, x)
    q, k = (t / (t.norm(dim=-1, keepdim=True) + 1e-2) for t in (q, k))
    return tokens_first(((q @ k.transpose(-2, -1)) * m.temperature).softmax(-1) @ v)


def biased_channels(m: Any, x: Tensor) -> Tensor:
    q, k, v = channel_parts(m, x)
    bias = m.attend.weight[: DIM // HEADS, : DIM // HEADS]
    return tokens_first((q @ k.transpose(-2, -1) * 0.3 + bias).softmax(-1) @ v)


def foreign_values(m: Any, x: Tensor) -> Tensor:
    """Query and key from one projection, the value from another."""
    q, k, _ = channel_parts(m, x)
    v = m.to_v(x).reshape(x.shape[0], TOKENS, HEADS, -1).permute(0, 2, 3, 1)
    return tokens_first((q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v)


@pytest.mark.parametrize("mix", [long_channels, biased_channels, foreign_values], ids=lambda mix: mix.__name__)
def test_other_attention_over_channels_is_never_fused_as_channel_attention(mix: Mix, captured: Capture) -> None:
    """It is left to the attention between tokens, and what that makes of it computes the same."""
    model = captured(Model(mix), SEQUENCE)
    rewritten = rewrite(model, recognize(model))
    assert not [s for s in rewritten.sites if s.kind is Kind.CHANNEL_ATTENTION]
    assert not [s for s in rewritten.skipped if s.reason is Reason.DIFFERS]
    feeds = make_feeds(model.inputs, batch=3, seed=5)
    (got,) = run(rewritten.program, {k: torch.from_numpy(v) for k, v in feeds.items()}).outputs
    assert sqnr_db(model.reference(feeds)["output"], got.numpy()) > 100


def two_of_three_branches(m: Any, x: Tensor) -> Tensor:
    first, second = m.stem(x), m.other(x)
    weights = m.rows(first.mean((2, 3))).softmax(1)[..., None, None]
    return first * weights[:, :1] + second * weights[:, 1:2]


def a_branch_with_something_else(m: Any, x: Tensor) -> Tensor:
    first, second = m.stem(x), m.other(x)
    weights = branch_scores(m, first + second).reshape(x.shape[0], 2, DIM, 1, 1).softmax(1)
    return first * weights[:, 0] + F.relu(second * weights[:, 1])


@pytest.mark.parametrize("mix", [two_of_three_branches, a_branch_with_something_else], ids=lambda mix: mix.__name__)
def test_branches_that_do_not_add_up_are_skipped(mix: Mix, captured: Capture) -> None:
    findings = recognize(captured(Model(mix), IMAGE))
    assert not [s for s in findings.sites if s.kind in (Kind.BRANCH_ATTENTION, Kind.CONTEXT_POOL)]
    assert [s.reason for s in findings.skipped if s.kind is Kind.CONTEXT_POOL] == [Reason.NOT_SUMMED]


def between_tokens_with_something_in_between(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    return (q @ k.transpose(-2, -1)).square().softmax(-1) @ v


def test_attention_between_tokens_that_is_not_understood_is_no_context_pool(captured: Capture) -> None:
    findings = recognize(captured(Model(between_tokens_with_something_in_between), SEQUENCE))
    assert findings.sites == []
    assert [(s.kind, s.reason) for s in findings.skipped] == [(Kind.SELF_ATTENTION, Reason.NOT_AFFINE)]
