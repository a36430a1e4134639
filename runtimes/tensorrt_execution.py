"""One engine at one set of input shapes: an execution context, its buffers and its CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import tensorrt as trt

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.cuda_device import DeviceArray, DeviceStream
from attn_deploy.runtimes.cuda_graph import CudaGraph, capture
from attn_deploy.runtimes.tensorrt_log import Messages, Recorder, failure
from attn_deploy.session import TensorSpec

ALIGNMENT = 256
"""What TensorRT demands of every address it is given (NvInferRuntime.h, setTensorAddress)."""

_GRAPHS = 4
"""Graphs kept for one set of shapes: one for each set of addresses, and callers alternate between few."""

_SEEN = 16
"""Sets of addresses that are remembered: one that comes again is worth a graph."""

Shapes = Mapping[str, tuple[int, ...]]

SETTING_UP = threading.RLock()
"""Held while a lane or context is made and while a graph is captured: what TensorRT allocates then is not allowed on
some drivers while any stream is capturing."""


@dataclass(frozen=True)
class Engine:
    """An engine and what must live as long as it."""

    engine: trt.ICudaEngine
    runtime: trt.Runtime
    messages: Messages
    recorder: Recorder


class Execution:
    """An execution context whose shapes never change.

    NVIDIA's guide: a CUDA graph belongs to one context at one set of shapes, since changing them changes state inside
    the context. Contexts of one lane share the memory of their activations, as they run one after the other.
    """

    def __init__(
        self, engine: Engine, profile: int, shapes: Shapes, outputs: tuple[TensorSpec, ...], *,
        memory: DeviceArray, stream: DeviceStream, graphs: bool,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._stream = stream
        self._memory = memory
        self._use_graphs = graphs
        self._graphs: OrderedDict[tuple[int, ...], CudaGraph] = OrderedDict()
        self._seen: deque[tuple[int, ...]] = deque(maxlen=_SEEN)
        self._bound: dict[str, int] = {}
        self._context = self._make_context(profile, shapes)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.output_shapes = {spec.name: self._output_shape(spec.name) for spec in outputs}
        self._buffers: dict[str, DeviceArray] = {}

    @property
    def context(self) -> trt.IExecutionContext:
        return self._context

    def _make_context(self, profile: int, shapes: Shapes) -> trt.IExecutionContext:
        messages = self._engine.messages
        engine: trt.ICudaEngine = self._engine.engine
        context: trt.IExecutionContext | None = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        if context is None:
            raise failure("TensorRT cannot make an execution context", messages)
        context.error_recorder = self._engine.recorder
        accepted = context.set_optimization_profile_async(profile, self._stream.handle)
        if accepted and self._memory.nbytes:
            context.set_device_memory(self._memory.pointer, self._memory.nbytes)
        for name, shape in shapes.items():
            accepted = accepted and context.set_input_shape(name, tuple(shape))
        if not accepted or context.infer_shapes():
            raise failure(f"TensorRT does not take the input shapes {_describe(shapes)}", messages)
        return context

    def _output_shape(self, name: str) -> tuple[int, ...]:
        context: trt.IExecutionContext = self._context
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise AttnDeployError(
                f"the shape of output {name!r} is known only after a run",
                got=list(shape),
                expected="a shape that follows from the inputs' shapes",
                next_step="use --target onnxruntime-cuda",
            )
        return shape

    def buffer(self, spec: TensorSpec) -> DeviceArray:
        """Memory of our own for one input or output; its address stays the same, so that graphs stay valid."""
        known = self._buffers.get(spec.name)
        if known is None:
            shape = self.output_shapes.get(spec.name) or self.shapes[spec.name]
            with SETTING_UP:
                known = self._buffers[spec.name] = self._stream.allocate(shape, spec.dtype)
        return known

    def launch(self, addresses: Mapping[str, int]) -> None:
        """Queues one run that reads and writes at these addresses (aligned; every input and output).

        The first run at these addresses goes kernel by kernel, which also brings the context up to its shapes; when the
        same addresses come again, that run is followed by a capture, and from then on the graph is launched.
        """
        key = tuple(addresses.values())
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            graph.launch(self._stream)
            return
        self._enqueue(addresses)
        if self._use_graphs and key in self._seen:
            self._capture(key, addresses)
        else:
            self._seen.append(key)

    def _capture(self, key: tuple[int, ...], addresses: Mapping[str, int]) -> None:
        """Some engines cannot be captured (loops, conditions on the host): they go on kernel by kernel."""
        self._stream.synchronize()
        try:
            with SETTING_UP:
                self._graphs[key] = capture(self._stream, lambda: self._enqueue(addresses))
        except AttnDeployError:
            self._use_graphs = False
            self._engine.messages.take_errors()
            return
        if len(self._graphs) > _GRAPHS:
            self._graphs.popitem(last=False)[1].close()  # nothing of it runs: the stream was waited for above

    def _enqueue(self, addresses: Mapping[str, int]) -> None:
        context: trt.IExecutionContext = self._context
        messages = self._engine.messages
        for name, address in addresses.items():
            if self._bound.get(name) != address:
                if not context.set_tensor_address(name, address):
                    raise failure(f"TensorRT does not take the memory of {name!r}", messages)
                self._bound[name] = address
        if not context.execute_async_v3(self._stream.handle):
            raise failure("TensorRT cannot run the engine", messages)

    def profile_with(self, profiler: trt.IProfiler) -> None:
        """Layers are timed from the next run on. They run one by one: a graph would hide them."""
        context: trt.IExecutionContext = self._context
        self._use_graphs = False
        context.profiler = profiler

    def close(self) -> None:
        """Waits for what runs, then gives the buffers and graphs back."""
        self._stream.synchronize()
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._buffers.clear()


def _describe(shapes: Shapes) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, shape in shapes.items())
