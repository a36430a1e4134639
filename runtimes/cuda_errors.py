"""Errors of the GPU's libraries as ours. An out-of-memory leaves everything usable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from attn_deploy.errors import AttnDeployError


class DeviceMemoryError(AttnDeployError):
    """The GPU's memory does not hold what was asked. Nothing was changed: a smaller batch can be run next."""

    exit_code: ClassVar[int] = 1


def device_error(what: str, error: Exception) -> AttnDeployError:
    """Our error for one of a GPU library: DeviceMemoryError when its text says that memory ran out."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if is_out_of_memory(error):
        return DeviceMemoryError(
            "the GPU's memory is full",
            where=what,
            got=text,
            expected=_free_memory(),
            next_step="use a smaller batch, or free memory that others hold (nvidia-smi shows who)",
        )
    return AttnDeployError("the GPU reported an error", where=what, got=text, next_step="attn-deploy doctor")


def is_out_of_memory(error: Exception) -> bool:
    """By the text: each library raises its own class (the driver, ONNX Runtime's arena, cuBLAS, TensorRT)."""
    text = str(error).lower()
    signs = ("out_of_memory", "out of memory", "failed to allocate memory", "alloc_failed", "available memory of")
    return any(sign in text for sign in signs)


def queue(what: Callable[[], str], function: Callable[..., Any], *arguments: Any) -> None:
    """Calls a function of the driver that returns its status alone; `what` names the work, should it fail."""
    (status,) = function(*arguments)
    if status:
        raise device_error(what(), RuntimeError(status.name))


def _free_memory() -> str | None:
    from cuda.bindings import driver

    status, free, total = driver.cuMemGetInfo()
    if status:
        return None
    return f"no more than what is free: {free / 2**20:.0f} of {total / 2**20:.0f} MB"
