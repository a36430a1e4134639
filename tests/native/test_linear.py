"""The kernel RunLinear on every instruction set, against the float64 reference of attn_deploy/ops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from kernel_runner import KernelRunner
from linear_cases import ACTIVATION_NUMBERS, LANES, TILE_ROWS, Array, Linear, rows_of

ACTIVATIONS = ("", "Relu", "Silu", "Gelu", "GeluTanh", "Hardswish")


def run_and_check(run: KernelRunner, calls: Sequence[Linear]) -> list[Array]:
    arrays = [call.arrays() for call in calls]
    outputs = run([call.case(given) for call, given in zip(calls, arrays, strict=True)])
    for call, given, (output,) in zip(calls, arrays, outputs, strict=True):
        try:
            call.check(output, given)
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from error
    return [output for (output,) in outputs]


def edges(size: int) -> list[int]:
    return sorted({1, size - 1, size, size + 1})


def test_sizes_around_the_tiles(kernel_runner: KernelRunner) -> None:
    lanes, tile_rows = LANES[kernel_runner.isa], TILE_ROWS[kernel_runner.isa]
    rows = [*edges(tile_rows), 2, 3, 2 * tile_rows + 1]
    columns = [*edges(lanes), *edges(2 * lanes), 4 * lanes + 3]
    calls = [
        Linear(m, k, n, activation, norm=(m + n) % 2 == 0, residual=(m + k) % 3 == 0)
        for (m, n), k, activation in zip(
            itertools.product(rows, columns), itertools.cycle([1, 2, 7, 16, 33]), itertools.cycle(ACTIVATIONS)
        )
    ]
    run_and_check(kernel_runner, calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_form(kernel_runner: KernelRunner, activation: str) -> None:
    calls = [
        Linear(m, 37, n, activation, norm, residual)
        for norm, residual, m, n in itertools.product((False, True), (False, True), (5, 59), (32, 61))
    ]
    run_and_check(kernel_runner, calls)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ["", "Gelu"])
def test_strides_and_misalignment(kernel_runner: KernelRunner, norm: bool, activation: str) -> None:
    calls = [
        Linear(23, 19, n, activation, norm, True, 19 + dx, n + dr, n + dy, misalignments)
        for n in (64, 35)
        for dx, dr, dy, misalignments in (
            (0, 3, 0, (1, 2, 3, 1)), (5, 0, 2, (3, 1, 1, 2)), (45, 13, 29, (2, 3, 2, 3)),
        )
    ]  # fmt: skip
    run_and_check(kernel_runner, calls)


def test_deep_products_are_done_in_slices(kernel_runner: KernelRunner) -> None:
    """Above 1,024 inputs sums are put down and taken up again, for whole panels and for a last one."""
    calls = [Linear(9, k, 37, activation, True, True) for k in (1023, 1025, 2049, 4096) for activation in ("", "Gelu")]
    run_and_check(kernel_runner, [*calls, Linear(9, 1024, 64), Linear(30, 3072, 33, residual=True)])


def test_rows_and_columns_in_many_blocks(kernel_runner: KernelRunner) -> None:
    """56 rows and 2^20 products are the sizes of a block: one, some and many of both kinds, none of them even."""
    calls = [Linear(56, 8, 8), Linear(57, 96, 100, norm=True), Linear(113, 40, 33), Linear(521, 17, 40, "Relu", True)]
    calls += [Linear(1, 1031, 2053), Linear(13, 769, 1999, "Gelu", True, True), Linear(100, 384, 1153, norm=True)]
    run_and_check(kernel_runner, calls)


def test_a_row_is_the_same_bits_in_whatever_block(kernel_runner: KernelRunner) -> None:
    call = Linear(120, 1100, 70, "Gelu", True, True)
    arrays = call.arrays()
    x, weight, bias, residual = arrays
    some = Linear(3, 1100, 70, "Gelu", True, True)
    (whole,), (part,) = kernel_runner([call.case(arrays), some.case([x[50:53], weight, bias, residual[50:53]])])
    np.testing.assert_array_equal(part, whole.reshape(120, 70)[50:53].reshape(-1))


def test_no_rows(kernel_runner: KernelRunner) -> None:
    assert run_and_check(kernel_runner, [Linear(0, 5, 7, norm=True)])[0].size == 0


@pytest.mark.parametrize("mean", [-1e3, 1e3, 3e4])
def test_norm_is_right_where_the_mean_is_large_against_the_spread(kernel_runner: KernelRunner, mean: float) -> None:
    """What float32 rounds away in the naive E[x^2] - E[x]^2: x is 3e4 plus 1, its square 9e8."""
    calls = [Linear(9, columns, 16, norm=True, mean=mean) for columns in (3, 48, 61, 768, 3001)]
    run_and_check(kernel_runner, calls)


def test_norm_of_equal_numbers_is_zero(kernel_runner: KernelRunner) -> None:
    call = Linear(6, 48, 16, norm=True)
    x, weight, bias = call.arrays()
    x[:] = np.array([0, 1, -7.3, 1e4, 1e-20, 123.456], np.float32)[:, None]
    ((output,),) = kernel_runner([call.case([x, weight, bias])])
    np.testing.assert_allclose(output.reshape(6, 16), np.broadcast_to(bias, (6, 16)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(kernel_runner: KernelRunner, norm: bool, activation: str) -> None:
    call = Linear(31, 33, 35, activation, norm)
    x, weight, bias = call.arrays()
    x[17, 20] = np.nan
    ((output,),) = kernel_runner([call.case([x, weight, bias])])
    bad = np.isnan(output.reshape(31, 35))
    assert bad[17].all()
    assert not np.delete(bad, 17, axis=0).any()


def test_infinity_is_not_lost(kernel_runner: KernelRunner) -> None:
    call = Linear(2, 3, 4)
    x, weight, bias = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32), np.zeros(4, np.float32)
    x[1, 2] = -np.inf
    ((output,),) = kernel_runner([call.case([x, weight, bias])])
    np.testing.assert_array_equal(output.reshape(2, 4), [[3.0] * 4, [-np.inf] * 4])


@pytest.mark.slow
def test_every_number_of_rows_and_columns(kernel_runner: KernelRunner) -> None:
    calls = [
        Linear(m, 11, n, ("", "Gelu")[(m + n) % 2], m % 3 == 0, n % 2 == 0)
        for m, n in itertools.product(range(1, 61), range(1, 71))
    ]
    run_and_check(kernel_runner, calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(197, 384, 1152), (197, 192, 576), (197, 1536, 384), (3136, 96, 288), (784, 192, 768), (49, 3072, 768)],
)
def test_sizes_of_models(kernel_runner: KernelRunner, rows: int, inputs: int, outputs: int) -> None:
    run_and_check(kernel_runner, [Linear(rows, inputs, outputs, "GeluTanh", True, True)])


def test_the_check_of_gaps_would_see_a_write(kernel_runner: KernelRunner) -> None:
    assert set(ACTIVATIONS) <= set(ACTIVATION_NUMBERS)
    with pytest.raises(AssertionError):
        rows_of(np.zeros(7, np.float32), 2, 3, 4)
