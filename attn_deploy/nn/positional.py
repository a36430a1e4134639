"""Positional encodings: sinusoidal and learned ones are added to the tokens, rotary turns queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_positive, require_tokens


class SinusoidalPositionalEncoding(nn.Module):
    """Adds PE(pos, 2i) = sin(pos / base^(2i / dim)) and PE(pos, 2i + 1) = cos(pos / base^(2i / dim)).

    Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.5, where base is 10000. No parameters; the
    table is not saved with them.

    Raises ValueError when `dim` is odd or a size is not positive.
    """

    table: Tensor

    def __init__(self, dim: int, max_len: int, *, base: float = 10000.0) -> None:
        super().__init__()
        angles = _angles(dim, max_len, base)
        table = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim], of the table's floating dtype -> the same. Raises ValueError for another rank or dim,
        and for more tokens than `max_len`."""
        return x + _rows(self.table, x)


class LearnedPositionalEncoding(nn.Module):
    """Adds a learned vector per position: x + E[0:tokens].

    Gehring et al., "Convolutional Sequence to Sequence Learning", ICML 2017, section 3.1; Dosovitskiy et al., "An Image
    Is Worth 16x16 Words", ICLR 2021, equation 1. Drawn from a normal distribution of standard deviation 0.02.

    Raises ValueError when a size is not positive.
    """

    def __init__(self, dim: int, max_len: int) -> None:
        super().__init__()
        require_positive(dim=dim, max_len=max_len)
        self.table = nn.Parameter(torch.empty(max_len, dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim], of the parameters' dtype -> the same. Raises ValueError for another rank or dim, and
        for more tokens than `max_len`."""
        return x + _rows(self.table, x)


class RotaryPositionalEncoding(nn.Module):
    """Turns pair i of a query's or key's elements by the angle position / base^(2i / head_dim).

    (a, b) -> (a cos - b sin, a sin + b cos), so that the product of a turned query and a turned key depends on their
    contents and on the distance of their positions only. Su et al., "RoFormer: Enhanced Transformer with Rotary
    Position Embedding", 2021, equations 14 to 16 and 34, where base is 10000 and neighbours (2i, 2i + 1) make a pair:
    `interleaved`. Without it the pairs are (i, i + head_dim / 2), as in GPT-NeoX and Llama: the same up to a
    permutation of the projections' rows. No parameters; the tables are not saved with them.

    Raises ValueError when `head_dim` is odd or a size is not positive.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_len: int, *, base: float = 10000.0, interleaved: bool = True) -> None:
        super().__init__()
        angles = _angles(head_dim, max_len, base, name="head_dim")
        angles = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat([angles, angles], dim=1)
        self.head_dim = head_dim
        self.interleaved = interleaved
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim], of the tables' floating dtype -> the same; the first token has position 0.

        Raises ValueError for another rank or head_dim, and for more tokens than `max_len`.
        """
        fits = x.dim() == 4 and x.shape[3] == self.head_dim
        require(fits, "query or key", got=list(x.shape), expected=f"[batch, heads, tokens, {self.head_dim}]")
        tokens = _within(x.shape[2], self.cos)
        return x * self.cos[:tokens] + self._quarter_turn(x) * self.sin[:tokens]

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """(a, b) -> (-b, a) for every pair."""
        if self.interleaved:
            return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)


def _angles(dim: int, max_len: int, base: float, *, name: str = "dim") -> Tensor:
    """position / base^(2i / dim): float64 [max_len, dim / 2], since float32 loses the phase of late positions."""
    require_positive(**{name: dim}, max_len=max_len)
    require(dim % 2 == 0, name, got=dim, expected="an even number: a sine and a cosine for each frequency")
    require(base > 0, "base", got=base, expected="a positive number")
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.outer(torch.arange(max_len, dtype=torch.float64), frequencies)


def _rows(table: Tensor, x: Tensor) -> Tensor:
    """The table's rows for the tokens of x."""
    require_tokens(x, table.shape[1], "tokens")
    return table[: _within(x.shape[1], table)]


def _within(tokens: int, table: Tensor) -> int:
    require(tokens <= table.shape[0], "number of tokens", got=tokens, expected=f"at most max_len, {table.shape[0]}")
    return tokens
