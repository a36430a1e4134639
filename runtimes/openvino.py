"""OpenVINO on the CPU: a peer to measure against and an engine to read portable.onnx with; not a target yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attn_deploy.errors import UnavailableError
from attn_deploy.session import Array, TensorSpec

INSTALL = "pip install openvino"


class OpenVinoSession:
    """A compiled model with its own infer request: one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._compiled = compiled

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(port) for port in self._compiled.inputs)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(_spec(port) for port in self._compiled.outputs)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        results = self._request.infer(dict(feeds))
        return {port.get_any_name(): np.array(results[port]) for port in self._compiled.outputs}

    def close(self) -> None:
        self._request = None


def open_session(model: Path, *, threads: int | None = None) -> OpenVinoSession:
    """FP32 on the CPU, latency mode, one stream. Raises UnavailableError without openvino."""
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError("openvino is not installed", got=str(error), next_step=INSTALL) from error
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    core = openvino.Core()
    return OpenVinoSession(core.compile_model(core.read_model(str(model)), "CPU", config))


def _spec(port: Any) -> TensorSpec:
    dims = tuple(d.get_length() if d.is_static else "?" for d in port.get_partial_shape())
    return TensorSpec(port.get_any_name(), str(np.dtype(port.get_element_type().to_dtype())), dims)
