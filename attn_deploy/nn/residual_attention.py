"""Residual attention: features of a trunk branch, weighted by one plus a soft mask of a second branch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.nn.checks import require, require_map, require_positive


class ResidualAttentionBlock(nn.Module):
    """(1 + M(x)) * T(x), T a trunk of residual units, M a mask in (0, 1) from an hourglass of residual units.

    Wang et al., "Residual Attention Network for Image Classification", CVPR 2017, equation 3 and figure 2. `pre_units`,
    `trunk_units` and `mask_units` are the paper's p, t and r: the units before the branches part, in the trunk, and
    between two neighbouring scales of the mask branch. `depth` counts its max pools, each undone by a bilinear
    interpolation; scales between the first and the last have a skip connection of one unit. The mask ends in two 1x1
    convolutions and a sigmoid for each channel and pixel (equation 4, mixed attention). Units are pre-activation
    bottlenecks (He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016) of channels / 4.

    Raises ValueError when `channels` is no multiple of 4, or a count is not positive (`pre_units`: negative).
    """

    def __init__(
        self, channels: int, *, pre_units: int = 1, trunk_units: int = 2, mask_units: int = 1, depth: int = 2
    ) -> None:
        super().__init__()
        require_positive(channels=channels, trunk_units=trunk_units, mask_units=mask_units, depth=depth)
        require(channels % 4 == 0, "channels", got=channels, expected="a multiple of 4")
        require(pre_units >= 0, "pre_units", got=pre_units, expected="0 or more")
        self.channels = channels
        self.pre = _units(channels, pre_units)
        self.trunk = _units(channels, trunk_units)
        self.mask = nn.Sequential(
            _Hourglass(channels, mask_units, depth),
            *_activated_conv(channels, channels),
            *_activated_conv(channels, channels, bias=True),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        require_map(x, self.channels)
        x = self.pre(x)
        return (1 + self.mask(x)) * self.trunk(x)


class _Hourglass(nn.Module):
    """Down by a max pool, through units and the next smaller scale, and up again: the map keeps its shape."""

    def __init__(self, channels: int, units: int, depth: int) -> None:
        super().__init__()
        self.enter = _units(channels, units)
        self.skip = _ResidualUnit(channels) if depth > 1 else None
        self.inner = _Hourglass(channels, units, depth - 1) if depth > 1 else None
        self.leave = _units(channels, units)

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(F.max_pool2d(x, kernel_size=3, stride=2, padding=1))
        if self.inner is not None and self.skip is not None:
            y = self.inner(y) + self.skip(y)
        return F.interpolate(self.leave(y), size=x.shape[2:], mode="bilinear", align_corners=False)


class _ResidualUnit(nn.Module):
    """x + f(x), with f three times norm, ReLU and convolution: 1x1, 3x3, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = channels // 4
        self.body = nn.Sequential(
            *_activated_conv(channels, inner),
            *_activated_conv(inner, inner, kernel_size=3),
            *_activated_conv(inner, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _units(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(_ResidualUnit(channels) for _ in range(count)))


def _activated_conv(inputs: int, outputs: int, *, kernel_size: int = 1, bias: bool = False) -> list[nn.Module]:
    """Norm, ReLU and a convolution; a bias is for where no norm comes behind it to take it away again."""
    conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)
    return [nn.BatchNorm2d(inputs), nn.ReLU(), conv]
