"""One NVIDIA GPU: whether it can be used, and a session's stream with its memory, copies and events.

Everything stands on NVIDIA's `cuda-core` and `cuda-bindings`, imported when first used. A session owns one
`DeviceStream`; what it hands out are `DeviceArray`s.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from attn_deploy.errors import UnavailableError
from attn_deploy.runtimes.cuda_array import (
    DeviceArray,
    as_device_array,
    as_stream,
    is_device_tensor,
    stream_handle,
)
from attn_deploy.runtimes.cuda_errors import DeviceMemoryError, device_error, is_out_of_memory, queue
from attn_deploy.session import Array

__all__ = [
    "CUDA_MAJOR", "DRIVER", "DeviceArray", "DeviceMemoryError", "DeviceStream", "as_device_array", "as_stream",
    "availability", "device_error", "is_device_tensor", "is_out_of_memory", "stream_handle",
]  # fmt: skip

CUDA_MAJOR = 13
DRIVER = {12: "525", 13: "580"}
"""The first Linux driver for each CUDA version, by NVIDIA's CUDA compatibility guide."""
INSTALL = "pip install 'cuda-core[cu13]'"


def availability(cuda_major: int = CUDA_MAJOR) -> str | None:
    """None when a GPU can be used here, else the reason and what to do.

    `cuda_major` is the CUDA version that the runtime was built for; the driver must support it.
    """
    try:
        import cuda.core  # noqa: F401
        from cuda.bindings import driver
    except ImportError as error:
        return f"cuda-core is not installed ({error}): {INSTALL}"
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # the binding's own classes differ from version to version
        first = str(error).splitlines()[0]
        return f"no NVIDIA driver ({first}): {_update(cuda_major)}; in a container: docker run --gpus all"
    if status:
        return _reason(status, cuda_major)
    _, version = driver.cuDriverGetVersion()
    if version < cuda_major * 1000:
        supported = f"{version // 1000}.{version % 1000 // 10}"
        return f"the driver supports CUDA {supported}, and CUDA {cuda_major} is needed: {_update(cuda_major)}"
    _, count = driver.cuDeviceGetCount()
    if count == 0:
        return "the driver shows no GPU: look at `nvidia-smi`, and at CUDA_VISIBLE_DEVICES"
    return None


def _reason(status: Any, cuda_major: int) -> str:
    """Why cuInit failed, in words a user can act on."""
    from cuda.bindings.driver import CUresult

    known = {
        CUresult.CUDA_ERROR_NO_DEVICE: "the driver finds no GPU: look at `nvidia-smi`, and at CUDA_VISIBLE_DEVICES; "
        "in a container: docker run --gpus all",
        CUresult.CUDA_ERROR_STUB_LIBRARY: "libcuda.so.1 is the toolkit's empty stub: remove its folder from "
        "LD_LIBRARY_PATH",
        CUresult.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: "the driver in the kernel and libcuda.so.1 are of two versions: "
        f"reboot, or {_update(cuda_major)}",
        CUresult.CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE: "CUDA's forward compatibility package does not support "
        f"this GPU: {_update(cuda_major)}",
    }
    return known.get(status, f"cuInit failed with {status.name}: look at `nvidia-smi`")


def _update(cuda_major: int) -> str:
    version = DRIVER.get(cuda_major, DRIVER[CUDA_MAJOR])
    return f"install NVIDIA driver {version} or newer (Debian, Ubuntu: apt install nvidia-driver-{version}) and reboot"


