"""The kernel RunFeedForward on every instruction set, against the float64 reference of attn_deploy/ops."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from kernel_runner import KernelRunner
from linear_cases import LANES, TILE_ROWS, FeedForward

ACTIVATIONS = ("Gelu", "Relu", "Silu", "GeluTanh")


def run_and_check(run: KernelRunner, calls: Sequence[FeedForward]) -> None:
    arrays = [call.arrays() for call in calls]
    outputs = run([call.case(given) for call, given in zip(calls, arrays, strict=True)])
    for call, given, (output,) in zip(calls, arrays, outputs, strict=True):
        try:
            call.check(output, given)
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from error


def test_sizes_around_the_tiles(kernel_runner: KernelRunner) -> None:
    panel, tile_rows = 2 * LANES[kernel_runner.isa], TILE_ROWS[kernel_runner.isa]
    sizes = [1, panel - 1, panel, panel + 1, 2 * panel + 3]
    calls = [
        FeedForward(rows, channels, hidden, activation)
        for (channels, hidden), rows, activation in zip(
            itertools.product(sizes, [1, panel - 1, panel, panel + 1, 101]),
            itertools.cycle([1, tile_rows - 1, tile_rows, tile_rows + 1, 29, 61]),
            itertools.cycle(ACTIVATIONS),
        )
    ]
    run_and_check(kernel_runner, calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hidden_layers_in_one_and_many_groups(kernel_runner: KernelRunner, activation: str) -> None:
    """Groups of 384 hidden columns: less than one, one, one and a bit, three less a bit."""
    run_and_check(kernel_runner, [FeedForward(17, 45, hidden, activation) for hidden in (383, 384, 385, 1151)])


def test_strides_and_misalignment(kernel_runner: KernelRunner) -> None:
    calls = [
        FeedForward(23, channels, 70, "Gelu", channels + dx, channels + dy, misalignments)
        for channels in (64, 35)
        for dx, dy, misalignments in ((0, 3, (1, 2, 3, 1, 2)), (5, 0, (3, 1, 1, 2, 3)), (29, 17, (2, 3, 2, 3, 1)))
    ]
    run_and_check(kernel_runner, calls)


def test_rows_in_many_blocks(kernel_runner: KernelRunner) -> None:
    run_and_check(kernel_runner, [FeedForward(rows, 33, 65) for rows in (56, 57, 113, 401)])
    run_and_check(kernel_runner, [FeedForward(2, 512, 1536), FeedForward(49, 160, 640)])  # two blocks of few rows


def test_a_row_is_the_same_bits_in_whatever_block(kernel_runner: KernelRunner) -> None:
    call, some = FeedForward(120, 40, 500), FeedForward(3, 40, 500)
    x, *weights = call.arrays()
    (whole,), (part,) = kernel_runner([call.case([x, *weights]), some.case([x[50:53], *weights])])
    np.testing.assert_array_equal(part, whole.reshape(120, 40)[50:53].reshape(-1))


def test_no_rows(kernel_runner: KernelRunner) -> None:
    run_and_check(kernel_runner, [FeedForward(0, 5, 7)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(kernel_runner: KernelRunner, activation: str) -> None:
    call = FeedForward(31, 33, 35, activation)
    x, *weights = call.arrays()
    x[17, 20] = np.nan
    ((output,),) = kernel_runner([call.case([x, *weights])])
    bad = np.isnan(output.reshape(31, 33))
    assert bad[17].all()
    assert not np.delete(bad, 17, axis=0).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "channels", "hidden"),
    [(197, 192, 768), (197, 384, 1536), (3136, 96, 384), (784, 192, 768), (49, 768, 3072), (7, 1024, 4096)],
)
def test_sizes_of_models(kernel_runner: KernelRunner, rows: int, channels: int, hidden: int) -> None:
    run_and_check(kernel_runner, [FeedForward(rows, channels, hidden)])
