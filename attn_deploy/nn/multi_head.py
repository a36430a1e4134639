"""Multi-head attention, of tokens to themselves or to those of a context."""

from __future__ import annotations

from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_dropout, require_positive, require_tokens
from attn_deploy.nn.positional import RotaryPositionalEncoding
from attn_deploy.nn.scaled_dot_product import attend


class MultiHeadAttention(nn.Module):
    """Concat(head_1 ... head_heads) W_O with head_i = Attention(x W_Q,i, c W_K,i, c W_V,i), head_dim = dim / heads.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.2.2. Without `context_dim` it is
    self-attention, c = x, and one packed linear layer projects to query, key and value. With it, c is the context,
    [batch, context_tokens, context_dim], and each has a linear layer of its own.

    `kv_heads` below `heads` shares each head of key and value among heads / kv_heads neighbouring heads of query
    (grouped-query attention, Ainslie et al., EMNLP 2023; 1 is multi-query attention, Shazeer 2019). `causal` hides the
    tokens behind the query's own. `rotary` turns queries and keys before their product. `bias` is that of the linear
    layers; the keys of cross-attention have none, since it would add the same to all scores of a query, which softmax
    cancels. `dropout` drops attention weights in training.

    Raises ValueError when `heads` does not divide `dim`, `kv_heads` does not divide `heads`, `rotary` is for another
    head_dim, or cross-attention is asked to be causal or rotary: its two sequences have no common positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        rotary: RotaryPositionalEncoding | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        require_positive(dim=dim, heads=heads, kv_heads=kv_heads)
        require(dim % heads == 0, "heads", got=heads, expected=f"a divisor of dim {dim}")
        require(heads % kv_heads == 0, "kv_heads", got=kv_heads, expected=f"a divisor of heads {heads}")
        require_dropout(dropout)
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, dim // heads
        self.context_dim, self.causal, self.dropout = context_dim, causal, dropout
        kv_dim = kv_heads * self.head_dim
        if context_dim is None:
            self.qkv = nn.Linear(dim, dim + 2 * kv_dim, bias=bias)
        else:
            require_positive(context_dim=context_dim)
            require(not causal, "causal", got=causal, expected="False with context_dim: cross-attention sees it all")
            require(rotary is None, "rotary", got=rotary, expected="None with context_dim")
            self.query = nn.Linear(dim, dim, bias=bias)
            self.key = nn.Linear(context_dim, kv_dim, bias=False)
            self.value = nn.Linear(context_dim, kv_dim, bias=bias)
        if rotary is not None:
            fits = rotary.head_dim == self.head_dim
            require(fits, "head_dim of rotary", got=rotary.head_dim, expected=f"{self.head_dim}, dim / heads")
        self.rotary = rotary
        self.output = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [batch, tokens, dim], of the parameters' dtype, and for cross-attention context
        [batch, context_tokens, context_dim] -> [batch, tokens, dim].

        `mask` is boolean, true where a query may look, or of x's dtype and added to the scaled scores:
        [tokens, key_len] or [batch, heads, tokens, key_len], where each dimension but the last may be 1. Padding is
        hidden by `padding[:, None, None, :]`, with padding boolean [batch, key_len]. A query that may look nowhere
        gets the output layer's bias.

        Raises ValueError for other ranks and sizes, and for a context that is missing or has no use.
        """
        query, key, value = self._heads(x, context)
        if self.rotary is not None:
            query, key = self.rotary(query), self.rotary(key)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, mask, causal=self.causal, dropout=dropout)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
        """query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, key_len, head_dim]."""
        require_tokens(x, self.dim, "x")
        parts: tuple[Tensor, ...]
        if self.context_dim is None:
            require(
                context is None, "context", got="a tensor", expected="None: the module was made without context_dim"
            )
            kv_dim = self.kv_heads * self.head_dim
            parts = self.qkv(x).split([self.dim, kv_dim, kv_dim], dim=2)
        else:
            if context is None:
                raise ValueError(f"context: got None, expected [batch, context_tokens, {self.context_dim}]")
            require_tokens(context, self.context_dim, "context")
            parts = (self.query(x), self.key(context), self.value(context))
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return tuple(
            part.unflatten(2, (count, self.head_dim)).transpose(1, 2) for part, count in zip(parts, counts, strict=True)
        )
