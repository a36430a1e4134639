"""Small transformers with several layers, so that a fault can be in one that is not the first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, DIM, HEADS = 16, 16, 2


class Attention(nn.Module):
    """Packed self-attention on [batch, tokens, dim]; `factor` scales the scores once more, as a model's bug would."""

    def __init__(self, mask: Tensor | None = None, factor: float = 1.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)
        self.factor = factor
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if self.factor != 1.0:
            query = query * self.factor
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on [batch, tokens, dim]."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = attention
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Windows(nn.Module):
    """Attention within windows: `order` [windows, length] says which tokens are in which."""

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.inner = Attention()
        self.register_buffer("order", order)
        self.register_buffer("back", order.flatten().argsort())

    def forward(self, x: Tensor) -> Tensor:
        windows = x[:, self.order.flatten()].reshape(-1, self.order.shape[1], DIM)
        return self.inner(windows).reshape(x.shape)[:, self.back]


class Transformer(nn.Module):
    """x [batch, tokens, dim] -> scores [batch, 5]."""

    def __init__(self, attentions: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(a) for a in attentions))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def _example(attentions: list[nn.Module]) -> Any:
    return Transformer(attentions), {"x": torch.zeros(1, TOKENS, DIM)}


def plain(factor: float = 1.0) -> Any:
    """`factor` goes to the second layer."""
    torch.manual_seed(0)
    return _example([Attention(), Attention(factor=factor), Attention()])


def windowed() -> Any:
    """Two layers of 2 x 2 windows over 4 x 4 tokens, the second one shifted by one row and column."""
    torch.manual_seed(0)
    grid = torch.arange(TOKENS).reshape(4, 4)
    orders = [g.reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4) for g in (grid, grid.roll((-1, -1), (0, 1)))]
    return _example([Windows(order) for order in orders])


def masked() -> Any:
    """Each token sees itself and some before it: 3 in the first layer, 5 in the second."""
    torch.manual_seed(0)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    return _example([Attention(mask=(distance >= 0) & (distance < width)) for width in (3, 5)])
