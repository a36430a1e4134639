"""Reads back what an opened engine runs: its inspector's layers, the network's products, and the time of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorrt as trt

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.tensorrt_inspect import EngineNode, own_name, parse_layers, run_nodes
from attn_deploy.runtimes.tensorrt_log import Messages
from attn_deploy.runtimes.tensorrt_network import parse, products
from attn_deploy.runtimes.tensorrt_session import TensorRTSession
from attn_deploy.session import Array


class LayerTimes(trt.IProfiler):
    """Milliseconds by layer name, summed over the runs that it saw. A context runs layers of one profile."""

    def __init__(self) -> None:
        trt.IProfiler.__init__(self)
        self.ms: dict[str, float] = {}

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        name = own_name(layer_name)
        self.ms[name] = self.ms.get(name, 0.0) + ms


def read_back(session: TensorRTSession, model: Path, feeds: Mapping[str, Array]) -> list[EngineNode]:
    """Layers of the profile that runs these feeds, at their shapes. Raises FeedError, AttnDeployError."""
    arrays = {spec.name: np.asarray(feeds[spec.name]) for spec in session.inputs}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    text, times, profile = _inspect(session, arrays)
    network = parse(model, Messages())
    return run_nodes(parse_layers(text, profile=profile), products(network.network, shapes), times)


def _inspect(session: TensorRTSession, arrays: Mapping[str, Array]) -> tuple[str, dict[str, float], int]:
    """(the inspector's JSON, milliseconds by layer, the profile). Layer by layer: with a profiler there is no graph."""
    with session.lane_for(arrays) as (lane, profile), lane.working():
        execution = lane.execution({name: array.shape for name, array in arrays.items()})
        lane.run(arrays)  # the first run loads kernels
        times = LayerTimes()
        execution.profile_with(times)
        try:
            lane.run(arrays)
            inspector: trt.EngineInspector | None = session.engine.engine.create_engine_inspector()
            if inspector is None:
                raise AttnDeployError("TensorRT gives no inspector for the engine")
            inspector.execution_context = execution.context
            text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        finally:
            lane.forget()  # a profiler cannot be taken off a context, and it makes every run slower
        return text, times.ms, profile
