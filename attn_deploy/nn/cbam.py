"""The convolutional block attention module (CBAM): a gate per channel, then a gate per pixel.

Woo et al., "CBAM: Convolutional Block Attention Module", ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attn_deploy.nn.checks import reduced, require, require_map


class ChannelAttention(nn.Module):
    """x * sigmoid(MLP(mean) + MLP(max)), mean and maximum over height and width, through the same weights.

    Woo et al. 2018, equation 2. `reduction` is the ratio r of the hidden layer, channels / r wide, rounded down.

    Raises ValueError when a size is not positive or `reduction` exceeds `channels`.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = reduced(channels, reduction)
        self.channels = channels
        self.mlp = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        require_map(x, self.channels)
        mean = x.mean(dim=(2, 3), keepdim=True)
        maximum = x.amax(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.mlp(mean) + self.mlp(maximum))


class SpatialAttention(nn.Module):
    """x * sigmoid(conv([mean; max])), mean and maximum over channels, with a convolution of 7x7 unless told otherwise.

    Woo et al. 2018, equation 3.

    Raises ValueError when `kernel_size` is even or not positive: the map would change its size.
    """

    def __init__(self, *, kernel_size: int = 7) -> None:
        super().__init__()
        require(
            kernel_size >= 1 and kernel_size % 2 == 1, "kernel_size", got=kernel_size, expected="a positive odd number"
        )
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another
        rank."""
        require_map(x)
        pooled = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(pooled))


class CBAM(nn.Module):
    """`SpatialAttention` of `ChannelAttention` of x: Woo et al. 2018, equation 1.

    Raises ValueError for what these two do not take.
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        self.channel_attention = ChannelAttention(channels, reduction=reduction)
        self.spatial_attention = SpatialAttention(kernel_size=kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        return self.spatial_attention(self.channel_attention(x))
