"""Attention and PackedAttention in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def combined_mask(
    query_len: int, key_len: int, bias: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor | None:
    """Bias, mask and causality as one additive mask with -inf where no key is seen; None without any of them."""
    keep = mask
    if causal:
        device = bias.device if bias is not None else (mask.device if mask is not None else None)
        triangle = torch.ones(query_len, key_len, dtype=torch.bool, device=device).tril()
        keep = triangle if keep is None else keep & triangle
    if keep is None:
        return bias
    if bias is None:
        return keep
    return torch.where(keep, bias, torch.full((), float("-inf"), dtype=bias.dtype, device=bias.device))


def _capped(query: Tensor, key: Tensor, value: Tensor, extra: Tensor | None, scale: float, softcap: float) -> Tensor:
    """scaled_dot_product_attention has no soft cap: the scores in steps, on [batch, heads, tokens, head_dim]."""
    scores = softcap * torch.tanh(query @ key.transpose(-2, -1) * (scale / softcap))
    if extra is not None:
        scores = scores.masked_fill(~extra, float("-inf")) if extra.dtype == torch.bool else scores + extra
    return scores.softmax(-1).nan_to_num(0.0) @ value


@torch.library.custom_op("attn_deploy::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, head_scale: Tensor | None,
    scale: float, softcap: float, causal: bool,
) -> Tensor:  # fmt: skip
    """query [batch, query_len, heads, head_dim], key and value [batch, key_len, heads or kv_heads, head_dim]
    -> [batch, query_len, heads, value_dim]. A fully masked row gives 0. With `head_scale` [heads], scores are cosines
    times it; `softcap` 0 caps nothing."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if head_scale is not None:
        q, k = F.normalize(q, dim=-1) * head_scale[:, None, None], F.normalize(k, dim=-1)
    extra = combined_mask(q.shape[2], k.shape[2], bias, mask, causal)
    if softcap:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        out = _capped(q, k, v, extra, scale, softcap)
    else:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=extra, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, head_scale: Tensor | None,
    scale: float, softcap: float, causal: bool,
) -> Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("attn_deploy::packed_attention", mutates_args=())
def packed_attention(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, head_scale: Tensor | None, scale: float, softcap: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    """qkv [batch, tokens, 3, heads, head_dim] -> [batch, tokens, heads * head_dim]."""
    query, key, value = qkv.unbind(2)
    return attention(query, key, value, bias, mask, head_scale, scale, softcap, causal).flatten(2)


@packed_attention.register_fake
def _(
    qkv: Tensor, bias: Tensor | None, mask: Tensor | None, head_scale: Tensor | None, scale: float, softcap: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4]))


@torch.library.custom_op("attn_deploy::packed_attention_indexed", mutates_args=())
def packed_attention_indexed(
    qkv: Tensor, index: Tensor, fill: Tensor | None, head_scale: Tensor | None, windows_bias: Tensor | None,
    bias_index: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """qkv [batch, tokens, 3, heads, head_dim], index [windows, length] -> [batch, tokens, heads * head_dim].
    Without `fill` every token stands in one window."""
    batch, tokens, _, heads, head_dim = qkv.shape
    if fill is None:
        fill = qkv.new_zeros(3, heads, head_dim)
    windows, length = index.shape
    rows = torch.cat([qkv, fill.expand(batch, 1, *fill.shape)], dim=1)
    taken = rows[:, index].reshape(batch * windows, length, 3, heads, head_dim)  # -1 is the row of fill
    bias = None
    if windows_bias is not None and bias_index is not None:
        bias = windows_bias[bias_index].repeat(batch, 1, 1, 1)
    out = packed_attention(taken, bias, None, head_scale, scale, 0.0, False).reshape(batch, windows * length, -1)
    places = torch.where(index < 0, tokens, index).flatten()
    result = qkv.new_zeros(batch, tokens + 1, heads * head_dim).index_copy(1, places, out)
    return result[:, :tokens].contiguous()


@packed_attention_indexed.register_fake
def _(
    qkv: Tensor, index: Tensor, fill: Tensor | None, head_scale: Tensor | None, windows_bias: Tensor | None,
    bias_index: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4]))
