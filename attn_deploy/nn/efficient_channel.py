"""Efficient channel attention (ECA): each channel weighted by the means of itself and its neighbours."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_map, require_positive


class EfficientChannelAttention(nn.Module):
    """x * sigmoid(conv1d(z)), with z the means of x over height and width and the convolution running over channels.

    Wang et al., "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", CVPR 2020, section 3.2
    and equation 12: without `kernel_size` the size is |log2(channels) / 2 + 1 / 2|, rounded down and, if even, one
    more.

    Raises ValueError when a size is not positive or `kernel_size` is even.
    """

    def __init__(self, channels: int, *, kernel_size: int | None = None) -> None:
        super().__init__()
        require_positive(channels=channels)
        size = _adapted(channels) if kernel_size is None else kernel_size
        require(size >= 1 and size % 2 == 1, "kernel_size", got=size, expected="a positive odd number")
        self.channels = channels
        self.conv = nn.Conv1d(1, 1, size, padding=size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        require_map(x, self.channels)
        pooled = x.mean(dim=(2, 3)).unsqueeze(1)  # [batch, 1, channels]: the channels are what conv1d runs over
        gate = torch.sigmoid(self.conv(pooled)).squeeze(1)
        return x * gate[:, :, None, None]


def _adapted(channels: int) -> int:
    size = int(abs(math.log2(channels) / 2 + 1 / 2))
    return size if size % 2 else size + 1
