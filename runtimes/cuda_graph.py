"""Work of a stream, captured once and launched as a whole: hundreds of kernels cost the host one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.cuda_device import DeviceStream, device_error


class CudaGraph:
    """An instantiated graph. It holds addresses, not memory: what it reads and writes must outlive it."""

    def __init__(self, executable: Any) -> None:
        self._executable = executable

    def launch(self, stream: DeviceStream) -> None:
        """Queues the whole graph. Raises AttnDeployError."""
        from cuda.bindings import driver

        _check("the launch of a CUDA graph", driver.cuGraphLaunch(self._executable, stream.handle))

    def close(self) -> None:
        """Frees the graph; its last launch must be done."""
        from cuda.bindings import driver

        if self._executable is not None:
            driver.cuGraphExecDestroy(self._executable)
            self._executable = None


def capture(stream: DeviceStream, work: Callable[[], None]) -> CudaGraph:
    """What `work` queues on the stream, as a graph; nothing of it runs now.

    Other threads go on meanwhile: the mode is thread-local. Raises AttnDeployError where the work cannot be captured;
    the stream is usable after that, and work captured in part is dropped.
    """
    from cuda.bindings import driver

    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    _check("the begin of a capture", driver.cuStreamBeginCapture(stream.handle, mode))
    try:
        work()
        graph = _check("the end of a capture", driver.cuStreamEndCapture(stream.handle))
    except BaseException:
        stream.abandon_capture()
        raise
    try:
        return CudaGraph(_check("the making of a CUDA graph", driver.cuGraphInstantiate(graph, 0)))
    finally:
        driver.cuGraphDestroy(graph)


def _check(what: str, answer: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    status, *values = answer
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _error(what, status)
    return values[0] if values else None


def _error(what: str, status: Any) -> AttnDeployError:
    return device_error(what, RuntimeError(status.name))
