"""SpatialPool, ContextPool, BranchPool and HardAttention in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

SPATIAL_ORDERS = {"Mean": ("Mean",), "Max": ("Max",), "MeanMax": ("Mean", "Max"), "MaxMean": ("Max", "Mean")}


@torch.library.custom_op("attn_deploy::spatial_pool", mutates_args=())
def spatial_pool(x: Tensor, order: str) -> Tensor:
    """x [batch, channels, height, width] -> [batch, parts, height, width], the parts as in SPATIAL_ORDERS[order]."""
    made = [x.mean(1, keepdim=True) if part == "Mean" else x.amax(1, keepdim=True) for part in SPATIAL_ORDERS[order]]
    return torch.cat(made, dim=1)


@spatial_pool.register_fake
def _(x: Tensor, order: str) -> Tensor:
    return x.new_empty((x.shape[0], len(SPATIAL_ORDERS[order]), x.shape[2], x.shape[3]))


@torch.library.custom_op("attn_deploy::context_pool", mutates_args=())
def context_pool(scores: Tensor, values: Tensor, channels_first: bool) -> Tensor:
    """scores [batch, groups, tokens]; values [batch, tokens, channels] -> [batch, groups, channels], or channels
    first: values [batch, channels, groups, tokens] -> [batch, channels, groups]."""
    weights = scores.softmax(-1)
    return torch.einsum("bgt,bcgt->bcg" if channels_first else "bgt,btc->bgc", weights, values).contiguous()


@context_pool.register_fake
def _(scores: Tensor, values: Tensor, channels_first: bool) -> Tensor:
    if channels_first:
        return values.new_empty(values.shape[:3])
    return values.new_empty((*scores.shape[:2], values.shape[2]))


@torch.library.custom_op("attn_deploy::branch_pool", mutates_args=())
def branch_pool(x: Tensor, scores: Tensor) -> Tensor:
    """x [batch, branches, channels, height, width], scores [batch, branches, channels|1, height|1, width|1]
    -> [batch, channels, height, width]."""
    return (x * scores.softmax(1)).sum(1).contiguous()


@branch_pool.register_fake
def _(x: Tensor, scores: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:]))


@torch.library.custom_op("attn_deploy::hard_attention", mutates_args=())
def hard_attention(scores: Tensor, values: Tensor, k: int) -> Tensor:
    """scores [batch, tokens], values [batch, tokens, channels] -> [batch, k, channels], best first, ties in order."""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # topk promises no order of equal scores
    return values.gather(1, best.unsqueeze(-1).expand(-1, -1, values.shape[2]))


@hard_attention.register_fake
def _(scores: Tensor, values: Tensor, k: int) -> Tensor:
    return values.new_empty((values.shape[0], k, values.shape[2]))
