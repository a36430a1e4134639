"""Scales and zero points of 8-bit maps, with a scale for every channel.

Where a convolution reads the map, the scales of its input channels become part of its weights before these are rounded
(as equalization does, Nagel et al. 2019, section 4.1, but behind any activation, since whoever writes the map divides
by its scales): the more alike the levels of all channels, the less alike the weights. `STRENGTH` shares out, as
SmoothQuant's (Xiao et al. 2023, equation 4). A depthwise convolution, a gate and a pool read each channel by itself:
there nothing is lost, and every channel has all levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attn_deploy.export.precision.collected import ValueStatistics
from attn_deploy.export.precision.ranges import RangeMethod
from attn_deploy.session import Array

STRENGTH = 0.5
LEVELS = 255
LEAST_SHARE = 1.0 / 32.0
"""Of the largest channel's range: a channel that was nearly dead on the calibration data may not be so on others."""


@dataclass(frozen=True)
class MapScale:
    """A level stands for scale * (level - zero). scale: float32 [1] or [channels]."""

    scale: Array
    zero: int

    def of_channels(self, channels: int) -> Array:
        """float32 [channels]."""
        return np.broadcast_to(self.scale, (channels,)).astype(np.float32)


def map_scale(statistics: ValueStatistics, strength: float, method: RangeMethod = RangeMethod.MIN_MAX) -> MapScale:
    """`strength`: 0 for one scale, 1 for as many as there are channels, each as fine as its channel allows."""
    whole = statistics.range(method)
    low, high = min(whole.low, 0.0), max(whole.high, 0.0)
    if strength == 0.0 or statistics.channel_low is None or statistics.channel_high is None:
        scale = max((high - low) / LEVELS, 1e-12)
        return MapScale(np.array([scale], np.float32), _zero(low, scale))
    lows = np.clip(np.minimum(statistics.channel_low, 0.0), low, 0.0).astype(np.float64)
    highs = np.clip(np.maximum(statistics.channel_high, 0.0), 0.0, high).astype(np.float64)
    largest = np.maximum(-lows, highs).max(initial=0.0)
    if largest == 0.0:
        return MapScale(np.array([1.0], np.float32), 0)
    zero = _shared_zero(lows, highs)
    scales = np.maximum(highs / (LEVELS - zero) if zero < LEVELS else 0.0, -lows / zero if zero else 0.0)
    shares = np.maximum(scales / scales.max(), LEAST_SHARE) ** strength
    return MapScale((shares * scales.max()).astype(np.float32), zero)


def _shared_zero(lows: Array, highs: Array) -> int:
    """The zero point with which the channels' levels are finest: one for all, since padding is one level."""
    if not lows.any():
        return 0
    if not highs.any():
        return LEVELS
    zeros = np.arange(1, LEVELS, dtype=np.float64)[:, None]
    scales = np.maximum(highs / (LEVELS - zeros), -lows / zeros)
    spans = np.maximum(highs - lows, 1e-30) / LEVELS
    return int(np.argmin(np.log(np.maximum(scales / spans, 1e-30)).sum(axis=1))) + 1


def _zero(low: float, scale: float) -> int:
    return int(np.clip(round(-low / scale), 0, LEVELS))
