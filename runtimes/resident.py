"""A session called on inputs that are on the GPU already: what an application that keeps its data there sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attn_deploy.latency import System
from attn_deploy.session import Array


def resident(name: str, session: Any, feeds: Mapping[str, Array]) -> System:
    """`session` has `run_device`, as those of onnxruntime-cuda and tensorrt have. Inputs are copied once, here; outputs
    stay on the device; a call returns when they are there. Events on the caller's stream stand around each call."""
    from attn_deploy.runtimes.cuda_device import DeviceStream

    stream = DeviceStream()
    arrays = {}
    for key, array in feeds.items():
        arrays[key] = stream.allocate(array.shape, array.dtype)
        stream.upload(key, array, arrays[key])
    stream.synchronize()
    last: list[Any] = []

    def call() -> None:
        begin = stream.record(timing=True)
        session.run_device(arrays, stream=stream.handle)
        end = stream.record(timing=True)
        end.sync()
        last[:] = [begin, end]

    return System(name, call, device_ms=lambda: float(last[1] - last[0]))
