"""Run by tests/runtimes/test_upon_stand_ins.py in a process whose CUDA libraries are stand-ins: copies are real, and
kernels do not run. The files are named so that pytest does not collect them by itself."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator

import pytest

GIGABYTE = 2**30
OUT_OF_MEMORY = 2


class StandIn:
    """Controls of the made GPU."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._library.stand_in_trace_size.restype = ctypes.c_size_t
        self._library.stand_in_memory_limit.argtypes = [ctypes.c_size_t]

    def trace(self) -> list[tuple[str, int, int]]:
        """(function, first, second) of every call since the last question."""
        size = self._library.stand_in_trace_size()
        text = ctypes.create_string_buffer(size + 1)
        self._library.stand_in_trace(text, ctypes.c_size_t(size))
        self._library.stand_in_reset()
        rows = [line.split() for line in text.value.decode().splitlines()]
        return [(name, int(first), int(second)) for name, first, second in rows]

    def calls(self) -> list[str]:
        return [name for name, _, _ in self.trace()]

    def fail(self, function: str, *, skip: int = 0, code: int = OUT_OF_MEMORY) -> None:
        """One call of the function will return the code."""
        self._library.stand_in_fail(function.encode(), skip, code)

    def limit_memory(self, size: int) -> None:
        self._library.stand_in_memory_limit(size)

    def allocations(self) -> int:
        gc.collect()
        return int(self._library.stand_in_device_arrays())


@pytest.fixture
def gpu() -> Iterator[StandIn]:
    stand_in = StandIn()
    stand_in.trace()
    yield stand_in
    stand_in.trace()
    stand_in.limit_memory(8 * GIGABYTE)
