"""Inputs, references and tolerances of QuantizedLinear, for its tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from kernel_runner import Case
from linear_cases import ACTIVATION_NUMBERS, EPSILON, random, rows_of, with_stride
from quantized_block_cases import quantize_rows, quantize_weight

from attn_deploy.ops import FORMS, layer_norm, quantized

Array = np.ndarray

NEAR = 2e-4
"""Parts of a level by which float32 may be off the middle of two levels, so that it takes the other one."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A call of the kernel. Strides of 0 are the rows' own length."""

    rows: int
    inputs: int
    outputs: int
    activation: str = ""
    norm: bool = False
    residual: bool = False
    x_stride: int = 0
    residual_stride: int = 0
    y_stride: int = 0
    misalignments: Sequence[int] = (0,) * 7
    mean: float = 0.0
    """Of the rows of x, whose spread is 1."""

    @property
    def form(self) -> str:
        norm, residual = "Norm" if self.norm else "", "Residual" if self.residual else ""
        return f"Quantized{norm}Linear{self.activation}{residual}"

    def arrays(self) -> list[Array]:
        """The operator's inputs in its order."""
        rng = np.random.default_rng(self.rows * 7919 + self.inputs * 31 + self.outputs)
        x = random(rng, self.rows, self.inputs) + np.float32(self.mean)
        weight = quantize_weight(random(rng, self.inputs, self.outputs) / np.float32(np.sqrt(self.inputs)))
        arrays = [x, *weight, random(rng, self.outputs)]
        arrays += [1 + random(rng, self.inputs) / 4, random(rng, self.inputs) / 4] if self.norm else []
        return arrays + ([random(rng, self.rows, self.outputs)] if self.residual else [])

    def case(self, arrays: Sequence[Array]) -> Case:
        x, *given = arrays
        x_stride, y_stride = self.x_stride or self.inputs, self.y_stride or self.outputs
        residual_stride = (self.residual_stride or self.outputs) if self.residual else 0
        if self.residual:
            given[-1] = with_stride(given[-1], residual_stride)
        ints = [ACTIVATION_NUMBERS[self.activation], self.norm, self.rows, self.inputs, self.outputs]
        ints += [x_stride, residual_stride, y_stride]
        inputs = [with_stride(x, x_stride), *given]
        return Case("quantized_linear", inputs, ints, [EPSILON], self.misalignments[: len(inputs)])

    def check(self, output: Array, arrays: Sequence[Array]) -> None:
        """Where a number lies near the middle of two levels, results may differ by what a level makes."""
        y = rows_of(output, self.rows, self.outputs, self.y_stride or self.outputs)
        x, weight, weight_scale, _, *others = arrays
        rows = layer_norm.reference(x, others[0], others[1], EPSILON) if self.norm else x.astype(np.float64)
        levels = quantize_rows(rows, NEAR)
        values = quantized.weights(weight, weight_scale)
        # Hardswish has the steepest slope, 1.5.
        unsure = 1.5 * (levels.unsure * levels.scale) @ np.abs(values)
        magnitude = np.abs(levels.values) @ np.abs(values) + 4
        attributes = {"epsilon": EPSILON} if self.norm else {}
        (expected,) = FORMS[self.form].reference(*arrays, **attributes)
        worst = np.max(np.abs(y - expected) / (unsure + 2e-6 * magnitude), initial=0.0)
        assert worst < 1, f"off by {worst:.2f} of what is allowed"
        assert not np.isnan(y).any()


def as_float32_does(x: Array, weight: Array, weight_scale: Array) -> Array:
    """x @ weight to the bit, for a bias of 0: the definition's steps in float32, sums of integers exact. What a kernel
    gives on every instruction set."""
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    inverse = np.float32(255) / (high - low)
    zero = np.rint(-low * inverse)
    levels = np.minimum(np.rint(x * inverse) + zero, 255)
    sums = (levels - zero).astype(np.int64) @ (weight.astype(np.int64) - 128)
    scale = (high - low) / np.float32(255)
    return (sums.astype(np.float32) * scale) * weight_scale
