"""The modules of attn_deploy.nn as cases: how each is made, what it is fed, and which attentions it must show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from attn_deploy.export.recognize.site import Kind
from attn_deploy.inputs import ExampleInput, make_feeds, parse_input
from attn_deploy.nn import (
    CBAM,
    ChannelAttention,
    CoordinateAttention,
    EfficientChannelAttention,
    HardAttention,
    LearnedPositionalEncoding,
    MultiHeadAttention,
    NonLocalBlock,
    ResidualAttentionBlock,
    RotaryPositionalEncoding,
    ScaledDotProductAttention,
    SinusoidalPositionalEncoding,
    SoftAttention,
    SpatialAttention,
    SqueezeExcitation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

SELF, CROSS = Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION
CHANNELS, PIXELS = Kind.CHANNEL_GATE, Kind.SPATIAL_GATE

X = parse_input("x=1x6x16")
CONTEXT = parse_input("context=1x5x12")
MAP = parse_input("x=1x16x6x5")
PADDING = ExampleInput("mask", (1, 1, 1, 6), "bool", mask=True)


@dataclass(frozen=True)
class Case:
    """`inputs` are forward's by name; `sites` are the attentions in graph order, as (kind, path in the module)."""

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[ExampleInput, ...]
    sites: tuple[tuple[Kind, str], ...]

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def tensors(self, *, batch: int, seed: int) -> dict[str, Tensor]:
        return {k: torch.from_numpy(v) for k, v in make_feeds(self.inputs, batch=batch, seed=seed).items()}


def rotary(*, interleaved: bool = True) -> RotaryPositionalEncoding:
    return RotaryPositionalEncoding(4, 10, interleaved=interleaved)


def qkv(*, heads: int = 4, kv_heads: int = 4) -> tuple[ExampleInput, ...]:
    """Queries for six tokens, keys and values for five."""
    shapes = {"query": f"1x{heads}x6x8", "key": f"1x{kv_heads}x5x8", "value": f"1x{kv_heads}x5x8"}
    return tuple(parse_input(f"{name}={shape}") for name, shape in shapes.items())


