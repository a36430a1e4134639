"""Small text models: an embedding and a body in one of the spellings that attention has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy import nn as attn_nn
from attn_deploy.inputs import ExampleInput
from attn_deploy.session import DimBounds

LENGTH, DIM, HEADS, WORDS, LONGEST = 12, 16, 2, 50, 40
BOTH = {"batch": DimBounds(), "sequence": DimBounds(2)}
IDS = ExampleInput("ids", (1, LENGTH), "int64", high=WORDS)


class Text(nn.Module):
    """ids [batch, sequence] -> [batch, sequence, DIM]: an embedding, then `body`."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, DIM)
        self.body = nn.Sequential(*body)

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids))


class Mixed(nn.Module):
    """x + attention(x) on [batch, sequence, DIM]; `mix` takes query, key, value [batch, heads, sequence, head_dim]."""

    def __init__(self, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.mix = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), mix
        self.register_buffer("triangle", torch.ones(LONGEST, LONGEST).tril())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = (p.view(batch, length, HEADS, -1).transpose(1, 2) for p in self.qkv(x).split(DIM, 2))
        return x + self.out(self.mix(self, *parts).transpose(1, 2).reshape(batch, length, DIM))


def fused(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def fused_causal(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def triangle_of_a_buffer(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = self.triangle[: q.shape[2], : q.shape[2]]
    return (q @ k.transpose(-2, -1) * 0.3).masked_fill(seen == 0, float("-inf")).softmax(-1) @ v


def triangle_made_anew(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=places[:, None] >= places)


def bias_by_distance(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    return ((q @ k.transpose(-2, -1)) * 0.3 + (places[:, None] - places).abs() * -0.1).softmax(-1) @ v


def three_dimensional(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    flat = [p.reshape(-1, p.shape[2], p.shape[3]) for p in (q, k, v)]
    return torch.bmm(torch.bmm(flat[0], flat[1].transpose(1, 2)).softmax(-1), flat[2]).view(q.shape)


def turned(halves: bool, whole: bool) -> Callable[..., Tensor]:
    """Rotary embedding with tables made for the length, in one of the usual spellings."""

    def mix(self: Mixed, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.shape[-1] // 2
        angles = torch.arange(q.shape[2])[:, None] / 100.0 ** (torch.arange(half) / half)
        spread = torch.cat([angles, angles], -1) if halves else angles.repeat_interleave(2, -1)
        cos, sin = (spread if whole else angles).cos(), (spread if whole else angles).sin()

        def turn(x: Tensor) -> Tensor:
            a, b = (x[..., :half], x[..., half:]) if halves else (x[..., ::2], x[..., 1::2])
            if whole:
                across = torch.cat([-b, a], -1) if halves else torch.stack([-b, a], -1).flatten(-2)
                return x * cos + across * sin
            pair = a * cos - b * sin, b * cos + a * sin
            return torch.cat(pair, -1) if halves else torch.stack(pair, -1).flatten(-2)

        return F.scaled_dot_product_attention(turn(q), turn(k), v)

    return mix


def torch_encoder(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch_encoder(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


class WithClass(nn.Module):
    """A class token before the sequence: the attention sees one token more than there are words."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.randn(1, 1, DIM)), Mixed(fused)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


def own_layers(**options: Any) -> nn.Module:
    layers = (attn_nn.TransformerEncoderLayer(DIM, HEADS, 32, **options) for _ in range(2))
    return nn.Sequential(attn_nn.SinusoidalPositionalEncoding(DIM, LONGEST), *layers)


def rotary(interleaved: bool) -> nn.Module:
    table = attn_nn.RotaryPositionalEncoding(DIM // HEADS, LONGEST, interleaved=interleaved)
    return own_layers(causal=True, rotary=table)
