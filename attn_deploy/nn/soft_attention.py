"""Soft attention: all tokens as one, a mean weighted by learned scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_positive, require_tokens


class SoftAttention(nn.Module):
    """sum_j a_j h_j with a = softmax(e) over tokens and e_j = v^T tanh(U h_j + b + W s).

    Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", ICLR 2015, equations 5 and
    6 and appendix A.1.2 (additive attention). `hidden` is the width of the alignment model, `dim` unless given. s is a
    query, [batch, query_dim], such as the state of a decoder; without `query_dim` there is none, and what is learned is
    which tokens matter at all: attention pooling. v has no bias: it would add the same to all scores, which softmax
    cancels.

    Raises ValueError when a size is not positive.
    """

    def __init__(self, dim: int, *, hidden: int | None = None, query_dim: int | None = None) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        require_positive(dim=dim, hidden=hidden)
        self.dim, self.query_dim = dim, query_dim
        self.tokens = nn.Linear(dim, hidden)
        if query_dim is not None:
            require_positive(query_dim=query_dim)
            self.query = nn.Linear(query_dim, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, query: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [batch, tokens, dim] and query [batch, query_dim], of the parameters' dtype -> [batch, dim].

        `mask` is boolean [batch, tokens], true where a token counts; where none does the result is 0. Raises ValueError
        for other ranks and sizes, a mask of another dtype, and for a query that is missing or has no use.
        """
        require_tokens(x, self.dim, "x")
        scores = self.score(torch.tanh(self._aligned(x, query))).squeeze(2)  # [batch, tokens]
        if mask is None:
            return _weighted(scores, x)
        require(mask.dtype == torch.bool, "dtype of mask", got=mask.dtype, expected="bool")
        fits = mask.dim() == 2 and mask.shape[1] == x.shape[1]
        require(fits, "mask", got=list(mask.shape), expected=f"[batch, {x.shape[1]}]")
        # Not -inf: where no token counts, softmax would give NaN. What it gives there is dropped.
        mean = _weighted(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), x)
        return mean.masked_fill(~mask.any(dim=1, keepdim=True), 0.0)

    def _aligned(self, x: Tensor, query: Tensor | None) -> Tensor:
        """[batch, tokens, hidden]"""
        if self.query_dim is None:
            require(query is None, "query", got="a tensor", expected="None: the module was made without query_dim")
            return self.tokens(x)
        if query is None:
            raise ValueError(f"query: got None, expected [batch, {self.query_dim}]")
        fits = query.dim() == 2 and query.shape[1] == self.query_dim
        require(fits, "query", got=list(query.shape), expected=f"[batch, {self.query_dim}]")
        return self.tokens(x) + self.query(query).unsqueeze(1)


def _weighted(scores: Tensor, x: Tensor) -> Tensor:
    """[batch, tokens] and [batch, tokens, dim] -> [batch, dim]"""
    return (scores.softmax(dim=1).unsqueeze(1) @ x).squeeze(1)
