"""Inputs, references and tolerances of the Linear and FeedForward kernels, for their tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kernel_runner import Case

from attn_deploy.ops import BLOCK_FORMS

Array = np.ndarray

EPSILON = 1e-6
LANES = {"avx2": 8, "avx_vnni": 8, "avx512": 16, "avx512_vnni": 16, "neon": 4, "neon_dotprod": 4}
TILE_ROWS = {"avx2": 6, "avx_vnni": 6, "avx512": 14, "avx512_vnni": 14, "neon": 12, "neon_dotprod": 12}
"""As kernels/gemm.h has them: sizes around these are the edges of its tiles."""


def _enumerators() -> list[str]:
    text = (Path(__file__).parents[2] / "runtimes" / "native" / "activation.h").read_text()
    found = re.search(r"enum class Activation[^{]*\{([^}]*)\}", text)
    assert found is not None
    return [name.strip().removeprefix("k") for name in re.sub(r"//.*", "", found[1]).split(",") if name.strip()]


ACTIVATION_NUMBERS = {"" if name == "None" else name: number for number, name in enumerate(_enumerators())}


def random(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def with_stride(rows: Array, stride: int) -> Array:
    """The rows with NaN between them, as one array that ends where the last row ends."""
    count, columns = rows.shape
    spread = np.full((count, stride), np.nan, np.float32)
    spread[:, :columns] = rows
    return spread.reshape(-1)[: max(count - 1, 0) * stride + (columns if count else 0)]


def rows_of(output: Array, rows: int, columns: int, stride: int) -> Array:
    """The rows of a kernel's output. What lies between them must be as it was: NaN."""
    memory = np.full(rows * stride, np.nan, np.float32)
    memory[: output.size] = output
    spread = memory.reshape(rows, stride)
    assert np.isnan(spread[:, columns:]).all()
    return spread[:, :columns]


def assert_close(output: Array, expected: Array, magnitude: Array | float, depth: int) -> None:
    """`magnitude`: of the numbers that are added up, so what rounding is measured against: each of `depth` additions
    rounds off at most 6e-8 of it, to either side, so that errors grow with the root of their number."""
    worst = np.max(np.abs(output - expected) / magnitude, initial=0.0)
    allowed = 2e-6 + 1e-7 * np.sqrt(depth)
    assert worst < allowed, f"off by {worst:.1e} of the magnitude, {allowed:.1e} allowed"
    assert not np.isnan(output).any()


@dataclass(frozen=True)
class Linear:
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
    misalignments: Sequence[int] = (0, 0, 0, 0)
    mean: float = 0.0
    """Of the rows of x, whose spread is 1."""

    def arrays(self) -> list[Array]:
        """x, weight, bias and the residual if there is one."""
        rng = np.random.default_rng(self.rows * 7919 + self.inputs * 31 + self.outputs)
        x = random(rng, self.rows, self.inputs) + np.float32(self.mean)
        weight = random(rng, self.inputs, self.outputs) / np.float32(np.sqrt(self.inputs))
        residual = [random(rng, self.rows, self.outputs)] if self.residual else []
        return [x, weight, random(rng, self.outputs), *residual]

    def case(self, arrays: Sequence[Array]) -> Case:
        x, weight, bias, *residual = arrays
        x_stride, y_stride = self.x_stride or self.inputs, self.y_stride or self.outputs
        residual_stride = (self.residual_stride or self.outputs) if self.residual else 0
        ints = [ACTIVATION_NUMBERS[self.activation], self.norm, self.rows, self.inputs, self.outputs]
        given = [with_stride(x, x_stride), weight, bias, *(with_stride(r, residual_stride) for r in residual)]
        return Case(
            "linear", given, [*ints, x_stride, residual_stride, y_stride], [EPSILON], self.misalignments[: len(given)]
        )

    def expected(self, arrays: Sequence[Array]) -> Array:
        x, weight, bias, *residual = arrays
        name = ("Norm" if self.norm else "") + "Linear" + self.activation + ("Residual" if self.residual else "")
        unit = (np.ones(self.inputs, np.float32), np.zeros(self.inputs, np.float32))
        norm = unit if self.norm else ()
        attributes = {"epsilon": EPSILON} if self.norm else {}
        return BLOCK_FORMS[name].reference(x, weight, bias, *norm, *residual, **attributes)[0]

    def check(self, output: Array, arrays: Sequence[Array]) -> None:
        y = rows_of(output, self.rows, self.outputs, self.y_stride or self.outputs)
        assert_close(y, self.expected(arrays), 4.0, self.inputs)


@dataclass(frozen=True)
class FeedForward:
    """A call of the kernel. Strides of 0 are the rows' own length."""

    rows: int
    channels: int
    hidden: int
    activation: str = "Gelu"
    x_stride: int = 0
    y_stride: int = 0
    misalignments: Sequence[int] = (0,) * 5

    def arrays(self) -> list[Array]:
        """x, weight1, bias1, weight2, bias2."""
        rng = np.random.default_rng(self.rows * 7919 + self.channels * 31 + self.hidden)
        weight1 = random(rng, self.channels, self.hidden) / np.float32(np.sqrt(self.channels))
        weight2 = random(rng, self.hidden, self.channels) / np.float32(np.sqrt(self.hidden))
        x = random(rng, self.rows, self.channels)
        return [x, weight1, random(rng, self.hidden), weight2, random(rng, self.channels)]

    def case(self, arrays: Sequence[Array]) -> Case:
        x, *weights = arrays
        x_stride, y_stride = self.x_stride or self.channels, self.y_stride or self.channels
        ints = [ACTIVATION_NUMBERS[self.activation], self.rows, self.channels, self.hidden, x_stride, y_stride]
        return Case("feed_forward", [with_stride(x, x_stride), *weights], ints, [EPSILON], self.misalignments)

    def expected(self, arrays: Sequence[Array]) -> Array:
        x, *weights = arrays
        unit = (np.ones(self.channels, np.float32), np.zeros(self.channels, np.float32))
        return BLOCK_FORMS["FeedForward" + self.activation].reference(x, *unit, *weights, epsilon=EPSILON)[0]

    def check(self, output: Array, arrays: Sequence[Array]) -> None:
        y = rows_of(output, self.rows, self.channels, self.y_stride or self.channels)
        assert_close(y, self.expected(arrays), 4.0, self.channels + self.hidden)
