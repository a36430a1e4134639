"""Runs kernels of the native library on arrays, without ONNX Runtime: on every instruction set, under sanitizers, and
for other processors under an emulator.

A file of cases holds, one after another: the kernel's name, int64 numbers, float64 numbers, arrays. A list is its
uint32 length and its elements. An array is its uint32 ONNX type, the uint32 number of elements by which it is
misaligned, its list of int64 dims and its data. Results are, for each case, the uint32 number of arrays and these:
type, rank, dims, data. All little-endian.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_TYPES = {
    np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3, np.dtype(np.int32): 6,
    np.dtype(np.int64): 7, np.dtype(np.bool_): 9,
}  # fmt: skip
_DTYPES = {number: dtype for dtype, number in _TYPES.items()}

NOT_HERE = 3
"""Exit status of the runner on a CPU without the instruction set."""


@dataclass(frozen=True)
class Case:
    """`misalignments`: for each input, by how many elements it is off a 16-byte boundary; zeros when empty."""

    kernel: str
    inputs: Sequence[np.ndarray]
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()
    misalignments: Sequence[int] = ()


@dataclass(frozen=True)
class KernelRunner:
    """`command` starts the runner: its path, with an emulator before it where it needs one."""

    command: tuple[str, ...]
    isa: str

    def __call__(self, cases: Sequence[Case]) -> list[list[np.ndarray]]:
        """The outputs of each case. All run in one process."""
        with tempfile.TemporaryDirectory() as folder:
            given, results = Path(folder, "cases"), Path(folder, "results")
            given.write_bytes(b"".join(map(_case_bytes, cases)))
            done = subprocess.run(
                [*self.command, self.isa, str(given), str(results)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
            data = results.read_bytes()
        outputs, at = [], 0
        for _ in cases:
            arrays, at = _read_arrays(data, at)
            outputs.append(arrays)
        assert at == len(data)
        return outputs

    def available(self) -> bool:
        """Whether this CPU has the instruction set."""
        return subprocess.run([*self.command, self.isa, "/dev/null", "/dev/null"], check=False).returncode != NOT_HERE


def _case_bytes(case: Case) -> bytes:
    name = case.kernel.encode()
    parts = [
        struct.pack("<I", len(name)), name,
        struct.pack(f"<I{len(case.ints)}q", len(case.ints), *case.ints),
        struct.pack(f"<I{len(case.floats)}d", len(case.floats), *case.floats),
        struct.pack("<I", len(case.inputs)),
    ]  # fmt: skip
    misalignments = case.misalignments or [0] * len(case.inputs)
    for array, misalignment in zip(case.inputs, misalignments, strict=True):
        head = struct.pack("<III", _TYPES[array.dtype], misalignment, array.ndim)
        parts += [head, struct.pack(f"<{array.ndim}q", *array.shape), np.ascontiguousarray(array).tobytes()]
    return b"".join(parts)


def _read_arrays(data: bytes, at: int) -> tuple[list[np.ndarray], int]:
    (count,) = struct.unpack_from("<I", data, at)
    at += 4
    arrays = []
    for _ in range(count):
        number, rank = struct.unpack_from("<II", data, at)
        at += 8
        shape = struct.unpack_from(f"<{rank}q", data, at)
        at += 8 * rank
        dtype = _DTYPES[number]
        size = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(data, dtype, size, at).reshape(shape))
        at += size * dtype.itemsize
    return arrays, at
