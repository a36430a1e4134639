"""The kernels on 8-bit maps against integer arithmetic: every instruction set, every level and weight, edges of all
kinds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_runner import Case, KernelRunner

from attn_deploy.ops.activation import ACTIVATIONS

Array = np.ndarray[Any, Any]

NUMBERS = {"": 0, "Relu": 1, "Silu": 2, "Hardswish": 5}
"""As activation.h numbers them."""


@dataclass(frozen=True)
class Conv:
    """x [height, width, in], weight [out, kernel_height, kernel_width, in or 1] around 128."""

    x: Array
    weight: Array
    stride: int = 1
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    x_zero: int = 0
    y_zero: int = 0
    activation: str = ""
    residual: Array | None = None
    multiplier: float = 0.01
    inverse: float = 1.0

    @property
    def depthwise(self) -> bool:
        return self.weight.shape[3] == 1 and self.weight.shape[0] == self.x.shape[2] > 1

    def sums(self) -> Array:
        """int64 [out_height, out_width, out]"""
        top, left, bottom, right = self.pads
        values = np.pad(self.x.astype(np.int64) - self.x_zero, ((top, bottom), (left, right), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(values, self.weight.shape[1:3], axis=(0, 1))
        windows = windows[:: self.stride, :: self.stride]
        weight = self.weight.astype(np.int64) - 128
        if self.depthwise:
            return np.einsum("hwckl,ckl->hwc", windows, weight[..., 0])
        return np.einsum("hwckl,oklc->hwo", windows, weight)

    def vectors(self) -> tuple[Array, Array, Array, Array]:
        """multiplier, bias, residual_multiplier, inverse: float32 [out], all different."""
        factors = np.linspace(0.5, 2.0, len(self.weight)).astype(np.float32)
        none = np.float32(0.0) if self.residual is None else np.float32(1.0)
        return (
            self.multiplier * factors,
            np.linspace(-3.0, 3.0, len(self.weight)).astype(np.float32) + np.float32(self.y_zero * self.is_piecewise),
            factors * none,
            np.float32(self.inverse) / factors,
        )

    @property
    def is_piecewise(self) -> bool:
        return self.activation in ("", "Relu")

    def expected(self) -> Array:
        """What the levels are before they are rounded, float64."""
        multiplier, bias, residual_multiplier, inverse = (v.astype(np.float64) for v in self.vectors())
        total = self.sums() * multiplier + bias
        if self.residual is not None:
            total = total + self.residual * residual_multiplier
        if self.is_piecewise:
            return np.clip(total, self.y_zero if self.activation else 0, 255)
        return np.clip(ACTIVATIONS[self.activation](total) * inverse + self.y_zero, 0, 255)

    def case(self, misalignment: int = 0) -> Case:
        shape = self.sums().shape
        inputs = [self.x, self.weight, *(v.astype(np.float32) for v in self.vectors())]
        inputs += [] if self.residual is None else [self.residual]
        ints = (self.stride, *self.pads[:2], *shape[:2], self.x_zero, self.y_zero, NUMBERS[self.activation])
        kernel = "quantized_depthwise" if self.depthwise else "quantized_conv"
        return Case(kernel, inputs, ints, misalignments=[misalignment] * len(inputs))


def levels(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def weights(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(1, 256, shape, dtype=np.uint8)


def check(int8_kernel_runner: KernelRunner, convs: list[Conv], misalignment: int = 0, tolerance: float = 1e-3) -> None:
    """Every level is one of the two that the number lies between, and the nearer one unless it is halfway."""
    for conv, (got,) in zip(convs, int8_kernel_runner([c.case(misalignment) for c in convs]), strict=True):
        expected = conv.expected()
        assert got.shape == expected.shape
        error = np.abs(got - expected)
        assert error.max(initial=0.0) <= 0.5 + tolerance, (conv.x.shape, conv.weight.shape, conv.activation)


def test_every_level_times_every_weight(int8_kernel_runner: KernelRunner) -> None:
    """All 256 x 255 products, exactly: the result is the product itself, a part at a time."""
    x = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    weight = np.arange(1, 256, dtype=np.uint8).reshape(255, 1, 1, 1)
    product = x.astype(np.int64).reshape(-1, 1) * (np.arange(1, 256) - 128)
    zeros = [
        np.float32(-shift * 255) for shift in range(-129, 128, 8)
    ]  # products lie in -32385..32385, in bands of 255
    ones, none = np.ones(255, np.float32), np.zeros(255, np.float32)
    cases = [
        Case("quantized_conv", [x, weight, ones, np.full(255, zero), none, ones], (1, 0, 0, 16, 16, 0, 0, 0))
        for zero in zeros
    ]
    for zero, (got,) in zip(zeros, int8_kernel_runner(cases), strict=True):
        np.testing.assert_array_equal(got.reshape(256, 255), np.clip(product + zero, 0, 255))


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("weight", [1, 255])
def test_the_largest_sums_do_not_saturate(int8_kernel_runner: KernelRunner, level: int, weight: int) -> None:
    """4,608 inputs of one sign, as deep as ResNet's."""
    x = np.full((3, 3, 512), level, np.uint8)
    weights = np.full((3, 3, 3, 512), weight, np.uint8)
    check(int8_kernel_runner, [Conv(x, weights, x_zero=z, y_zero=128, multiplier=127 / 1.5e8) for z in (0, 128, 255)])