CASES = (
    Case("scaled dot-product", ScaledDotProductAttention, qkv(), ((CROSS, ""),)),
    Case("scaled dot-product, grouped", ScaledDotProductAttention, qkv(kv_heads=2), ((CROSS, ""),)),
    Case("scaled dot-product, scale", lambda: ScaledDotProductAttention(scale=0.5), qkv(), ((CROSS, ""),)),
    Case(
        "scaled dot-product, boolean mask", ScaledDotProductAttention,
        (*qkv(), ExampleInput("mask", (1, 1, 1, 5), "bool", mask=True)), ((CROSS, ""),),
    ),
    Case("multi-head", lambda: MultiHeadAttention(16, 4), (X,), ((SELF, ""),)),
    Case("multi-head, no bias", lambda: MultiHeadAttention(16, 4, bias=False), (X,), ((SELF, ""),)),
    Case("multi-head, causal", lambda: MultiHeadAttention(16, 4, causal=True), (X,), ((SELF, ""),)),
    Case("multi-head, boolean mask", lambda: MultiHeadAttention(16, 4), (X, PADDING), ((SELF, ""),)),
    Case(
        "multi-head, additive mask", lambda: MultiHeadAttention(16, 4), (X, parse_input("mask=1x4x6x6")),
        ((SELF, ""),),
    ),
    Case("multi-head, causal and masked", lambda: MultiHeadAttention(16, 4, causal=True), (X, PADDING), ((SELF, ""),)),
    Case(
        "multi-head, causal and additive mask", lambda: MultiHeadAttention(16, 4, causal=True),
        (X, parse_input("mask=1x1x6x6")), ((SELF, ""),),
    ),
    Case("multi-head, grouped", lambda: MultiHeadAttention(16, 4, kv_heads=2), (X,), ((SELF, ""),)),
    Case("multi-head, multi-query, causal", lambda: MultiHeadAttention(16, 4, kv_heads=1, causal=True), (X,),
         ((SELF, ""),)),
    Case("multi-head, rotary", lambda: MultiHeadAttention(16, 4, rotary=rotary()), (X,), ((SELF, ""),)),
    Case(
        "multi-head, rotary in halves, grouped, causal",
        lambda: MultiHeadAttention(16, 4, kv_heads=2, causal=True, rotary=rotary(interleaved=False)), (X,),
        ((SELF, ""),),
    ),
    Case("multi-head, cross", lambda: MultiHeadAttention(16, 4, context_dim=12), (X, CONTEXT), ((CROSS, ""),)),
    Case(
        "multi-head, cross, grouped, masked", lambda: MultiHeadAttention(16, 4, kv_heads=2, context_dim=12),
        (X, CONTEXT, ExampleInput("mask", (1, 1, 1, 5), "bool", mask=True)), ((CROSS, ""),),
    ),
    Case("sinusoidal encoding", lambda: SinusoidalPositionalEncoding(16, 10), (X,), ()),
    Case("learned encoding", lambda: LearnedPositionalEncoding(16, 10), (X,), ()),
    Case("rotary encoding", rotary, (parse_input("x=1x2x6x4"),), ()),
    Case("rotary encoding in halves", lambda: rotary(interleaved=False), (parse_input("x=1x2x6x4"),), ()),
    Case("encoder layer, pre-norm", lambda: TransformerEncoderLayer(16, 4, 32), (X,), ((SELF, "self_attention"),)),
    Case(
        "encoder layer, post-norm, masked",
        lambda: TransformerEncoderLayer(16, 4, 32, pre_norm=False, activation="relu"), (X, PADDING),
        ((SELF, "self_attention"),),
    ),
    Case(
        "decoder layer, pre-norm, rotary",
        lambda: TransformerDecoderLayer(16, 4, 32, context_dim=12, rotary=rotary()), (X, CONTEXT),
        ((SELF, "self_attention"), (CROSS, "cross_attention")),
    ),
    Case(
        "decoder layer, post-norm", lambda: TransformerDecoderLayer(16, 4, 32, context_dim=12, pre_norm=False),
        (X, CONTEXT), ((SELF, "self_attention"), (CROSS, "cross_attention")),
    ),
    Case("squeeze-and-excitation", lambda: SqueezeExcitation(16, reduction=4), (MAP,), ((CHANNELS, ""),)),
    Case("channel attention", lambda: ChannelAttention(16, reduction=4), (MAP,), ((CHANNELS, ""),)),
    Case("spatial attention", lambda: SpatialAttention(kernel_size=3), (MAP,), ((PIXELS, ""),)),
    Case(
        "CBAM", lambda: CBAM(16, reduction=4, kernel_size=3), (MAP,),
        ((CHANNELS, "channel_attention"), (PIXELS, "spatial_attention")),
    ),
    Case("efficient channel attention", lambda: EfficientChannelAttention(16), (MAP,), ((CHANNELS, ""),)),
    Case("coordinate attention", lambda: CoordinateAttention(16), (MAP,), ((PIXELS, ""),)),
    Case("non-local", lambda: NonLocalBlock(16), (MAP,), ((SELF, ""),)),
    Case("residual attention", lambda: ResidualAttentionBlock(16), (MAP,), ((Kind.RESIDUAL_GATE, ""),)),
    Case("soft attention", lambda: SoftAttention(16), (X,), ((Kind.CONTEXT_POOL, ""),)),
    Case(
        "soft attention, query and mask", lambda: SoftAttention(16, hidden=8, query_dim=7),
        (X, parse_input("query=1x7"), ExampleInput("mask", (1, 6), "bool", mask=True)), ((Kind.CONTEXT_POOL, ""),),
    ),
    Case("hard attention", lambda: HardAttention(16, 3), (X,), ((Kind.HARD_ATTENTION, ""),)),
)  # fmt: skip


ALSO_SLOW = {
    "scaled dot-product, grouped", "scaled dot-product, scale", "multi-head, no bias", "multi-head, additive mask",
    "multi-head, causal and additive mask", "multi-head, multi-query, causal", "multi-head, rotary",
    "multi-head, cross", "rotary encoding in halves", "encoder layer, pre-norm", "decoder layer, post-norm",
    "soft attention",
}  # fmt: skip
"""Under `make test-all`: of each module another case goes through the exporter in `make test`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of other folders come here too."""
    for item in items:
        given = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        if isinstance(given, Case) and "exported" in item.fixturenames and given.name in ALSO_SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(
    params=[c for c in CASES if c.name != "hard attention" and list(c.make().parameters())], ids=lambda c: c.name
)
def learning_case(request: pytest.FixtureRequest) -> Case:
    """Those that have parameters, and that give the same loss twice: the choice of hard attention is drawn anew."""
    return request.param


@pytest.fixture(scope="session")
def cases() -> tuple[Case, ...]:
    return CASES
