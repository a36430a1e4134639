"""Two networks that hold every module of attn_deploy.nn; sources as `attention_coverage.nn_networks:NAME`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_deploy.nn import (
    CBAM,
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
    SqueezeExcitation,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)

Made = tuple[nn.Module, dict[str, Tensor]]

CHANNELS, DIM, HEADS, TOKENS, CONTEXT = 32, 64, 4, 16, 12


def _convolution(inputs: int, *, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, CHANNELS, 3, stride, 1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]


class ImageNetwork(nn.Module):
    """Each attention on feature maps behind a convolution of its own: x [batch, 3, height, width] -> [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        attentions: list[nn.Module] = [
            SqueezeExcitation(CHANNELS, reduction=4), CBAM(CHANNELS, reduction=4), EfficientChannelAttention(CHANNELS),
            CoordinateAttention(CHANNELS), NonLocalBlock(CHANNELS), ResidualAttentionBlock(CHANNELS),
        ]  # fmt: skip
        self.stem = nn.Sequential(*_convolution(3, stride=2))
        self.blocks = nn.Sequential(*(nn.Sequential(*_convolution(CHANNELS), a) for a in attentions))
        self.head = nn.Linear(CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Projected(nn.Module):
    """x + scaled dot-product attention of one head, with projections of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, DIM) for _ in range(3))
        self.attention = ScaledDotProductAttention()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part(x).unsqueeze(1) for part in (self.query, self.key, self.value))
        return x + self.attention(query, key, value).squeeze(1)


class TokenNetwork(nn.Module):
    """An encoder, a decoder that reads it, a choice of tokens and a sum of them:
    x [batch, tokens, dim] and context [batch, context_tokens, dim] -> [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        rotary = RotaryPositionalEncoding(DIM // HEADS, TOKENS)
        self.context_position = SinusoidalPositionalEncoding(DIM, CONTEXT)
        self.encoder = TransformerEncoderLayer(DIM, HEADS, 2 * DIM)
        self.position = LearnedPositionalEncoding(DIM, TOKENS)
        self.decoder = TransformerDecoderLayer(DIM, HEADS, 2 * DIM, context_dim=DIM, rotary=rotary)
        self.grouped = MultiHeadAttention(DIM, HEADS, kv_heads=2)
        self.projected = Projected()
        self.choice = HardAttention(DIM, TOKENS // 2)
        self.pool = SoftAttention(DIM)
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        context = self.encoder(self.context_position(context))
        x = self.decoder(self.position(x), context)
        x = self.projected(x + self.grouped(x))
        return self.head(self.pool(self.choice(x)))


def image_network() -> Made:
    return ImageNetwork(), {"x": torch.zeros(1, 3, 64, 64)}


def token_network() -> Made:
    return TokenNetwork(), {"x": torch.zeros(1, TOKENS, DIM), "context": torch.zeros(1, CONTEXT, DIM)}
