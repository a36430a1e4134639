"""Scaled dot-product attention: of each query, a mean of the values weighted by how well their keys fit it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_dropout

_MASK_SHAPES = "[query_len, key_len] or [batch, heads, query_len, key_len], each but key_len may be 1"


class ScaledDotProductAttention(nn.Module):
    """softmax(scale * Q K^T + bias) V, without parameters.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, equation 1, where scale is 1 / sqrt(head_dim), the
    default here. `causal` hides every key behind the query's own position: query i sees the keys 0 to i, also where
    there are more keys than queries. `dropout` drops attention weights in training.

    Heads of key and value may be fewer than those of query and divide them: each is then shared by a group of
    neighbouring query heads (Ainslie et al., "GQA", EMNLP 2023, section 2.2); with one it is multi-query attention
    (Shazeer, "Fast Transformer Decoding", 2019).

    Raises ValueError for a dropout outside [0, 1) and a scale that is not positive.
    """

    def __init__(self, *, scale: float | None = None, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        require_dropout(dropout)
        require(scale is None or scale > 0, "scale", got=scale, expected="a positive factor of the scores, or None")
        self.scale = scale
        self.causal = causal
        self.dropout = dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """query [batch, heads, query_len, head_dim], key [batch, kv_heads, key_len, head_dim] and value
        [batch, kv_heads, key_len, value_dim], of one floating dtype -> [batch, heads, query_len, value_dim] of it.

        `mask` is boolean, true where a query may look, or of the queries' dtype and added to the scaled scores:
        [query_len, key_len] or [batch, heads, query_len, key_len], where each dimension but the last may be 1. A query
        that may look nowhere gives 0.

        Raises ValueError for other ranks, heads that do not divide, and a mask of another dtype or shape.
        """
        for name, part in (("query", query), ("key", key), ("value", value)):
            require(part.dim() == 4, name, got=list(part.shape), expected="[batch, heads, tokens, head_dim]")
        require(
            key.shape[1] == value.shape[1], "heads of value", got=value.shape[1], expected=f"{key.shape[1]}, as key"
        )
        require(
            query.shape[1] % key.shape[1] == 0,
            "heads of key and value",
            got=key.shape[1],
            expected=f"a divisor of the {query.shape[1]} heads of query",
        )
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, mask, causal=self.causal, scale=self.scale, dropout=dropout)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """What `ScaledDotProductAttention` computes, for modules that have projected and split the heads themselves."""
    if mask is not None:
        _require_mask(mask, query, key)
        if causal:  # PyTorch takes either a mask or causality
            mask = _causal(mask, query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _causal(mask: Tensor, query_len: int, key_len: int) -> Tensor:
    """The mask, and nothing behind the query's own position."""
    seen = torch.ones(query_len, key_len, dtype=torch.bool, device=mask.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, float("-inf"))


def _require_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """The batch is left to PyTorch: it may be symbolic here, and comparing it would fix it."""
    boolean = mask.dtype == torch.bool
    require(boolean or mask.dtype == query.dtype, "dtype of mask", got=mask.dtype, expected=f"bool or {query.dtype}")
    fits = mask.dim() in (2, 4) and mask.shape[-1] == key.shape[2] and mask.shape[-2] in (1, query.shape[2])
    if mask.dim() == 4:
        fits = fits and mask.shape[1] in (1, query.shape[1])
    sizes = f"{query.shape[1]} heads, query_len {query.shape[2]}, key_len {key.shape[2]}"
    require(fits, "shape of mask", got=list(mask.shape), expected=f"{_MASK_SHAPES} ({sizes})")
