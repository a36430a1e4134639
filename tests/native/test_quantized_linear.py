"""The kernel RunQuantizedLinear on every instruction set, against the float64 reference of attn_deploy/ops, and to the
bit where float32 leaves no choice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from kernel_runner import KernelRunner
from linear_cases import LANES, TILE_ROWS
from quantized_linear_cases import Array, QuantizedLinear, as_float32_does

ACTIVATIONS = ("", "Relu", "Silu", "Gelu", "GeluTanh", "Hardswish")


def run_and_check(run: KernelRunner, calls: Sequence[QuantizedLinear]) -> list[Array]:
    arrays = [call.arrays() for call in calls]
    outputs = run([call.case(given) for call, given in zip(calls, arrays, strict=True)])
    for call, given, (output,) in zip(calls, arrays, outputs, strict=True):
        try:
            call.check(output, given)
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from error
    return [output for (output,) in outputs]


def product(run: KernelRunner, x: Array, weight: Array, scale: Array | None = None) -> Array:
    """x @ (weight - 128) * scale, no bias."""
    (rows, inputs), outputs = x.shape, weight.shape[1]
    scale = np.ones(outputs, np.float32) if scale is None else scale
    ((y,),) = run([QuantizedLinear(rows, inputs, outputs).case([x, weight, scale, np.zeros(outputs, np.float32)])])
    return y.reshape(rows, outputs)


def edges(size: int) -> list[int]:
    return sorted({1, size - 1, size, size + 1})


def test_sizes_around_the_tiles(int8_kernel_runner: KernelRunner) -> None:
    lanes, tile_rows = LANES[int8_kernel_runner.isa], TILE_ROWS[int8_kernel_runner.isa]
    rows = [*edges(tile_rows), 2, 3, 2 * tile_rows + 1]
    columns = [*edges(lanes), *edges(2 * lanes), 4 * lanes + 3]
    inputs = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127]
    calls = [
        QuantizedLinear(m, k, n, activation, norm=(m + n) % 2 == 0 and k > 1, residual=(m + k) % 3 == 0)
        for (m, n), k, activation in zip(
            itertools.product(rows, columns), itertools.cycle(inputs), itertools.cycle(ACTIVATIONS)
        )
    ]
    run_and_check(int8_kernel_runner, calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form(int8_kernel_runner: KernelRunner, activation: str) -> None:
    calls = [
        QuantizedLinear(m, 37, n, activation, norm, residual)
        for norm, residual, m, n in itertools.product((False, True), (False, True), (5, 59), (32, 61))
    ]
    run_and_check(int8_kernel_runner, calls)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["", "Gelu"])
def test_strides_and_misalignment(int8_kernel_runner: KernelRunner, norm: bool, activation: str) -> None:
    calls = [
        QuantizedLinear(23, 19, n, activation, norm, True, 19 + dx, n + dr, n + dy, misalignments)
        for n in (64, 35)
        for dx, dr, dy, misalignments in (
            (0, 3, 0, (1, 7, 3, 1, 2, 3, 1)), (5, 0, 2, (3, 1, 1, 2, 1, 1, 2)), (45, 13, 29, (2, 3, 2, 3, 3, 2, 3)),
        )
    ]  # fmt: skip
    run_and_check(int8_kernel_runner, calls)


def test_many_inputs(int8_kernel_runner: KernelRunner) -> None:
    calls = [QuantizedLinear(9, k, 37, a, k < 4096, True) for k in (1023, 1025, 2049, 4099) for a in ("", "Gelu")]
    run_and_check(int8_kernel_runner, [*calls, QuantizedLinear(2, 65536, 17)])


def test_rows_and_columns_in_many_blocks(int8_kernel_runner: KernelRunner) -> None:
    calls = [QuantizedLinear(56, 8, 8), QuantizedLinear(57, 96, 100, norm=True), QuantizedLinear(113, 40, 33)]
    calls += [QuantizedLinear(521, 17, 40, "Relu", norm=True), QuantizedLinear(1, 1031, 3053)]
    calls += [QuantizedLinear(13, 769, 1999, "Gelu", True, True), QuantizedLinear(100, 384, 1153, norm=True)]
    run_and_check(int8_kernel_runner, calls)


@pytest.mark.parametrize("position", range(8))
def test_every_level_times_every_weight(int8_kernel_runner: KernelRunner, position: int) -> None:
    """Rows whose levels are what they hold, since they hold 255 and nothing below 0. The other places of a group have
    the largest products, to either side: pairs of them are beyond 16 bits."""
    x = np.full((256, 9), 255, np.float32)
    x[:, position] = np.arange(256)
    weight = np.zeros((9, 2 * 255), np.int64)
    for half, other in ((slice(0, 255), 127), (slice(255, 510), -127)):
        weight[:8, half] = other
        weight[position, half] = np.arange(-127, 128)
    np.testing.assert_array_equal(
        product(int8_kernel_runner, x, (weight + 128).astype(np.uint8)), x.astype(np.int64) @ weight
    )


@pytest.mark.parametrize("inputs", [1, 3, 4, 8, 64, 511, 65536])
def test_the_largest_sums(int8_kernel_runner: KernelRunner, inputs: int) -> None:
    """All levels 255 and all 0, with a zero point of 0 and of 255, times all weights 127 and all -127."""
    x = np.full((4, inputs), 255, np.float32)
    x[1] = -255
    x[2, : inputs // 2] = 0
    x[3, : inputs // 2] = -255
    weight = np.repeat(np.array([[255, 1]], np.uint8), inputs, axis=0)
    expected = as_float32_does(x, weight, np.ones(2, np.float32))
    assert abs(expected[0, 0]) == np.float32(inputs * 255 * 127)
    np.testing.assert_array_equal(product(int8_kernel_runner, x, weight), expected)


@pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
def test_results_are_the_same_bits_on_every_instruction_set(int8_kernel_runner: KernelRunner, offset: float) -> None:
    rng = np.random.default_rng(5)
    for rows, inputs, outputs in ((17, 61, 70), (3, 1037, 33)):
        spread = np.exp(rng.standard_normal((rows, 1)) * 9)
        x = (rng.standard_normal((rows, inputs)) * spread + offset).astype(np.float32)
        weight = rng.integers(1, 256, (inputs, outputs), np.uint8)
        scale = np.exp(rng.standard_normal(outputs)).astype(np.float32)
        y = product(int8_kernel_runner, x, weight, scale)
        np.testing.assert_array_equal(y.view(np.int32), as_float32_does(x, weight, scale).view(np.int32))


def test_a_row_is_the_same_bits_in_whatever_block(int8_kernel_runner: KernelRunner) -> None:
    call = QuantizedLinear(120, 1100, 70, "Gelu", True, True)
    arrays = call.arrays()
    x, *weights, residual = arrays
    some = QuantizedLinear(3, 1100, 70, "Gelu", True, True)
    (whole,), (part,) = int8_kernel_runner([call.case(arrays), some.case([x[50:53], *weights, residual[50:53]])])
    np.testing.assert_array_equal(part, whole.reshape(120, 70)[50:53].reshape(-1))


def test_no_rows(int8_kernel_runner: KernelRunner) -> None:
    call = QuantizedLinear(0, 5, 7)
    ((output,),) = int8_kernel_runner([call.case(call.arrays())])
    assert output.size == 0


def test_a_row_of_zeros_gives_the_bias(int8_kernel_runner: KernelRunner) -> None:
    """And one of numbers so small that the inverse of their scale is no number, within what they are."""
    call = QuantizedLinear(5, 33, 20)
    x, weight, scale, bias = call.arrays()
    x[:] = 0
    x[1, 4] = 1e-45
    x[2] = -1e-38
    x[3, 7] = 1e-36
    ((output,),) = int8_kernel_runner([call.case([x, weight, scale, bias])])
    np.testing.assert_array_equal(output.reshape(5, 20), np.broadcast_to(bias, (5, 20)))


def test_rows_of_one_sign_keep_zero(int8_kernel_runner: KernelRunner) -> None:
    """The range holds 0, so numbers far from 0 have coarse levels: constant rows are exact whatever their size."""
    x = np.repeat(np.array([[1e-30], [-2.5], [7e4], [-3e30]], np.float32), 12, axis=1)
    weight = np.full((12, 5), 129, np.uint8)
    expected = 12 * np.broadcast_to(x[:, :1], (4, 5))
    np.testing.assert_allclose(product(int8_kernel_runner, x, weight), expected, rtol=1e-6)


@pytest.mark.parametrize("mean", [-1e3, 1e3, 3e4])
def test_norm_is_right_where_the_mean_is_large_against_the_spread(
    int8_kernel_runner: KernelRunner, mean: float
) -> None:
    calls = [QuantizedLinear(9, columns, 16, norm=True, mean=mean) for columns in (3, 48, 61, 768, 3001)]
    run_and_check(int8_kernel_runner, calls)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_stays_so_and_alone(
    int8_kernel_runner: KernelRunner, norm: bool, activation: str, bad: float
) -> None:
    call = QuantizedLinear(31, 33, 35, activation, norm)
    arrays = call.arrays()
    whole = [array.copy() for array in arrays]
    arrays[0][17, 20] = bad
    arrays[0][21, 32] = bad
    (output,), (expected,) = int8_kernel_runner([call.case(arrays), call.case(whole)])
    output, expected = output.reshape(31, 35), expected.reshape(31, 35)
    assert not np.isfinite(output[[17, 21]]).any()
    others = [row for row in range(31) if row not in (17, 21)]
    np.testing.assert_array_equal(output[others], expected[others])


@pytest.mark.slow
def test_every_number_of_rows_columns_and_inputs(int8_kernel_runner: KernelRunner) -> None:
    calls = [
        QuantizedLinear(m, 2 + (7 * m + n) % 70, n, ("", "Gelu")[(m + n) % 2], m % 3 == 0, n % 2 == 0)
        for m, n in itertools.product(range(1, 61), range(1, 71))
    ]
    run_and_check(int8_kernel_runner, calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(197, 384, 1152), (197, 192, 576), (197, 1536, 384), (3136, 96, 288), (784, 192, 768), (49, 3072, 768)],
)
def test_sizes_of_models(int8_kernel_runner: KernelRunner, rows: int, inputs: int, outputs: int) -> None:
    run_and_check(int8_kernel_runner, [QuantizedLinear(rows, inputs, outputs, "GeluTanh", True, True)])
