"""RotaryEmbedding in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("attn_deploy::rotary_embedding", mutates_args=())
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [batch, tokens, heads, head_dim], cos and sin [batch|1, tokens, head_dim] -> x's shape."""
    if interleaved:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return (x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)).contiguous()


@rotary_embedding.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
