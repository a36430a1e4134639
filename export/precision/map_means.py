"""Means of the channels of activations: what rounded weights shift the sums of a convolution by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.precision.append import Appender, observed_copy
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.session import Array

Batches = Callable[[], Iterable[Mapping[str, Array]]]

MEAN_BATCHES = 4
"""A mean over the pixels of a few images is exact enough."""


def channel_means_of(
    model: ir.Model, names: Sequence[str], batches: Batches, open_model: OpenModel
) -> dict[str, Array]:
    """By name of a value [batch, channels, height, width]: the mean of each channel, float64 [channels].

    Raises AttnDeployError without a sample.
    """
    copy, values = observed_copy(model)
    for name in names:
        append = Appender(copy, f"{name}/mean")
        axes = append.constant("axes", np.array([0, 2, 3], np.int64))
        append.output(f"means/{name}", append.op("ReduceMean", values[name], axes, keepdims=0), rank=1)
    run = open_model(copy)
    sums: dict[str, Array] = {}
    samples = 0
    for feeds in itertools.islice(batches(), MEAN_BATCHES):
        count = len(next(iter(feeds.values())))
        outputs = run(feeds)
        samples += count
        for name in names:
            sums[name] = sums.get(name, 0.0) + count * outputs[f"means/{name}"].astype(np.float64)
    if not samples:
        raise AttnDeployError("calibration saw no sample", got=0, expected="at least 1")
    return {name: total / samples for name, total in sums.items()}


def rounding_shift(weight: Array, rounded: Array, mean: Array) -> Array:
    """What the rounding of a weight adds to the mean of each output channel, float64 [out] (Nagel et al. 2019, section
    4.2): (rounded - weight) times the mean of its input, [in]; [channels] of a depthwise weight.

    weight, rounded: [out, in, kernel_height, kernel_width]. At the edges of the map, where padding stands for input,
    the shift is less.
    """
    error = (rounded.astype(np.float64) - weight).sum(axis=(2, 3))
    return np.asarray(error[:, 0] * mean if error.shape[1] == 1 and len(mean) == len(error) else error @ mean)
