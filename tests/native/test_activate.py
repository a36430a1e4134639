"""The kernel Activate on every instruction set: each activation against float64 over a dense sweep."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kernel_runner import Case, KernelRunner
from scipy.special import erf

Array = np.ndarray


def _silu(v: Array) -> Array:
    """v / (1 + exp(-v)), written so that neither side of 0 overflows or cancels."""
    tail = np.exp(-np.abs(v))
    return v * np.where(v < 0, tail, 1.0) / (1.0 + tail)


REFERENCES: dict[str, Callable[[Array], Array]] = {
    "None": lambda v: v,
    "Relu": lambda v: np.maximum(v, 0.0),
    "Silu": _silu,
    "Gelu": lambda v: 0.5 * v * (1.0 + erf(v / np.sqrt(2.0))),
    "GeluTanh": lambda v: 0.5 * v * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (v + 0.044715 * v**3))),
    "Sigmoid": lambda v: 1.0 / (1.0 + np.exp(-v)),
    "Tanh": np.tanh,
    "HardSigmoid": lambda v: np.clip(v / 6.0 + 0.5, 0.0, 1.0),
    "Hardswish": lambda v: v * np.clip(v / 6.0 + 0.5, 0.0, 1.0),
}
"""In float64, by the enumerator's name without its k."""

EXACT = ("None", "Relu")
ULPS = 4.0
"""Units in the last place of the result, which every other activation keeps to, but for:"""

ABSOLUTE = {"Gelu": 3e-7, "GeluTanh": 3e-7, "Hardswish": 1e-7, "HardSigmoid": 1e-7}
"""Of the input, or of 1 where that is more: what cancels below 0, as in 1 + erf(x) and x / 6 + 1 / 2."""

TAIL = 1e-35
"""What is less may be 0: denormals are flushed, and so may be a factor on the way."""


def enumerators() -> list[str]:
    """The activations in the order of `enum class Activation`: a new one comes under test by being there."""
    text = (Path(__file__).parents[2] / "runtimes" / "native" / "activation.h").read_text()
    found = re.search(r"enum class Activation[^{]*\{([^}]*)\}", text)
    assert found is not None
    return [name.strip().removeprefix("k") for name in re.sub(r"//.*", "", found[1]).split(",") if name.strip()]


ACTIVATIONS = list(enumerate(enumerators()))


def sweep() -> Array:
    """Even steps over all that is not saturated, and every magnitude down to the smallest normal number."""
    small = np.logspace(-37, 0, 20_000)
    return np.concatenate([np.linspace(-80, 80, 400_001), small, -small, [0.0, 1e4, -1e4, 3e38, -3e38]]).astype("f4")


def activate(run: KernelRunner, activation: int, *arrays: Array, misalignment: int = 0) -> list[Array]:
    cases = [Case("activate", [x], ints=[activation], misalignments=[misalignment]) for x in arrays]
    return [outputs[0] for outputs in run(cases)]


@pytest.mark.parametrize(("number", "name"), ACTIVATIONS)
def test_every_activation_keeps_to_its_accuracy(kernel_runner: KernelRunner, number: int, name: str) -> None:
    x = sweep()
    (y,) = activate(kernel_runner, number, x)
    with np.errstate(over="ignore"):
        expected = REFERENCES[name](x.astype(np.float64))
    if name in EXACT:
        np.testing.assert_array_equal(y, expected.astype(np.float32))
        return
    allowed = ULPS * np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64) + TAIL
    allowed += ABSOLUTE.get(name, 0.0) * np.maximum(np.abs(x), 1.0)
    worst = np.argmax(np.abs(y - expected) / allowed)
    assert np.abs(y - expected)[worst] <= allowed[worst], f"x = {x[worst]!r}: {y[worst]!r}, not {expected[worst]!r}"


def test_the_tail_of_silu_keeps_its_accuracy_too(kernel_runner: KernelRunner) -> None:
    """v / (1 + exp(-v)): below -20 the divisor is exp(-v)."""
    x = np.linspace(-80, -20, 500_001).astype("f4")
    (y,) = activate(kernel_runner, enumerators().index("Silu"), x)
    exact = _silu(x.astype(np.float64))
    ulps = np.abs(y - exact) / np.spacing(np.abs(exact).astype("f4"))
    assert ulps.max() <= ULPS


@pytest.mark.parametrize(("number", "name"), ACTIVATIONS)
def test_every_length_and_misalignment_gives_the_same_numbers(
    kernel_runner: KernelRunner, number: int, name: str
) -> None:
    x = np.linspace(-7, 7, 131).astype("f4")
    (whole,) = activate(kernel_runner, number, x)
    lengths = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 131)
    for misalignment in range(4):
        parts = activate(kernel_runner, number, *(x[:length] for length in lengths), misalignment=misalignment)
        for part in parts:
            np.testing.assert_array_equal(part, whole[: part.size])


@pytest.mark.parametrize(("number", "name"), ACTIVATIONS)
def test_nan_comes_through_and_infinities_give_limits(kernel_runner: KernelRunner, number: int, name: str) -> None:
    x = np.tile(np.array([np.nan, np.inf, -np.inf, 1.0], np.float32), 9)  # in whole vectors and in what is left over
    (y,) = activate(kernel_runner, number, x)
    assert np.isnan(y[0::4]).all()
    assert not np.isnan(y[3::4]).any()
    with np.errstate(all="ignore"):
        limits = REFERENCES[name](np.array([1e4, -1e4]))
    for infinite, limit in zip((y[1::4], y[2::4]), limits, strict=True):
        limit = np.sign(limit) * np.inf if abs(limit) == 1e4 else limit
        np.testing.assert_allclose(infinite, np.full(9, limit, "f4"), rtol=1e-6, atol=1e-20)