@pytest.mark.parametrize("activation", NUMBERS)
def test_sizes_around_those_of_vectors_and_tiles(int8_kernel_runner: KernelRunner, activation: str) -> None:
    rng = np.random.default_rng(1)
    convs = []
    for channels, out, residual in itertools.product(
        (1, 3, 4, 16, 17, 67), (1, 7, 8, 15, 16, 31, 33, 64), (False, True)
    ):
        x = levels(rng, 5, 7, channels)
        extra = levels(rng, 5, 7, out) if residual else None
        scale = 0.02 / np.sqrt(channels) if activation in ("", "Relu") else 3e-4 / np.sqrt(channels)
        weight = weights(rng, out, 1, 1, channels)
        convs.append(Conv(x, weight, x_zero=int(rng.integers(256)), y_zero=40, multiplier=scale, inverse=20.0,
                          activation=activation, residual=extra))  # fmt: skip
    check(int8_kernel_runner, convs, misalignment=3, tolerance=0.03)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depthwise", [False, True])
def test_windows_strides_and_paddings(int8_kernel_runner: KernelRunner, stride: int, depthwise: bool) -> None:
    rng = np.random.default_rng(2)
    convs = []
    for size, (height, width) in itertools.product((1, 2, 3, 5, 7), ((1, 1), (3, 9), (8, 5), (14, 23))):
        for pads in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 3), (3, 3, 3, 3), (0, 0, 1, 1)):
            if height + pads[0] + pads[2] < size or width + pads[1] + pads[3] < size:
                continue
            channels = int(rng.choice([2, 8, 16, 20, 33]))
            weight = weights(rng, channels, size, size, 1) if depthwise else weights(rng, 10, size, size, channels)
            convs.append(Conv(levels(rng, height, width, channels), weight, stride, pads, x_zero=int(rng.integers(256)),
                              y_zero=128, multiplier=0.003 / size))  # fmt: skip
    check(int8_kernel_runner, convs, misalignment=1)


def test_depthwise_with_activations_and_residuals(int8_kernel_runner: KernelRunner) -> None:
    rng = np.random.default_rng(3)
    convs = [
        Conv(levels(rng, 9, 11, channels), weights(rng, channels, 3, 3, 1), pads=(1, 1, 1, 1), x_zero=7, y_zero=30,
             multiplier=1e-3, inverse=10.0, activation=activation,
             residual=levels(rng, 9, 11, channels) if residual else None)
        for activation in NUMBERS
        for channels in (2, 15, 16, 17, 48)
        for residual in (False, True)
    ]  # fmt: skip
    check(int8_kernel_runner, convs, tolerance=0.03)


def test_deep_and_wide_convolutions_are_cut_into_blocks(int8_kernel_runner: KernelRunner) -> None:
    """More rows and columns than one block has."""
    rng = np.random.default_rng(4)
    convs = [
        Conv(levels(rng, 28, 28, 64), weights(rng, 96, 3, 3, 64), pads=(1, 1, 1, 1), x_zero=3, multiplier=1e-3),
        Conv(levels(rng, 7, 7, 256), weights(rng, 520, 3, 3, 256), pads=(1, 1, 1, 1), x_zero=200, multiplier=1e-3),
        Conv(levels(rng, 40, 40, 48), weights(rng, 48, 5, 5, 1), pads=(2, 2, 2, 2), x_zero=9, multiplier=1e-2),
    ]
    check(int8_kernel_runner, convs)


@pytest.mark.parametrize("activation", ["", "Relu", "Silu"])
def test_gates(int8_kernel_runner: KernelRunner, activation: str) -> None:
    rng = np.random.default_rng(5)
    cases, expected = [], []
    for channels, pixels, residual in itertools.product((1, 15, 16, 17, 64, 70), (1, 2, 49), (False, True)):
        x, extra = levels(rng, pixels, channels), levels(rng, pixels, channels)
        x_scale, y_scale, residual_scale = rng.uniform(0.01, 0.1, (3, channels)).astype(np.float32)
        gate = rng.uniform(0, 1, channels).astype(np.float32)
        inputs = [x, x_scale, gate, 1 / y_scale, residual_scale, *([extra] if residual else [])]
        ints = (NUMBERS[activation], min(3, pixels), 11, 50, 77)
        cases.append(Case("quantized_gate", inputs, ints, misalignments=[1] * len(inputs)))
        total = (x - 11.0) * x_scale.astype(np.float64) * gate
        total = total + (extra - 77.0) * residual_scale if residual else total
        expected.append(np.clip(ACTIVATIONS[activation](total) / y_scale + 50, 0, 255))
    for levels_before, (got,) in zip(expected, int8_kernel_runner(cases), strict=True):
        assert np.abs(got - levels_before).max() <= 0.55


def test_pools(int8_kernel_runner: KernelRunner) -> None:
    rng = np.random.default_rng(6)
    maps = [(levels(rng, pixels, channels), rng.uniform(0.01, 0.1, channels).astype(np.float32))
            for channels, pixels in itertools.product((1, 15, 16, 64, 100), (1, 49, 3136))]  # fmt: skip
    cases = [Case("quantized_pool", [x, scale], (100, 64), misalignments=[1, 1]) for x, scale in maps]
    for (x, scale), (got,) in zip(maps, int8_kernel_runner(cases), strict=True):
        np.testing.assert_allclose(got, (x.mean(axis=0) - 100.0) * scale, rtol=1e-6, atol=1e-6)


def test_the_sum_of_many_large_levels_is_exact(int8_kernel_runner: KernelRunner) -> None:
    x = np.full((200_000, 17), 255, np.uint8)
    (got,) = int8_kernel_runner([Case("quantized_pool", [x, np.ones(17, np.float32)], (0, 64))])[0]
    np.testing.assert_array_equal(got, 255.0)