class DeviceStream:
    """One session's stream with the memory that is used on it. Not for several threads at once.

    Host arrays go through pinned memory that is kept, so that a copy needs no second one inside the driver.
    """

    def __init__(self, device_id: int = 0, *, cuda_major: int = CUDA_MAJOR) -> None:
        """Raises UnavailableError without a GPU, or without one of this number."""
        reason = availability(cuda_major)
        if reason is not None:
            raise UnavailableError("no GPU can be used here", got=reason, next_step="attn-deploy doctor")
        from cuda.bindings import driver
        from cuda.core import Device

        _, count = driver.cuDeviceGetCount()
        if not 0 <= device_id < count:
            raise UnavailableError("there is no such GPU", got=f"cuda:{device_id}", expected=f"0 to {count - 1}")
        self.device_id = device_id
        self._driver = driver
        with _device_errors(f"GPU {device_id} cannot be opened"):
            self._device = Device(device_id)
            self._device.set_current()
            self._stream = self._device.create_stream()
        self.handle = int(self._stream.handle)
        self._staging: dict[str, _Pinned] = {}

    def make_current(self) -> None:
        """Binds the calling thread to the GPU; the first thing a call does, since any thread may make it."""
        self._device.set_current()

    def wait_for(self, caller: Any) -> None:
        """Our work from now on comes after what the caller's stream holds now."""
        self._stream.wait(as_stream(caller))

    def make_wait(self, caller: Any) -> None:
        """The caller's work from now on comes after what our stream holds now."""
        as_stream(caller).wait(self._stream)

    def synchronize(self) -> None:
        """Waits until our work is done. Raises AttnDeployError for an error of a kernel before it."""
        queue(lambda: "work on the GPU", self._driver.cuStreamSynchronize, self.handle)

    def record(self, *, timing: bool = False) -> Any:
        """An event at this point; of two with timing, `end - begin` is milliseconds once `end.sync()` has returned."""
        return self._stream.record(options={"timing_enabled": True}) if timing else self._stream.record()

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Uninitialized memory of the driver's pool, in the order of our stream. Raises DeviceMemoryError."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        try:
            buffer = self._device.allocate(max(size, 1), stream=self._stream)
        except Exception as error:  # cuda.core's class for errors of the driver is not public
            raise device_error(f"{size / 2**20:.1f} MB for {dtype}{list(shape)}", error) from error
        return DeviceArray(buffer, shape, dtype, device_id=self.device_id, stream=self.handle)

    def borrow(self, pointer: int, shape: tuple[int, ...], dtype: Any, *, owner: Any) -> DeviceArray:
        """Memory that a runtime made on our stream, and that `owner` keeps."""
        from cuda.core import Buffer

        buffer = Buffer.from_handle(pointer, math.prod(shape) * np.dtype(dtype).itemsize, owner=owner)
        return DeviceArray(buffer, shape, dtype, device_id=self.device_id, stream=self.handle)

    def upload(self, name: str, source: Array, into: DeviceArray) -> None:
        """Host -> GPU, queued; `source` may be changed as soon as the call returns. `name` names the staging memory."""
        if not into.nbytes:
            return
        pinned = self._pinned(f"in {name}", into.nbytes)
        np.copyto(pinned.view(into.shape, into.dtype), source)
        arguments = (into.pointer, pinned.pointer, into.nbytes, self.handle)
        queue(lambda: f"a copy to {into!r}", self._driver.cuMemcpyHtoDAsync, *arguments)
        pinned.busy_until(self.record())

    def download(self, source: dict[str, DeviceArray]) -> dict[str, Array]:
        """GPU -> host, all of them with one wait at the end; the results are the caller's own."""
        staged = {name: self._pinned(f"out {name}", array.nbytes) for name, array in source.items()}
        for name, array in source.items():
            if array.nbytes:
                arguments = (staged[name].pointer, array.pointer, array.nbytes, self.handle)
                queue(lambda: "a copy to the host", self._driver.cuMemcpyDtoHAsync, *arguments)
        self.synchronize()
        return {name: staged[name].view(array.shape, array.dtype).copy() for name, array in source.items()}

    def copy(self, source: DeviceArray, into: DeviceArray) -> None:
        """GPU -> GPU, queued."""
        if source.nbytes:
            arguments = (into.pointer, source.pointer, source.nbytes, self.handle)
            queue(lambda: f"a copy to {into!r}", self._driver.cuMemcpyDtoDAsync, *arguments)

    def abandon_capture(self) -> bool:
        """Ends a graph capture that an error left open; True when there was one."""
        driver = self._driver
        status, state = driver.cuStreamIsCapturing(self.handle)
        if status or state == driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE:
            return False
        status, graph = driver.cuStreamEndCapture(self.handle)
        if not status and int(graph):
            driver.cuGraphDestroy(graph)
        return True

    def close(self) -> None:
        """Waits for our work and gives the stream and the pinned memory back; arrays handed out stay."""
        self.make_current()
        self._driver.cuStreamSynchronize(self.handle)
        for pinned in self._staging.values():
            pinned.close()
        self._staging.clear()
        self._stream.close()

    def _pinned(self, name: str, size: int) -> _Pinned:
        """Memory of at least `size` bytes that no copy uses any more."""
        known = self._staging.get(name)
        if known is None or known.size < size:
            if known is not None:
                known.close()
                del self._staging[name]
            with _device_errors(f"{size / 2**20:.1f} MB of pinned host memory"):
                self._staging[name] = _Pinned(max(size, 1))
        pinned = self._staging[name]
        pinned.wait()
        return pinned


class _Pinned:
    """Page-locked host memory, and the event until which a copy uses it."""

    def __init__(self, size: int) -> None:
        from cuda.core import LegacyPinnedMemoryResource

        self.size = size
        self._buffer = LegacyPinnedMemoryResource().allocate(size)
        self._event: Any = None
        self.pointer = int(self._buffer.handle)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        memory = (ctypes.c_uint8 * self.size).from_address(self.pointer)
        return np.frombuffer(memoryview(memory), dtype, math.prod(shape)).reshape(shape)

    def busy_until(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        if self._event is not None:
            self._event.sync()
            self._event = None

    def close(self) -> None:
        self.wait()
        self._buffer.close()


@contextmanager
def _device_errors(what: str) -> Iterator[None]:
    """Turns an error of cuda.core, whose class is not public, into ours."""
    try:
        yield
    except Exception as error:
        raise device_error(what, error) from error
