"""QuantizedFeedForward as a kernel on every instruction set, and as an operator, against the definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from kernel_runner import KernelRunner
from linear_cases import EPSILON, LANES, TILE_ROWS
from quantized_block_cases import QuantizedFeedForward

from attn_deploy.ops import FORMS

Array = np.ndarray
ACTIVATIONS = ("Gelu", "Relu", "Silu", "GeluTanh")


def run_and_check(run: KernelRunner, calls: Sequence[QuantizedFeedForward]) -> None:
    arrays = [call.arrays() for call in calls]
    outputs = run([call.case(given) for call, given in zip(calls, arrays, strict=True)])
    for call, given, (output,) in zip(calls, arrays, outputs, strict=True):
        try:
            call.check(output, given)
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from error


def test_sizes_around_the_tiles(int8_kernel_runner: KernelRunner) -> None:
    panel, tile_rows = 2 * LANES[int8_kernel_runner.isa], TILE_ROWS[int8_kernel_runner.isa]
    sizes = [1, 3, panel - 1, panel, panel + 1, 2 * panel + 3]
    calls = [
        QuantizedFeedForward(rows, channels, hidden, activation=activation)
        for (channels, hidden), rows, activation in zip(
            itertools.product(sizes, [1, 2, panel - 1, panel, panel + 1, 101]),
            itertools.cycle([1, tile_rows - 1, tile_rows, tile_rows + 1, 29, 61]),
            itertools.cycle(ACTIVATIONS),
        )
    ]
    run_and_check(int8_kernel_runner, calls)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_group_of_hidden_columns_has_levels_of_its_own(int8_kernel_runner: KernelRunner, activation: str) -> None:
    """Groups of whole panels, groups that end inside a panel, and groups of less than one."""
    calls = [
        QuantizedFeedForward(17, 45, hidden, groups, activation)
        for hidden, groups in ((128, 2), (384, 3), (100, 5), (60, 3), (8, 2), (12, 3), (1024, 2))
    ]
    run_and_check(int8_kernel_runner, calls)


def test_strides_and_misalignment(int8_kernel_runner: KernelRunner) -> None:
    calls = [
        QuantizedFeedForward(23, channels, 72, 2, "Gelu", channels + dx, channels + dy, misalignments)
        for channels in (64, 35)
        for dx, dy, misalignments in (
            (0, 3, (1, 2, 3, 1, 2, 3, 1, 2, 3)),
            (5, 0, (3, 1, 1, 2, 3, 1, 3, 1, 2)),
            (29, 17, (2, 3, 2, 3, 1, 2, 7, 3, 1)),
        )
    ]
    run_and_check(int8_kernel_runner, calls)


def test_rows_in_many_blocks(int8_kernel_runner: KernelRunner) -> None:
    run_and_check(int8_kernel_runner, [QuantizedFeedForward(rows, 33, 64, 2) for rows in (56, 57, 113, 401)])
    run_and_check(int8_kernel_runner, [QuantizedFeedForward(2, 512, 1536, 4), QuantizedFeedForward(49, 160, 640, 2)])


def test_rows_far_from_zero(int8_kernel_runner: KernelRunner) -> None:
    run_and_check(int8_kernel_runner, [QuantizedFeedForward(9, 70, 40, mean=50.0)])


def test_a_row_is_the_same_bits_in_whatever_block(int8_kernel_runner: KernelRunner) -> None:
    call, some = QuantizedFeedForward(120, 40, 500, 5), QuantizedFeedForward(3, 40, 500, 5)
    x, *weights = call.arrays()
    (whole,), (part,) = int8_kernel_runner([call.case([x, *weights]), some.case([x[50:53], *weights])])
    np.testing.assert_array_equal(part, whole.reshape(120, 40)[50:53].reshape(-1))


def test_no_rows(int8_kernel_runner: KernelRunner) -> None:
    run_and_check(int8_kernel_runner, [QuantizedFeedForward(0, 5, 8)])


def test_a_hidden_layer_of_zeros_gives_the_bias(int8_kernel_runner: KernelRunner) -> None:
    call = QuantizedFeedForward(5, 20, 24, 2, "Relu")
    x, *weights = call.arrays()
    weights[4] = np.full_like(weights[4], -1e6)  # bias1: nothing is left after ReLU
    ((output,),) = int8_kernel_runner([call.case([x, *weights])])
    np.testing.assert_allclose(output.reshape(5, 20), x + weights[7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_row(int8_kernel_runner: KernelRunner, activation: str, number: float) -> None:
    call = QuantizedFeedForward(31, 33, 36, 3, activation)
    x, *weights = call.arrays()
    x[17, 20] = number
    ((output,),) = int8_kernel_runner([call.case([x, *weights])])
    finite = np.isfinite(output.reshape(31, 33))
    assert not finite[17].any()
    assert np.delete(finite, 17, axis=0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "channels", "hidden", "groups"),
    [(197, 192, 768, 2), (197, 384, 1536, 3), (3136, 96, 384, 1), (784, 192, 768, 2), (49, 768, 3072, 6)],
)
def test_sizes_of_models(int8_kernel_runner: KernelRunner, rows: int, channels: int, hidden: int, groups: int) -> None:
    run_and_check(int8_kernel_runner, [QuantizedFeedForward(rows, channels, hidden, groups)])


def named(call: QuantizedFeedForward, arrays: Sequence[Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """What is fed, and the constants."""
    x, *weights = arrays
    names = [i.name for i in FORMS[call.form].inputs]
    return {"x": x}, dict(zip(names[1:], weights, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_operator_gives_the_same_bits_on_any_number_of_threads(run_form: Callable, activation: str) -> None:
    call = QuantizedFeedForward(134, 48, 96, 3, activation)
    given = call.arrays()
    feeds, constants = named(call, given)
    feeds["x"] = feeds["x"].reshape(2, 67, 48)
    attributes = {"epsilon": EPSILON, "groups": call.groups}
    outputs = [
        run_form(call.form, feeds, threads=threads, attributes=attributes, constants=constants)[0]
        for threads in (1, 2, 3, 8)
    ]
    assert outputs[0].shape == feeds["x"].shape
    call.check(outputs[0].reshape(-1), given)
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])


def test_the_operator_takes_an_empty_batch(run_form: Callable) -> None:
    call = QuantizedFeedForward(1, 24, 32)
    feeds, constants = named(call, call.arrays())
    feeds["x"] = feeds["x"].reshape(1, 1, 24)[:0]
    (output,) = run_form(call.form, feeds, attributes={"epsilon": EPSILON, "groups": 1}, constants=constants)
    assert output.shape == (0, 1, 24)


@pytest.mark.parametrize(
    ("change", "groups", "message"),
    [
        ({"weight2": lambda v: v[:-1]}, 1, r"weight2 has shape \[31,24\]; expected \[32,24\]"),
        (
            {"weight1_scale": lambda v: v[:-1]},
            2,
            r"weight1_scale .*shape \[31\]; expected .* of shape \[32\]",
        ),
        ({"norm_bias": lambda v: v[:-1]}, 2, r"norm_bias .*shape \[23\]; expected float32 \(1\) of shape \[24\]"),
        ({}, 3, "groups is 3; expected a divisor of 32"),
        ({}, 0, "groups is 0; expected a divisor of 32"),
    ],
)
def test_constants_that_do_not_fit_are_refused_at_load(
    run_form: Callable, change: dict[str, Callable], groups: int, message: str
) -> None:
    call = QuantizedFeedForward(3, 24, 32)
    feeds, constants = named(call, call.arrays())
    for name, changed in change.items():
        constants[name] = changed(constants[name])
    with pytest.raises(Exception, match=f"(?s){call.form} node 'block/node'.*{message}"):
        run_form(call.form, feeds, attributes={"epsilon": EPSILON, "groups": groups}, constants=constants)


def test_another_number_of_channels_is_an_error_of_the_call(run_form: Callable) -> None:
    call = QuantizedFeedForward(3, 24, 32)
    feeds, constants = named(call, call.arrays())
    with pytest.raises(Exception, match=r"node 'block/node': x has shape \[3,23\]; expected \[...,24\]"):
        run_form(
            call.form, {"x": feeds["x"][:, :-1]}, attributes={"epsilon": EPSILON, "groups": 1}, constants=constants
        )
