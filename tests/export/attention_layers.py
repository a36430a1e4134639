"""Projections, and the steps that every spelling of an attention shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attn_deploy.inputs import ExampleInput

TOKENS, DIM, HEADS, HEAD_DIM, KV_HEADS = 6, 16, 4, 4, 2
X = f"x=1x{TOKENS}x{DIM}"
MASK = ExampleInput("mask", (1, 1, 1, TOKENS), "bool")
KEEP = ExampleInput("mask", (1, TOKENS), "bool")
SCORES = f"mask=1x{TOKENS}x{TOKENS}"


class Layers(nn.Module):
    """What a case uses; `forward` is the case."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))
        self.qkv, self.kv, self.kv1 = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * HEAD_DIM)
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        self.mix, self.talk = nn.Linear(HEADS, HEADS), nn.Conv2d(HEADS, HEADS, 1)
        self.batch_first = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.tokens_first = nn.MultiheadAttention(DIM, HEADS, batch_first=False)
        self.register_buffer("lower", torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
        seen = torch.rand(HEADS, TOKENS, TOKENS) > 0.5
        self.register_buffer("seen", seen | torch.eye(TOKENS, dtype=torch.bool))

    def heads(self, x: Tensor) -> Any:
        """query, key, value [batch, heads, tokens, head_dim] of three projections."""
        return [f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)]

    def packed(self, x: Tensor) -> Any:
        return self.qkv(x).reshape(-1, TOKENS, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)

    def matrices(self, x: Tensor) -> Any:
        """The same with samples and heads on one axis, [batch * heads, tokens, head_dim]."""
        return [t.reshape(-1, TOKENS, HEAD_DIM) for t in self.heads(x)]

    def grouped(self, x: Tensor) -> Any:
        """query as above, key and value with KV_HEADS heads."""
        kv = [t.unflatten(-1, (KV_HEADS, -1)).transpose(1, 2) for t in self.kv(x).chunk(2, -1)]
        return self.heads(x)[0], *kv


def merged(mixed: Tensor) -> Tensor:
    return mixed.transpose(1, 2).flatten(2)


def apart(mixed: Tensor) -> Tensor:
    return merged(mixed.reshape(-1, HEADS, TOKENS, HEAD_DIM))


def attend(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


def scores_of(m: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value = m.heads(x)
    return query @ key.transpose(-2, -1) * 0.5, value


def model_of(case: Callable[..., Any]) -> nn.Module:
    """Layers with `case` as forward, which takes `x`, or `x` and `mask`."""
    if "mask" in inspect.signature(case).parameters:
        forward: Callable[..., Any] = lambda self, x, mask: case(self, x, mask)  # noqa: E731
    else:
        forward = lambda self, x: case(self, x)  # noqa: E731
    return type(case.__name__, (Layers,), {"forward": forward})()  # type: ignore[no-any-return]
