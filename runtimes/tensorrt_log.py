"""What TensorRT calls back: messages and errors that become ours, progress that is shown.

TensorRT returns None or False and says why elsewhere: to the logger, to the error recorder, to the parser. What is
given to it must live as long as all that was made with it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence

import tensorrt as trt

from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.runtimes.cuda_device import DeviceMemoryError, is_out_of_memory
from attn_deploy.runtimes.tensorrt_progress import Phases

_KEPT = 50
_SHOWN = 3
_SOURCE = re.compile(r"^\d+: |\[[\w./\\-]+\.(?:cpp|cu|h)::\w*::\d+\] |Error Code:? ?\d+: ")
"""Where in TensorRT's own source a message comes from: nothing for a user."""


class Messages(trt.ILogger):
    """Keeps the last warnings and errors; prints nothing. May be called from any thread."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._lock = threading.Lock()
        self._warnings: list[str] = []
        self._errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self._keep(self._errors, msg)
        elif severity == trt.ILogger.WARNING:
            self._keep(self._warnings, msg)

    def add_error(self, text: str) -> None:
        """An error that came another way."""
        self._keep(self._errors, text)

    def _keep(self, messages: list[str], text: str) -> None:
        with self._lock:
            messages.append(text)
            del messages[:-_KEPT]

    def take_errors(self) -> list[str]:
        """The errors since the last call, the first one first."""
        with self._lock:
            errors, self._errors = self._errors, []
            return list(dict.fromkeys(errors))

    def warnings(self) -> list[str]:
        with self._lock:
            return list(dict.fromkeys(self._warnings))


class Recorder(trt.IErrorRecorder):
    """Hands errors of a builder, runtime or context on to its messages; keeps the last ones as TensorRT asks for."""

    def __init__(self, messages: Messages) -> None:
        trt.IErrorRecorder.__init__(self)
        self._messages = messages
        self._lock = threading.Lock()
        self._errors: list[tuple[trt.ErrorCodeTRT, str]] = []

    def report_error(self, code: trt.ErrorCodeTRT, desc: str) -> bool:
        out_of_memory = code == trt.ErrorCodeTRT.FAILED_ALLOCATION
        self._messages.add_error(f"out of memory: {desc}" if out_of_memory else desc)
        with self._lock:
            self._errors.append((code, desc))
            del self._errors[:-_KEPT]
        return False

    def num_errors(self) -> int:
        return len(self._errors)

    def get_error_code(self, index: int) -> trt.ErrorCodeTRT:
        return self._errors[index][0]

    def get_error_desc(self, index: int) -> str:
        return self._errors[index][1]

    def has_overflowed(self) -> bool:
        return False

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()


class Monitor(trt.IProgressMonitor):
    """Shows the phases of a build. What showing them raises (a key that was pressed) ends the build and is in `error`:
    an exception must not go through TensorRT."""

    def __init__(self, phases: Phases) -> None:
        trt.IProgressMonitor.__init__(self)
        self._phases = phases
        self.error: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._guard(lambda: self._phases.start(phase_name, parent_phase or None, num_steps))

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._guard(lambda: self._phases.step(phase_name, step))
        return self.error is None

    def phase_finish(self, phase_name: str) -> None:
        self._guard(lambda: self._phases.finish(phase_name))

    def _guard(self, show: Callable[[], None]) -> None:
        try:
            show()
        except BaseException as error:
            self.error = self.error or error


def readable(messages: Sequence[str]) -> str:
    """The first messages without their places in TensorRT's source: later ones mostly follow from them."""
    cleaned = [_SOURCE.sub("", m).strip() for m in messages]
    shown = [m for m in dict.fromkeys(cleaned) if m]
    more = f" (and {len(shown) - _SHOWN} more)" if len(shown) > _SHOWN else ""
    return "; ".join(shown[:_SHOWN]) + more or "TensorRT gave no reason"


def failure(
    what: str, messages: Messages, *, where: str | None = None, next_step: str | None = None
) -> AttnDeployError:
    """Our error from what was reported since the last one: DeviceMemoryError when memory ran out."""
    errors = messages.take_errors()
    if any(is_out_of_memory(RuntimeError(e)) or "OutOfMemory" in e or "insufficient memory" in e for e in errors):
        return DeviceMemoryError(
            f"{what}: the GPU's memory is full",
            where=where,
            got=readable(errors),
            next_step="use a smaller batch (--dynamic batch=1:N), lower workspace_mb, or free memory that others hold "
            "(nvidia-smi shows who)",
        )
    return AttnDeployError(what, where=where, got=readable(errors), next_step=next_step)


def no_device(messages: Messages, error: Exception) -> UnavailableError:
    """TensorRT's factories give nothing when CUDA cannot be initialized."""
    reasons = messages.take_errors()
    return UnavailableError(
        "TensorRT cannot use a GPU here",
        got=readable(reasons) if reasons else str(error).splitlines()[0],
        next_step="attn-deploy doctor",
    )
