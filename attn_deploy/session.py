"""What every runtime's session looks like, and the check of what is fed to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from attn_deploy.errors import FeedError
from attn_deploy.target import nearest

Array = np.ndarray[Any, Any]


class TensorSpec(msgspec.Struct, frozen=True):
    """Name, dtype (NumPy's name) and shape of one input or output; a named dimension is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def describe(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(str(d) for d in self.shape)}]"


BATCH = "batch"
SEQUENCE = "sequence"
"""The dimensions that can be dynamic, by their names in ONNX: the first one of every input, and the second one of
those that hold a sequence of tokens."""


class DimBounds(msgspec.Struct, frozen=True):
    """Inclusive bounds of a dynamic dimension; `max` None means unbounded."""

    min: int = 1
    max: int | None = None

    def within(self, size: int) -> int:
        """The size inside the bounds that is nearest to the given one."""
        return max(self.min, size if self.max is None else min(size, self.max))

    def describe(self) -> str:
        return f"{self.min} to {'any' if self.max is None else self.max}"


class Session(Protocol):
    """An opened model. `run` is safe to call from many threads at once. Those on a GPU have `run_device` as well, as
    DeviceSession says."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...

    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]: ...

    def close(self) -> None: ...


@runtime_checkable
class DeviceSession(Protocol):
    """A session on a GPU, whose inputs and outputs may stay there."""

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, Any]:
        """Feeds (tensors in GPU memory, NumPy arrays, or both) -> outputs in GPU memory, which speak DLPack.

        With `stream`, a handle or a stream of torch, cuda.core or CuPy, the work is put in its order and the call
        returns at once; without, it returns when the outputs are there.
        """


_CUDA_DEVICES = frozenset({2, 13})
"""kDLCUDA and kDLCUDAManaged of dlpack.h."""


def on_gpu(value: Any) -> bool:
    """True for a tensor in the memory of an NVIDIA GPU, of whatever library."""
    if isinstance(value, np.ndarray):
        return False
    if hasattr(value, "__dlpack_device__"):
        return int(value.__dlpack_device__()[0]) in _CUDA_DEVICES
    return hasattr(value, "__cuda_array_interface__")


class _Foreign:
    """What the checks ask of a tensor in GPU memory: `torch.float32` and `float32` are one dtype."""

    def __init__(self, name: str, value: Any) -> None:
        try:
            self.dtype = np.dtype(str(value.dtype).rpartition(".")[2])
        except TypeError as error:
            raise FeedError(
                f"input {name!r} has a dtype that NumPy lacks", got=value.dtype, next_step="pass tensor.float()"
            ) from error
        self.shape = tuple(int(size) for size in value.shape)
        self.ndim = len(self.shape)


def as_array(name: str, value: Any) -> Array:
    """`value` as a NumPy array, without a copy for NumPy arrays and CPU tensors that speak DLPack.

    Raises FeedError for a tensor on another device or one that requires grad (say how to give it), and for nested
    lists that are no array.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ndarray):  # a memory map: not every NumPy gives a read-only one through DLPack
        return np.asarray(value)
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise FeedError(
                f"input {name!r} cannot be read through DLPack",
                got=f"{type(value).__name__}: {error}",
                expected="a dense tensor in CPU memory, without grad, of a dtype that NumPy has",
                next_step="pass tensor.detach().cpu(), with .float() behind it for bfloat16; a session on a GPU takes "
                "it as it is with run_device",
            ) from error
    try:
        return np.asarray(value)
    except ValueError as error:
        raise FeedError(
            f"input {name!r} is no array",
            got=f"{type(value).__name__}: {error}",
            expected="a NumPy array, or a CPU tensor that speaks DLPack",
            next_step="give every row the same length, or pad it",
        ) from error


