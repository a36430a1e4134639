"""The operators as torch.library ops, so that the rewritten graph still runs in PyTorch.

Here an absent optional input is None; the exporter picks the ONNX form from what is given. Implementations use
PyTorch's own attention and know nothing of the ONNX function bodies: comparing the two is a real comparison.
"""

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


@torch.library.custom_op("attn_deploy::attention", mutates_args=())
def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """query [batch, query_len, heads, head_dim], key and value [batch, key_len, heads, head_dim]
    -> [batch, query_len, heads, value_dim]. A fully masked row gives 0."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    extra = combined_mask(q.shape[2], k.shape[2], bias, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=extra, scale=scale).transpose(1, 2).contiguous()


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))


@torch.library.custom_op("attn_deploy::packed_attention", mutates_args=())
def packed_attention(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """qkv [batch, tokens, 3, heads, head_dim] -> [batch, tokens, heads * head_dim]."""
    query, key, value = qkv.unbind(2)
    return attention(query, key, value, bias, mask, scale, causal).flatten(2)


@packed_attention.register_fake
def _(qkv: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4]))


@torch.library.custom_op("attn_deploy::packed_attention_indexed", mutates_args=())
def packed_attention_indexed(
    qkv: Tensor, index: Tensor, fill: Tensor, windows_bias: Tensor | None, bias_index: Tensor | None, scale: float
) -> Tensor:
    """qkv [batch, tokens, 3, heads, head_dim], index [windows, length] -> [batch, tokens, heads * head_dim]."""
    batch, tokens, _, heads, head_dim = qkv.shape
    windows, length = index.shape
    rows = torch.cat([qkv, fill.expand(batch, 1, *fill.shape)], dim=1)
    taken = rows[:, index].reshape(batch * windows, length, 3, heads, head_dim)  # -1 is the row of fill
    bias = None
    if windows_bias is not None and bias_index is not None:
        bias = windows_bias[bias_index].repeat(batch, 1, 1, 1)
    out = packed_attention(taken, bias, None, scale, False).reshape(batch, windows * length, -1)
    places = torch.where(index < 0, tokens, index).flatten()
    result = qkv.new_zeros(batch, tokens + 1, heads * head_dim).index_copy(1, places, out)
    return result[:, :tokens].contiguous()


@packed_attention_indexed.register_fake
def _(
    qkv: Tensor, index: Tensor, fill: Tensor, windows_bias: Tensor | None, bias_index: Tensor | None, scale: float
) -> Tensor:
    return qkv.new_empty((qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4]))


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
