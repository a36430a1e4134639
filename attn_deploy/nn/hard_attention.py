"""Hard attention: the k tokens of highest score, and no other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_positive, require_tokens


class HardAttention(nn.Module):
    """The k tokens h_j of highest score e_j = w^T h_j, best first.

    Hard attention as in Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1. In training the choice is drawn
    without replacement, by Gumbel noise on the scores (Kool et al., "Stochastic Beams and Where to Find Them", ICML
    2019), and learns by the straight-through estimator (Jang et al., "Categorical Reparameterization with
    Gumbel-Softmax", ICLR 2017, section 2.2): forward the chosen token, backward the softmax of the noisy scores divided
    by `temperature`, over the tokens that are left to choose from. In evaluation it is top-k and a gather, without
    noise. w has no bias: it would change no choice.

    Raises ValueError when a size or the temperature is not positive.
    """

    def __init__(self, dim: int, k: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        require_positive(dim=dim, k=k)
        require(temperature > 0, "temperature", got=temperature, expected="a positive number")
        self.dim, self.k, self.temperature = dim, k, temperature
        self.score = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim], of the parameters' dtype -> [batch, k, dim] of it.

        Raises ValueError for another rank or dim, and for fewer than k tokens.
        """
        require_tokens(x, self.dim, "x")
        require(x.shape[1] >= self.k, "number of tokens", got=x.shape[1], expected=f"at least k, {self.k}")
        scores = self.score(x).squeeze(2)  # [batch, tokens]
        if self.training:
            return self._drawn(scores) @ x
        chosen = scores.topk(self.k, dim=1).indices
        return x.gather(1, chosen.unsqueeze(2).expand(-1, -1, self.dim))

    def _drawn(self, scores: Tensor) -> Tensor:
        """[batch, k, tokens]: of each choice one 1 and else 0, with the gradient of its softmax."""
        noisy = scores - torch.empty_like(scores).exponential_().log()  # -log of an exponential is Gumbel noise
        chosen = noisy.topk(self.k, dim=1).indices
        hard = torch.zeros(chosen.shape + scores.shape[1:], dtype=scores.dtype, device=scores.device)
        hard = hard.scatter(2, chosen.unsqueeze(2), 1.0)
        taken = (hard.cumsum(dim=1) - hard).bool()  # by the choices before
        left = noisy.unsqueeze(1).masked_fill(taken, float("-inf"))
        soft = (left / self.temperature).softmax(dim=2)
        return hard + soft - soft.detach()
