"""Squeeze-and-excitation: each channel weighted by a small network on the means of all channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.nn.checks import reduced, require_map


class SqueezeExcitation(nn.Module):
    """x * sigmoid(W_2 relu(W_1 z)), with z the means of x over height and width.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, equations 2 to 4. `reduction` is the ratio r of the hidden
    layer, channels / r wide, rounded down.

    Raises ValueError when a size is not positive or `reduction` exceeds `channels`.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        squeezed = reduced(channels, reduction)
        self.channels = channels
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        require_map(x, self.channels)
        pooled = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.squeeze(pooled))))
