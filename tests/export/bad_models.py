"""Models that an exporter must refuse or skip with a reason; sources as `bad_models:NAME`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, DIM, HEADS = 6, 16, 4

Mix = Callable[..., Tensor]
"""(attention module, query, key, value, and the mask of a model that has one) -> [batch, heads, tokens, head_dim]"""


class Attention(nn.Module):
    """x + attention(x) on [batch, tokens, dim]; `mix` gets query, key and value as [batch, heads, tokens, head_dim]."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.drop = nn.Dropout(0.2)
        self.mix = mix

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.mix(self, query, key, value, *mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.block = Attention(mix)
        self.head = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(1))


def weights(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)


def plain(module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return weights(query, key) @ value


def functional_dropout(module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.dropout(weights(query, key), 0.2, training=True) @ value


def dropout_put_in_training_mode(module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    module.drop.train()
    return module.drop(weights(query, key)) @ value


def fused_dropout(module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, dropout_p=0.2)


def noise(module: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return weights(query, key) @ value + 0.1 * torch.randn_like(value)


def mask_added(module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return (query @ key.transpose(-2, -1) + mask).softmax(-1) @ value


def mask_fused(module: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Masked(Model):
    """The mask meets scores [batch, heads, tokens, tokens] as it comes."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(self.block(x, mask).mean(1))


class Steered(nn.Module):
    """A submodule `inner.steer` whose computation follows a tensor's values, in front of an attention."""

    def __init__(self, steer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.steer = steer
        self.model = Model(plain)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.inner.steer(x))


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x if x.mean() > 0 else x


class Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().sum()) % 3):
            x = x + 1
        return x


class Selection(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, x.mean((0, 2)) > -10]


def image_model() -> Any:
    """Windows of 4 x 4 that the model takes by a reshape, without asking whether they fit."""
    return Windows(), {"x": torch.zeros(1, DIM, 8, 8)}


class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(plain)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        windows = x.reshape(batch, dim, height // 4, 4, width // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, dim)
        mixed = self.attention(windows).reshape(batch, height // 4, width // 4, 4, 4, dim)
        return mixed.permute(0, 5, 1, 3, 2, 4).reshape(batch, dim, height, width).mean((2, 3))


def branching() -> Any:
    return Steered(Branch()), {"x": torch.zeros(1, TOKENS, DIM)}


def with_dropout() -> Any:
    return Model(functional_dropout), {"x": torch.zeros(1, TOKENS, DIM)}


def masked() -> Any:
    return Masked(mask_fused), {"x": torch.zeros(1, TOKENS, DIM), "mask": torch.zeros(1, 1, 1, TOKENS, TOKENS)}
