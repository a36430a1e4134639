"""Layers of Transformer encoders and decoders: attention and a feed-forward network, each with norm and residual."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_dropout, require_positive
from attn_deploy.nn.multi_head import MultiHeadAttention
from attn_deploy.nn.positional import RotaryPositionalEncoding

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class _Sublayers(nn.Module):
    """What both kinds of layer share: the feed-forward network, and how a sublayer joins the residual stream."""

    def __init__(self, dim: int, hidden: int, *, pre_norm: bool, activation: str, dropout: float) -> None:
        super().__init__()
        require_positive(dim=dim, hidden=hidden)
        require_dropout(dropout)
        known = " or ".join(_ACTIVATIONS)
        require(activation in _ACTIVATIONS, "activation", got=repr(activation), expected=known)
        self.pre_norm = pre_norm
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden), _ACTIVATIONS[activation](), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.residual_dropout = nn.Dropout(dropout)

    def _joined(self, x: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x + f(norm(x)) with pre-norm, else norm(x + f(x)); the dropout is that of section 5.4."""
        if self.pre_norm:
            return x + self.residual_dropout(sublayer(norm(x)))
        return norm(x + self.residual_dropout(sublayer(x)))


class TransformerEncoderLayer(_Sublayers):
    """Self-attention, then activation(x W_1 + b_1) W_2 + b_2, each as a residual.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, sections 3.1 and 3.3: LayerNorm(x + f(x)), ReLU. With
    `pre_norm` each is x + f(LayerNorm(x)) (Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML
    2020, table 1); such a stack wants a LayerNorm behind its last layer, which is not part of this module. `hidden` is
    the width of the feed-forward network, `activation` its "relu" or "gelu". `kv_heads`, `causal` and `rotary` are
    those of `MultiHeadAttention`; a causal layer is what language models without an encoder are made of.

    Raises ValueError for an unknown activation and for what `MultiHeadAttention` does not take.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        pre_norm: bool = True,
        activation: str = "gelu",
        kv_heads: int | None = None,
        causal: bool = False,
        rotary: RotaryPositionalEncoding | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, hidden, pre_norm=pre_norm, activation=activation, dropout=dropout)
        self.self_attention = MultiHeadAttention(
            dim, heads, kv_heads=kv_heads, causal=causal, rotary=rotary, dropout=dropout
        )
        self.self_attention_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, tokens, dim], of the parameters' dtype -> the same; `mask` as `MultiHeadAttention` takes it.

        Raises ValueError for another rank or dim.
        """
        x = self._joined(x, self.self_attention_norm, lambda y: self.self_attention(y, mask=mask))
        return self._joined(x, self.feed_forward_norm, self.feed_forward)


class TransformerDecoderLayer(_Sublayers):
    """Causal self-attention, attention to a context, then the feed-forward network, each as a residual.

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.1 (decoder); pre- and post-norm as in
    `TransformerEncoderLayer`. `context_dim` is the width of the context, `dim` unless given; `kv_heads` holds for both
    attentions, `rotary` for the self-attention.

    Raises ValueError for an unknown activation and for what `MultiHeadAttention` does not take.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        context_dim: int | None = None,
        pre_norm: bool = True,
        activation: str = "gelu",
        kv_heads: int | None = None,
        rotary: RotaryPositionalEncoding | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, hidden, pre_norm=pre_norm, activation=activation, dropout=dropout)
        context_dim = dim if context_dim is None else context_dim
        self.self_attention = MultiHeadAttention(
            dim, heads, kv_heads=kv_heads, causal=True, rotary=rotary, dropout=dropout
        )
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = MultiHeadAttention(
            dim, heads, kv_heads=kv_heads, context_dim=context_dim, dropout=dropout
        )
        self.cross_attention_norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None = None, context_mask: Tensor | None = None
    ) -> Tensor:
        """x [batch, tokens, dim] and context [batch, context_tokens, context_dim], of the parameters' dtype ->
        [batch, tokens, dim].

        `mask` is that of the self-attention, on top of causality, and `context_mask` that of the attention to the
        context, as `MultiHeadAttention` takes them. Raises ValueError for another rank or dim.
        """
        x = self._joined(x, self.self_attention_norm, lambda y: self.self_attention(y, mask=mask))
        x = self._joined(x, self.cross_attention_norm, lambda y: self.cross_attention(y, context, context_mask))
        return self._joined(x, self.feed_forward_norm, self.feed_forward)
