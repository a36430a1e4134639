"""The attentions of the demo network, one module each, written as the papers write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcitationGate(nn.Module):
    """A gate per channel from the channels' means: [batch, channels, height, width] -> [batch, channels, 1, 1].

    sigmoid(expand(relu(squeeze(mean over height and width)))). Hu et al., "Squeeze-and-Excitation Networks",
    CVPR 2018, section 3.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x, 1)
        return torch.sigmoid(self.expand(F.relu(self.squeeze(pooled))))


class ChannelGate(nn.Module):
    """A gate per channel from mean and maximum: [batch, channels, height, width] -> [batch, channels, 1, 1].

    sigmoid(mlp(mean) + mlp(max)), both through the same weights. Woo et al., "CBAM: Convolutional Block Attention
    Module", ECCV 2018, equation 2.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(channels, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        maximum = x.amax(dim=(2, 3), keepdim=True)
        return torch.sigmoid(self.mlp(mean) + self.mlp(maximum))


class SpatialGate(nn.Module):
    """A gate per pixel from the mean and maximum over channels: [batch, channels, height, width] ->
    [batch, 1, height, width]. CBAM (see `ChannelGate`), equation 3, with its 7x7 convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return torch.sigmoid(self.conv(pooled))


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every token: [batch, tokens, dim] -> [batch, tokens, dim].

    softmax(Q K^T / sqrt(head_dim)) V with query, key and value from one packed projection. Vaswani et al., "Attention
    Is All You Need", NeurIPS 2017, section 3.2.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each [batch, heads, tokens, head_dim]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class HardAttention(nn.Module):
    """The `k` tokens of highest score, summed by the softmax of their scores: [batch, tokens, dim] -> [batch, dim].

    Hard attention as in Xu et al., "Show, Attend and Tell", ICML 2015, section 4.1. In training the choice is sampled
    by Gumbel top-k (Kool et al., "Stochastic Beams and Where to Find Them", ICML 2019), and its gradient goes straight
    through to the softmax over all tokens, so that tokens that were not chosen learn too. In eval mode it is an exact
    top-k and a gather.
    """

    def __init__(self, dim: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.score = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(x).squeeze(-1)  # [batch, tokens]
        if self.training:
            return self._sampled(x, scores)
        best, index = scores.topk(self.k, dim=1)
        chosen = x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))  # [batch, k, dim]
        return (chosen * best.softmax(dim=1).unsqueeze(-1)).sum(dim=1)

    def _sampled(self, x: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand_like(scores).clamp_min(1e-9)
        index = (scores - torch.log(-torch.log(uniform))).topk(self.k, dim=1).indices
        hard = torch.zeros_like(scores).scatter(1, index, scores.gather(1, index).softmax(dim=1))
        soft = scores.softmax(dim=1)
        weight = hard + soft - soft.detach()
        return (x * weight.unsqueeze(-1)).sum(dim=1)