class FeedChecker:
    """Checks feeds against the specs of a graph; what can be known beforehand is computed once.

    A call costs a few microseconds: bench/session_overhead.py measures it.
    """

    def __init__(self, specs: Sequence[TensorSpec], dims: Mapping[str, DimBounds]) -> None:
        self._specs = tuple(specs)
        self._names = frozenset(s.name for s in specs)
        self._dtypes = {s.name: np.dtype(s.dtype) for s in specs}
        self._dims = dict(dims)

    def check(self, feeds: Mapping[str, Any], *, device: bool = False) -> dict[str, Any]:
        """Feeds as arrays; with `device`, tensors in GPU memory as they are.

        Raises FeedError: names, dtype, rank, size of a dimension, bound of a dynamic one.
        """
        try:
            known = feeds.keys() == self._names
        except AttributeError:
            raise FeedError(
                "the feed is not a mapping of inputs by name",
                got=type(feeds).__name__,
                expected="; ".join(s.describe() for s in self._specs),
                next_step=f"pass {{{self._specs[0].name!r}: array}}",
            ) from None
        if not known:
            self._raise_names(feeds)
        arrays: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for spec in self._specs:
            value = feeds[spec.name]
            stays = device and on_gpu(value)
            array: Any = _Foreign(spec.name, value) if stays else as_array(spec.name, value)
            if array.dtype != self._dtypes[spec.name]:
                raise FeedError(
                    f"input {spec.name!r} has the wrong dtype",
                    got=array.dtype,
                    expected=spec.dtype,
                    next_step=f"convert it with .astype({spec.dtype!r})",
                )
            if array.ndim != len(spec.shape):
                self._raise_shape(spec, array)
            for expected, size in zip(spec.shape, array.shape, strict=True):
                if type(expected) is int:
                    if size != expected:
                        self._raise_shape(spec, array)
                elif sizes.setdefault(str(expected), size) != size:
                    raise FeedError(
                        f"dimension {expected!r} differs between inputs",
                        got=f"{size} in {spec.name!r}",
                        expected=f"{sizes[str(expected)]}, as in the inputs before it",
                        next_step=f"feed every input with the same {expected}",
                    )
            arrays[spec.name] = value if stays else array
        for dim, size in sizes.items():
            bounds = self._dims.get(dim)
            if bounds is not None and (size < bounds.min or (bounds.max is not None and size > bounds.max)):
                self._raise_bounds(dim, size, bounds)
        return arrays

    def _raise_names(self, feeds: Mapping[str, Any]) -> None:
        missing = sorted(self._names - feeds.keys())
        unknown = sorted(str(k) for k in feeds.keys() - self._names)
        hint = nearest(unknown[0], self._names) if unknown else None
        raise FeedError(
            "the feed's names are not the model's inputs",
            got=", ".join(sorted(str(k) for k in feeds)) or "an empty feed",
            expected="; ".join(s.describe() for s in self._specs),
            next_step=hint or f"add {', '.join(missing)}",
        )

    def _raise_bounds(self, dim: str, size: int, bounds: DimBounds) -> None:
        if size < bounds.min:
            change, low, high = "pad", max(size, 1), bounds.max
        else:
            change, low, high = "split" if dim == BATCH else "shorten", bounds.min, size
        again = f"--dynamic {dim}={low}:{'' if high is None else high}"
        raise FeedError(
            f"dimension {dim!r} is out of the bundle's bounds",
            got=size,
            expected=bounds.describe(),
            next_step=f"{change} the {dim}, or export again with {again}",
        )

    def _raise_shape(self, spec: TensorSpec, array: Array) -> None:
        advice = "resize or pad it, or export again with --input for this shape"
        if array.ndim == len(spec.shape) - 1 and isinstance(spec.shape[0], str):
            advice = f"if {spec.shape[0]} is what is missing: array[None]"
        raise FeedError(
            f"input {spec.name!r} has the wrong shape",
            got=list(array.shape),
            expected=spec.describe(),
            next_step=advice,
        )
