"""Which strength of SmoothQuant each norm gets: by what its readers' INT8 forms lose on calibration data.

Every norm is tried with every strength beside the float layers, on the reference's values and in one session. What is
measured is what runs: weights symmetric per output channel, activations unsigned per token. A batch returns a number
for each norm and strength.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.append import Appender, observed_copy
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.quantize_weight import quantize_weight
from attn_deploy.export.precision.smooth_quant import (
    SmoothableNorm,
    constant_of,
    input_axis,
    norms_of,
    smoothing_factors,
)
from attn_deploy.export.precision.statistics import Statistics
from attn_deploy.session import Array

STRENGTHS = (0.15, 0.5)
"""Published for attention models (facts: precision, from NNCF): ViT 0.15, Swin 0.5; a norm may also be left alone."""

TRIAL_BATCHES = 4

LEAST_GAIN_DB = 0.2
"""Of a strength over leaving the norm alone: less is the noise of a few samples."""


def choose_strengths(
    model: ir.Model,
    layers: Sequence[str] | None,
    statistics: Statistics,
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    open_model: OpenModel,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, float]:
    """The plan's `smoothing`: by norm's node the strength with which `layers` (those in INT8; None: all) lose least
    behind it. Norms that are best left alone are not in it."""
    losses = strength_losses(model, layers, statistics, batches, open_model, strengths)
    chosen = {}
    for norm, noise in losses.items():
        best = min(strengths, key=lambda s: noise[s])
        if noise[best] < noise[None] * 10 ** (-LEAST_GAIN_DB / 10):
            chosen[norm] = best
    return chosen


def strength_losses(
    model: ir.Model,
    layers: Sequence[str] | None,
    statistics: Statistics,
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    open_model: OpenModel,
    strengths: Sequence[float] = STRENGTHS,
) -> dict[str, dict[float | None, float]]:
    """By norm's node: relative noise of its readers' tokens (power by the signal's, added over the readers), by
    strength; None is the norm as it is."""
    norms = list(norms_of(model, layers))
    options: list[float | None] = [None, *strengths]
    if not norms:
        return {}
    copy, values = observed_copy(model)
    for number, norm in enumerate(norms):
        trial = _Trial(Appender(copy, f"smoothing/{number}"), norm, values[norm.value])
        largest = statistics.values[norm.value].channel_largest()
        for n, strength in enumerate(options):
            factors = np.ones_like(largest) if strength is None else smoothing_factors(norm, largest, strength)
            trial.add(f"smoothing/{number}/{n}", factors)
    run = open_model(copy)
    totals = np.zeros((len(norms), len(options)))
    count = 0
    for feeds in itertools.islice(batches(), TRIAL_BATCHES):
        outputs = run(feeds)
        count += 1
        totals += [[outputs[f"smoothing/{n}/{o}"] for o in range(len(options))] for n in range(len(norms))]
    return {
        norm.name: dict(zip(options, map(float, row), strict=True))
        for norm, row in zip(norms, totals / max(count, 1), strict=True)
    }


class _Trial:
    """The INT8 forms of one norm's readers beside them. `value`: what the norm writes, [..., channels]."""

    def __init__(self, append: Appender, norm: SmoothableNorm, value: ir.Value) -> None:
        self._append = append
        self._value = value
        self._weights = [constant_of(r).T if input_axis(r) == 1 else constant_of(r) for r in norm.readers]
        exact = [append.constant(f"exact_{n}", np.ascontiguousarray(w)) for n, w in enumerate(self._weights)]
        self._signals = [append.op("MatMul", value, weight) for weight in exact]
        self._powers = [self._power(signal) for signal in self._signals]

    def add(self, name: str, factors: Array) -> None:
        """An output `name`: the noise with the norm's channels divided by `factors`."""
        append = self._append
        given = _rounded_rows(append, append.op("Div", self._value, append.constant(f"{name}/factors", factors)))
        noises = []
        for n, (weight, signal, power) in enumerate(zip(self._weights, self._signals, self._powers, strict=True)):
            levels, scale = quantize_weight(weight * factors[:, None], axis=1)
            rounded = append.constant(f"{name}/weight_{n}", (levels * scale).astype(np.float32))
            noise = self._power(append.op("Sub", append.op("MatMul", given, rounded), signal))
            noises.append(append.op("ReduceMean", append.op("Div", noise, power), keepdims=0))
        append.output(name, append.op("Sum", *noises))

    def _power(self, value: ir.Value) -> ir.Value:
        """Of each token, [...]; never zero."""
        last = self._append.constant("last", np.array([-1], np.int64))
        power = self._append.op("ReduceSumSquare", value, last, keepdims=0)
        return self._append.op("Max", power, self._append.constant("tiny", np.float32(1e-30)))


def _rounded_rows(append: Appender, x: ir.Value) -> ir.Value:
    """What is left of `x` [..., channels] behind unsigned levels with a scale and zero point for each row."""
    last = append.constant("last", np.array([-1], np.int64))
    zero, steps, tiny = (append.constant(n, np.float32(v)) for n, v in (("zero", 0), ("steps", 255), ("tiny", 1e-30)))
    low = append.op("Min", append.op("ReduceMin", x, last), zero)
    high = append.op("Max", append.op("ReduceMax", x, last), zero)
    scale = append.op("Max", append.op("Div", append.op("Sub", high, low), steps), tiny)
    least = append.op("Round", append.op("Div", low, scale))
    levels = append.op("Round", append.op("Div", x, scale))
    kept = append.op("Min", append.op("Max", levels, least), append.op("Add", least, steps))
    return append.op("Mul", kept, scale)
