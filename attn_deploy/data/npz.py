"""An .npz file whose keys are the model's inputs, each with the samples along its first dimension."""

from __future__ import annotations

import contextlib
import math
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from attn_deploy.data.sample import Sample, SampleChecker
from attn_deploy.errors import UsageError
from attn_deploy.session import Array, TensorSpec
from attn_deploy.target import nearest

LABELS = "labels"
Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)


class NpzFile:
    """Samples are keyed by their index. Members are read row by row, so a file larger than memory streams too;
    only one written in Fortran order is loaded whole. Nothing is ever unpickled."""

    def __init__(self, path: Path, *, inputs: Sequence[TensorSpec], labels: Sequence[str] | None) -> None:
        self._path = path
        self._checker = SampleChecker(inputs, labels)
        headers = self._headers()
        names = {spec.name for spec in inputs}
        self._feeds = tuple(spec.name for spec in inputs)
        self.labelled = LABELS in headers and LABELS not in names
        self._check_names(headers.keys() - ({LABELS} if self.labelled else set()), inputs)
        self._members = (*self._feeds, LABELS) if self.labelled else self._feeds
        self._length = self._common_length({name: headers[name] for name in self._members})
        self.description = f"{self._length} samples in {path}"

    def keys(self) -> list[str]:
        return [str(index) for index in range(self._length)]

    def samples(self, wanted: Collection[str]) -> Iterator[Sample]:
        """The wanted samples in the order of the file, since a compressed member can only be read forward."""
        remaining = len(wanted)
        with contextlib.ExitStack() as stack:
            rows = self._open_rows(stack)
            for index in range(self._length):
                if remaining == 0:
                    return
                row = self._next_rows(rows)
                key = str(index)
                if key in wanted:
                    remaining -= 1
                    label = row.pop(LABELS) if self.labelled else None
                    yield self._checker.check(key, row, label, str(self._path))

    def _open_rows(self, stack: contextlib.ExitStack) -> dict[str, Iterator[Array]]:
        try:
            archive = stack.enter_context(zipfile.ZipFile(self._path))
            return {name: _rows(stack.enter_context(archive.open(f"{name}.npy"))) for name in self._members}
        except DAMAGE as error:
            self._raise_damaged(error)

    def _next_rows(self, rows: dict[str, Iterator[Array]]) -> dict[str, Array]:
        try:
            return {name: next(values) for name, values in rows.items()}
        except DAMAGE as error:
            self._raise_damaged(error)

    def _headers(self) -> dict[str, Header]:
        """Shape and dtype of every member, without reading the arrays."""
        headers = {}
        try:
            with zipfile.ZipFile(self._path) as archive:
                for member in archive.namelist():
                    with archive.open(member) as stream:
                        headers[member.removesuffix(".npy")] = _read_header(stream)
        except DAMAGE as error:
            self._raise_damaged(error)
        return headers

    def _check_names(self, names: set[str], inputs: Sequence[TensorSpec]) -> None:
        missing = sorted(set(self._feeds) - names)
        unknown = sorted(names - set(self._feeds))
        if missing or unknown:
            rename = f"rename {unknown[0]!r}: {nearest(unknown[0], self._feeds)}" if unknown else None
            raise UsageError(
                "the keys of the .npz are not the model's inputs",
                where=str(self._path),
                got=", ".join(sorted(names)) or "no keys",
                expected="; ".join(spec.describe() for spec in inputs) + f"; optionally {LABELS}",
                next_step=rename or f"add {', '.join(missing)}",
            )

    def _common_length(self, headers: dict[str, Header]) -> int:
        """Number of samples. Raises UsageError for what the headers already show to be wrong."""
        for name, (shape, _, dtype) in headers.items():
            if not shape or dtype.hasobject:
                raise UsageError(
                    f"key {name!r} of the .npz has no samples along its first dimension",
                    where=str(self._path),
                    got=f"{dtype}{list(shape)}" + (", which would need unpickling" if dtype.hasobject else ""),
                    expected="an array of numbers [samples, ...]",
                )
        lengths = {name: shape[0] for name, (shape, _, _) in headers.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(
                "the keys of the .npz hold different numbers of samples",
                where=str(self._path),
                got=", ".join(f"{name}: {length}" for name, length in lengths.items()),
                expected="the same length for all",
            )
        return next(iter(lengths.values()))

    def _raise_damaged(self, error: Exception) -> NoReturn:
        raise UsageError(
            "the .npz cannot be read",
            where=str(self._path),
            got=f"{type(error).__name__}: {error}",
            expected="a file written by numpy.savez or numpy.savez_compressed, without pickled objects",
        ) from error


def _read_header(stream: IO[bytes]) -> Header:
    """(shape, is in Fortran order, dtype); `stream` stands behind it."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"npy format {version}, which only arrays with named fields need")


def _rows(stream: IO[bytes]) -> Iterator[Array]:
    """The array in a .npy stream, one entry [...] of its first dimension [samples, ...] after the other."""
    shape, fortran_order, dtype = _read_header(stream)
    if fortran_order and len(shape) > 1:
        # Rows are not contiguous; members of this kind come out of transposed arrays and are rare.
        whole = np.frombuffer(_read_exactly(stream, math.prod(shape) * dtype.itemsize), dtype)
        yield from whole.reshape(shape, order="F")
        return
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    for _ in range(shape[0]):
        yield np.frombuffer(_read_exactly(stream, row_bytes), dtype).reshape(shape[1:])


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) != count:
        raise EOFError(f"{count} bytes expected, {len(content)} left")
    return content
