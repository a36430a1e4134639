"""Arrays in GPU memory that every library takes and gives without a copy, and the streams that order their use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attn_deploy.errors import FeedError
from attn_deploy.runtimes.cuda_errors import queue
from attn_deploy.session import Array

LEGACY_STREAM, PER_THREAD_STREAM = 1, 2
"""The default streams' handles (CU_STREAM_LEGACY and CU_STREAM_PER_THREAD); a null handle means the first."""
_DLPACK_CUDA = frozenset({2, 13})
"""kDLCUDA and kDLCUDAManaged of dlpack.h."""
_DLPACK_NO_ORDER = -1


class DeviceArray:
    """A dense, C-contiguous array in GPU memory.

    `torch.from_dlpack(array)`, `cupy.from_dlpack(array)` and everything that reads `__cuda_array_interface__` take it
    without a copy; both tell the reader's stream when the data is there. It keeps its memory alive.
    """

    def __init__(
        self, buffer: Any, shape: tuple[int, ...], dtype: Any, *, device_id: int, stream: int, ready: Any = None
    ) -> None:
        """`buffer` is a cuda.core Buffer, `stream` the handle that the data is made on, `ready` its Event, if any."""
        self._buffer = buffer
        self.ready = ready
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.pointer = int(buffer.handle) if self.nbytes else 0
        self.device_id = device_id
        self.stream = stream

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "stream": self.stream or LEGACY_STREAM,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.device_id)

    def __dlpack__(self, *, stream: Any = None, **request: Any) -> Any:
        """`stream` as the array API standard says: None is the legacy default stream, -1 asks for no order.

        The memory is given back in the order of that stream, since there it is read last.
        """
        from cuda.core.utils import StridedMemoryView

        if stream != _DLPACK_NO_ORDER:
            reader = as_stream(LEGACY_STREAM if stream is None else stream)
            self.wait_on(reader)
            self.release_on(reader)
        return StridedMemoryView.from_buffer(self._buffer, self.shape, dtype=self.dtype).__dlpack__(**request)

    def wait_on(self, stream: Any) -> None:
        """Makes the stream wait until the data is there."""
        if self.ready is not None:
            as_stream(stream).wait(self.ready)

    def release_on(self, stream: Any) -> None:
        """Gives the memory back in the order of this stream, which must outlive the array."""
        if self._buffer.memory_resource is not None:
            self._buffer.set_deallocation_stream(as_stream(stream))

    def numpy(self) -> Array:
        """A copy in host memory, taken when the data is there."""
        from cuda.bindings import driver
        from cuda.core import Device

        Device(self.device_id).set_current()
        if self.ready is not None:
            self.ready.sync()
        else:
            as_stream(self.stream).sync()
        result = np.empty(self.shape, self.dtype)
        if self.nbytes:
            arguments = (result.ctypes.data, self.pointer, self.nbytes)
            queue(lambda: f"a copy of {self!r} to the host", driver.cuMemcpyDtoH, *arguments)
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("an array in GPU memory cannot be read by NumPy without a copy")
        return self.numpy().astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}{list(self.shape)}, cuda:{self.device_id})"


def is_device_tensor(value: Any) -> bool:
    """Whether the value is a tensor in GPU memory: a DeviceArray, or of any library with DLPack or CUDA's interface."""
    if isinstance(value, DeviceArray):
        return True
    if isinstance(value, np.ndarray):
        return False
    device = getattr(value, "__dlpack_device__", None)
    if device is not None:
        return int(device()[0]) in _DLPACK_CUDA
    return hasattr(value, "__cuda_array_interface__")


def as_device_array(name: str, value: Any, stream: int, *, device_id: int = 0) -> DeviceArray:
    """A tensor in GPU memory as a DeviceArray, without a copy; `stream` (a handle) waits for what makes it.

    Takes a DeviceArray, or a tensor that speaks DLPack or `__cuda_array_interface__`. Raises FeedError: another
    device, a dtype that NumPy does not have, strides that are not C-contiguous.
    """
    if isinstance(value, DeviceArray):
        _check_device(name, value.device_id, device_id)
        value.wait_on(stream)
        return value
    from cuda.core import Buffer
    from cuda.core.utils import StridedMemoryView

    try:
        view = StridedMemoryView.from_any_interface(value, stream_ptr=stream or LEGACY_STREAM)
        dtype = np.dtype(view.dtype)
    except (BufferError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise FeedError(
            f"input {name!r} cannot be read in GPU memory",
            got=f"{type(value).__name__}: {error}",
            expected="a dense CUDA tensor without grad, of a dtype that NumPy has",
            next_step="pass tensor.detach(), with .float() behind it for bfloat16",
        ) from error
    _check_device(name, view.device_id, device_id)
    shape = tuple(int(size) for size in view.shape)
    if view.strides is not None and not _is_contiguous(shape, view.strides):
        raise FeedError(
            f"input {name!r} is not contiguous",
            got=f"shape {list(shape)} with strides {list(view.strides)} (in elements)",
            expected="C-contiguous memory: the runtime reads it in place",
            next_step="pass tensor.contiguous()",
        )
    buffer = Buffer.from_handle(view.ptr, math.prod(shape) * dtype.itemsize, owner=view)
    return DeviceArray(buffer, shape, dtype, device_id=device_id, stream=stream)


def _check_device(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise FeedError(
            f"input {name!r} is on another GPU than the session",
            got=f"cuda:{got}",
            expected=f"cuda:{expected}",
            next_step=f"pass tensor.to('cuda:{expected}')",
        )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """A dimension of size one may have any stride, and an array without elements all of them."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return math.prod(shape) == 0
        expected *= size
    return True


def stream_handle(stream: Any) -> int:
    """The handle of a caller's stream: an int, a torch stream, or what speaks `__cuda_stream__` (cuda.core, CuPy)."""
    if isinstance(stream, int):
        return stream
    for attribute in ("cuda_stream", "ptr"):  # of torch; of CuPy before 14
        handle = getattr(stream, attribute, None)
        if isinstance(handle, int):
            return handle
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    raise FeedError(
        "the stream is of an unknown kind",
        got=type(stream).__name__,
        expected="a handle (int), a torch.cuda.Stream, or an object with __cuda_stream__",
        next_step="pass its handle: stream.cuda_stream in torch, stream.ptr in CuPy",
    )


def as_stream(stream: Any) -> Any:
    """A cuda.core Stream of a caller's stream, which must outlive it."""
    from cuda.core import LEGACY_DEFAULT_STREAM, PER_THREAD_DEFAULT_STREAM, Stream

    if isinstance(stream, Stream):
        return stream
    handle = stream_handle(stream)
    if handle in (0, LEGACY_STREAM):
        return LEGACY_DEFAULT_STREAM
    return PER_THREAD_DEFAULT_STREAM if handle == PER_THREAD_STREAM else Stream.from_handle(handle)
