"""ChannelPool and Gate in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("attn_deploy::channel_pool_mean", mutates_args=())
def channel_pool_mean(x: Tensor) -> Tensor:
    """x [batch, channels, height, width] -> mean [batch, channels, 1, 1]."""
    return x.mean((2, 3), keepdim=True)


@torch.library.custom_op("attn_deploy::channel_pool_max", mutates_args=())
def channel_pool_max(x: Tensor) -> Tensor:
    """x [batch, channels, height, width] -> maximum [batch, channels, 1, 1]."""
    return x.amax((2, 3), keepdim=True)


@torch.library.custom_op("attn_deploy::channel_pool_mean_max", mutates_args=())
def channel_pool_mean_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [batch, channels, height, width] -> mean and maximum, each [batch, channels, 1, 1]."""
    return x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)


@channel_pool_mean.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


@channel_pool_max.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1))


@channel_pool_mean_max.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1)), x.new_empty((x.shape[0], x.shape[1], 1, 1))


ACTIVATIONS = {"": lambda t: t.clone(), "Relu": F.relu, "Silu": F.silu}


@torch.library.custom_op("attn_deploy::gate", mutates_args=())
def gate(x: Tensor, gate: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(x * gate + residual); `activation` is "", "Relu" or "Silu"."""
    product = x * gate
    return ACTIVATIONS[activation](product if residual is None else product + residual)


@gate.register_fake
def _(x: Tensor, gate: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
