"""Weights in 8 bits: symmetric, with a scale of its own for each output channel."""

from __future__ import annotations

import numpy as np

from attn_deploy.session import Array

LARGEST = 127
"""Levels on either side of 0, so that a negated weight is quantized to the negated value."""


def quantize_weight(weight: Array, axis: int, least_scale: Array | None = None) -> tuple[Array, Array]:
    """weight -> (int8 of the same shape, float32 scale [channels]), symmetric per channel of `axis`.

    No scale is below `least_scale` [channels].
    """
    rest = tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=rest)
    scale = np.maximum(largest, np.finfo(np.float32).tiny * 128) / LARGEST
    if least_scale is not None:
        scale = np.maximum(scale, least_scale)
    scale = scale.astype(np.float32)
    quantized = np.clip(np.rint(weight / np.expand_dims(scale, rest)), -LARGEST, LARGEST).astype(np.int8)
    return quantized, scale
