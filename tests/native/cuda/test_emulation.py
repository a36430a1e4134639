"""That the emulated GPU rounds as a real one does, and that kernels stay within their memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

EMULATION = Path(__file__).parent / "emulation"


def converted(emulated: Path, function: str, values: np.ndarray, dtype: type) -> np.ndarray:
    made = np.empty(values.shape, dtype)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (values, made)]
    getattr(ctypes.CDLL(str(emulated)), function)(*pointers, ctypes.c_int64(values.size))
    return made


def test_every_half_has_its_value(emulated: Path) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    np.testing.assert_array_equal(
        converted(emulated, "emulation_half_values", bits, np.float32), bits.view(np.float16).astype(np.float32)
    )


def test_floats_round_to_the_nearest_half_and_bfloat16(
    emulated: Path, round_to: Callable[[np.ndarray, str], np.ndarray]
) -> None:
    """Around every half, ties between two among them, and any bits."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    ties = (halves[1:] + halves[:-1]) / 2
    near = np.concatenate([ties, ties * (1 + 1e-6), ties * (1 - 1e-6), halves, [65519.99, 65520.0, 1e30]])
    any_bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate([near.astype(np.float32), -near.astype(np.float32), any_bits[np.isfinite(any_bits)]])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(
        converted(emulated, "emulation_round_to_half", values, np.uint16), expected.view(np.uint16)
    )
    bits = converted(emulated, "emulation_round_to_bfloat16", values, np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(bits.view(np.float32), round_to(values, "bfloat16"))


@pytest.fixture(scope="module")
def check_bounds(build_emulated: Callable[..., Path]) -> Path:
    # Without optimization, which costs more time here than it saves.
    options = ("-O0", "-g1", "-fsanitize=address")
    return build_emulated("check_bounds", *options, extra=[EMULATION / "check_bounds.cc"], program=True)


def run_bounds(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_kernels_stay_within_global_and_shared_memory(check_bounds: Path) -> None:
    done = run_bounds(check_bounds)
    assert (done.returncode, done.stdout) == (0, "in bounds\n"), done.stderr[-4000:]


def test_one_element_outside_would_be_seen(check_bounds: Path) -> None:
    done = run_bounds(check_bounds, "outside")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
