"""Coordinate attention: each pixel weighted by a gate of its row and a gate of its column."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.nn.checks import require_map, require_positive

_LEAST_HIDDEN = 8
"""Hou et al.'s implementation never makes the shared layer narrower."""


class CoordinateAttention(nn.Module):
    """x * g_h * g_w: g_h is a gate per channel and row, g_w one per channel and column.

    Hou et al., "Coordinate Attention for Efficient Mobile Network Design", CVPR 2021, equations 4 to 9:
    f = hardswish(norm(F_1 [means of rows; means of columns])), cut into f_h and f_w; g_h = sigmoid(F_h f_h) and
    g_w = sigmoid(F_w f_w). F_1, F_h and F_w are 1x1 convolutions, the norm is BatchNorm. `reduction` is the ratio r of
    f, channels / r wide, rounded down, and 8 at least.

    Raises ValueError when a size is not positive.
    """

    def __init__(self, channels: int, *, reduction: int = 32) -> None:
        super().__init__()
        require_positive(channels=channels, reduction=reduction)
        hidden = max(channels // reduction, _LEAST_HIDDEN)
        self.channels = channels
        self.shared = nn.Conv2d(channels, hidden, 1, bias=False)  # the norm takes a bias away
        self.norm = nn.BatchNorm2d(hidden)
        self.rows = nn.Conv2d(hidden, channels, 1)
        self.columns = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], of the parameters' dtype -> the same. Raises ValueError for another rank or
        number of channels."""
        require_map(x, self.channels)
        height, width = x.shape[2:]
        rows = x.mean(dim=3, keepdim=True)  # [batch, channels, height, 1]
        columns = x.mean(dim=2, keepdim=True).transpose(2, 3)  # [batch, channels, width, 1]
        hidden = F.hardswish(self.norm(self.shared(torch.cat([rows, columns], dim=2))))
        of_rows, of_columns = hidden.split([height, width], dim=2)
        row_gate = torch.sigmoid(self.rows(of_rows))
        column_gate = torch.sigmoid(self.columns(of_columns.transpose(2, 3)))
        return x * (row_gate * column_gate)
