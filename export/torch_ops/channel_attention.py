"""ChannelAttention in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("attn_deploy::channel_attention", mutates_args=())
def channel_attention(qkv: Tensor, temperature: Tensor, unscaled: bool, channels_first: bool) -> Tensor:
    """qkv [batch, tokens, 3, heads, head_dim], temperature [heads] -> [batch, tokens, heads * head_dim], or channels
    first: qkv [batch, 3, heads, head_dim, tokens] -> [batch, heads * head_dim, tokens]."""
    parts = qkv if channels_first else qkv.permute(0, 2, 3, 4, 1)
    query, key, value = parts.unbind(1)  # [batch, heads, head_dim, tokens]
    if not unscaled:
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    weights = (query @ key.transpose(-2, -1) * temperature[:, None, None]).softmax(-1)
    out = (weights @ value).flatten(1, 2)
    return out if channels_first else out.transpose(1, 2).contiguous()


@channel_attention.register_fake
def _(qkv: Tensor, temperature: Tensor, unscaled: bool, channels_first: bool) -> Tensor:
    if channels_first:
        return qkv.new_empty((qkv.shape[0], qkv.shape[2] * qkv.shape[3], qkv.shape[4]))
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4]))
