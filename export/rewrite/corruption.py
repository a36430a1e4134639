"""An operator's result with its attention taken out: what parity of the whole model must be able to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

ops = torch.ops.attn_deploy


def _uniform(query: Tensor, value: Tensor) -> Tensor:
    mean = value.mean(1, keepdim=True).repeat_interleave(query.shape[2] // value.shape[2], 2)
    return mean.expand(-1, query.shape[1], -1, -1).contiguous()


def _ungated(x: Tensor, gate: Tensor, residual: Tensor | None, activation: str) -> Any:
    flat = gate.mean(tuple(range(1, gate.dim())), keepdim=True).expand_as(gate).contiguous()
    return ops.gate(x, flat, residual, activation)


def _uniform_channels(qkv: Tensor, temperature: Tensor, unscaled: bool, channels_first: bool) -> Any:
    return ops.channel_attention(qkv, torch.zeros_like(temperature), unscaled, channels_first)


def _uniform_context(scores: Tensor, *rest: Any) -> Any:
    return ops.context_pool(torch.zeros_like(scores), *rest)


def _mean_of_all(scores: Tensor, values: Tensor, k: int) -> Tensor:
    return values.mean(1, keepdim=True).expand(-1, k, -1).contiguous()


# By torch op.
_CORRUPTIONS: dict[str, Callable[..., Any]] = {
    "attention": lambda query, key, value, *rest: _uniform(query, value),
    "packed_attention": lambda qkv, *rest: _uniform(qkv[:, :, 0], qkv[:, :, 2]).flatten(2),
    "packed_attention_indexed": lambda qkv, *rest: _uniform(qkv[:, :, 0], qkv[:, :, 2]).flatten(2),
    "channel_attention": _uniform_channels,
    "context_pool": _uniform_context,
    "branch_pool": lambda x, scores: x.mean(1),
    "hard_attention": _mean_of_all,
    "gate": _ungated,
}


def corrupt(node: Node, args: tuple[Any, ...]) -> Any:
    """The operator's result with its attention taken out: a plain mean of the values, a gate that does not choose."""
    return _CORRUPTIONS[str(node.target).split(".")[1]](*args)
