"""The session of ONNX Runtime on a GPU: memory kept for each shape, CUDA graphs, tensors of the GPU in and out."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes.cuda_device import (
    DeviceArray,
    DeviceMemoryError,
    DeviceStream,
    as_device_array,
    as_stream,
    device_error,
    is_device_tensor,
)
from attn_deploy.session import Array, TensorSpec

KEPT_SHAPES = 4
"""Shapes whose memory is kept, beside those that are captured: the least recently used one is given back."""
_NO_GRAPH = -1
"""The graph id by which ONNX Runtime neither captures nor replays."""

Shapes = tuple[tuple[int, ...], ...]


@dataclass
class _Slot:
    """Inputs and outputs at fixed addresses, for one set of input shapes; `outputs` None where ONNX Runtime makes them.

    `graph_id` is the graph of these addresses, or _NO_GRAPH; `binding` ties them to the session.
    """

    inputs: dict[str, DeviceArray]
    outputs: dict[str, DeviceArray] | None
    binding: Any
    options: Any
    graph_id: int
    captured: bool = False


class OnnxRuntimeCudaSession:
    """A session on one GPU. Safe from many threads: a lock lets one call at a time use the session's stream and memory,
    since one GPU stream runs them one after another anyway. Feeds must have been checked by the caller.

    With CUDA graphs the first call of a shape runs it twice, captures it and replays; later calls copy their inputs to
    the graph's addresses and replay. The number of captured shapes is bounded: further shapes run without a graph, as
    ONNX Runtime cannot drop one. It keeps graphs by thread, so the session holds on to the first thread that calls it,
    and moves to a thread of its own when a second one does.
    """

    def __init__(
        self,
        session: Any,
        device: DeviceStream,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        graph_shapes: int = 0,
    ) -> None:
        """`session` is an InferenceSession on `device`'s stream; `graph_shapes` is how many shapes may be captured."""
        self._session = session
        self._device = device
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._graph_shapes = graph_shapes
        self._next_graph_id = 1  # 0 is the id of a run that names none
        self._kept: OrderedDict[Shapes, _Slot] = OrderedDict()
        self._with_graph: dict[Shapes, _Slot] = {}
        self._in_use: list[tuple[Any, list[DeviceArray]]] = []
        self._lock = threading.Lock()
        self._owner = threading.local()
        self._owned = False
        self._worker: ThreadPoolExecutor | None = None

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """NumPy arrays (or tensors of the GPU) -> NumPy arrays of the caller's own.

        Raises DeviceMemoryError when the GPU's memory is full (smaller batches still run), AttnDeployError for another
        error of the GPU.
        """
        with self._lock:
            self._enter()
            slot = self._slot(feeds)
            self._fill(slot, feeds)
            return self._device.download(self._execute(slot))

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, DeviceArray]:
        """Tensors of the GPU (DLPack, CUDA array interface, DeviceArray; NumPy arrays too) -> arrays on the GPU.

        Nothing is copied, but with a CUDA graph inside the GPU, from and to its addresses. With `stream` (a handle, a
        torch or cuda.core stream) the call returns at once: our work waits for what is on that stream, and what is put
        there afterwards waits for ours. Without it the call returns when the results are there. Raises as `run`, and
        FeedError for a tensor that is not contiguous or on another GPU.
        """
        with self._lock:
            self._enter()
            if stream is not None:
                stream = as_stream(stream)
                self._device.wait_for(stream)
            arrays = {spec.name: self._on_device(spec.name, feeds[spec.name]) for spec in self._inputs}
            slot = self._slot(arrays) if self._graph_shapes else None
            if slot is not None and slot.graph_id != _NO_GRAPH:
                self._fill(slot, arrays)
                results = {name: self._copied(array) for name, array in self._execute(slot).items()}
            else:
                results = self._execute(self._bound(arrays, _NO_GRAPH))
            self._hand_over(list(arrays.values()), results, stream)
            return results

    def close(self) -> None:
        """Frees the model and the memory that is kept. Calls that are running end normally; arrays handed out stay."""
        with self._lock:
            if self._session is None:
                return
            self._device.make_current()
            self._device.synchronize()
            self._kept.clear()
            self._with_graph.clear()
            self._in_use.clear()
            self._session = None  # before its stream
            if self._worker is not None:
                self._worker.shutdown()
            self._device.close()

    # -- one call ------------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._session is None:
            raise AttnDeployError("the session is closed", next_step="load the bundle again")
        self._device.make_current()
        self._in_use = [(event, arrays) for event, arrays in self._in_use if not event.is_done]

    def _on_device(self, name: str, value: Any) -> DeviceArray:
        if is_device_tensor(value):
            return as_device_array(name, value, self._device.handle, device_id=self._device.device_id)
        source = np.asarray(value)
        array = self._allocate(source.shape, source.dtype)
        self._device.upload(name, source, array)
        return array

    def _fill(self, slot: _Slot, feeds: Mapping[str, Any]) -> None:
        """Copies the feeds to the slot's addresses."""
        held = []
        for name, into in slot.inputs.items():
            value = feeds[name]
            if is_device_tensor(value):
                array = as_device_array(name, value, self._device.handle, device_id=self._device.device_id)
                self._device.copy(array, into)
                held.append(array)
            else:
                self._device.upload(name, np.asarray(value), into)
        if held:
            self._in_use.append((self._device.record(), held))

    def _execute(self, slot: _Slot) -> dict[str, DeviceArray]:
        """Queues the model's work and gives its outputs, which are the slot's or ONNX Runtime's."""
        try:
            self._on_owner(lambda: self._session.run_with_iobinding(slot.binding, slot.options))
        except Exception as error:
            broken = self._device.abandon_capture()
            failure = device_error("running the model", error)
            if isinstance(failure, DeviceMemoryError):
                self._forget(slot)
                raise failure from error
            if slot.graph_id == _NO_GRAPH or (slot.captured and not broken):
                raise failure from error
            self._without_graph(slot)
            return self._execute(slot)
        slot.captured = slot.graph_id != _NO_GRAPH
        if slot.outputs is not None:
            return slot.outputs
        return {
            spec.name: self._of_runtime(value, spec.dtype)
            for spec, value in zip(self._outputs, slot.binding.get_outputs(), strict=True)
        }

    def _on_owner(self, call: Callable[[], Any]) -> Any:
        """Calls in the one thread that ONNX Runtime keeps this session's graphs for."""
        if not self._graph_shapes:
            return call()
        if self._worker is None:
            if not self._owned or getattr(self._owner, "is_this", False):
                self._owned = self._owner.is_this = True
                return call()
            self._worker = ThreadPoolExecutor(1, "attn-deploy-cuda")
        return self._worker.submit(call).result()

    def _hand_over(self, arrays: list[DeviceArray], results: Mapping[str, DeviceArray], stream: Any) -> None:
        """Orders the caller's stream after ours, and keeps the inputs alive until they have been read."""
        if stream is None:
            self._device.synchronize()
            return
        done = self._device.record()
        self._in_use.append((done, arrays))
        for array in results.values():
            array.ready = done
            array.wait_on(stream)
            array.release_on(stream)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _slot(self, feeds: Mapping[str, Any]) -> _Slot:
        shapes = tuple(tuple(feeds[spec.name].shape) for spec in self._inputs)
        slot = self._with_graph.get(shapes) or self._kept.get(shapes)
        if slot is not None:
            if shapes in self._kept:
                self._kept.move_to_end(shapes)
            return slot
        inputs = {
            spec.name: self._allocate(shape, spec.dtype) for spec, shape in zip(self._inputs, shapes, strict=True)
        }
        graph_id = self._next_graph_id if len(self._with_graph) < self._graph_shapes else _NO_GRAPH
        slot = self._bound(inputs, graph_id)
        if slot.graph_id != _NO_GRAPH:
            self._next_graph_id += 1
            self._with_graph[shapes] = slot
        else:
            self._kept[shapes] = slot
            while len(self._kept) > KEPT_SHAPES:
                self._kept.popitem(last=False)
        return slot

    def _bound(self, inputs: dict[str, DeviceArray], graph_id: int) -> _Slot:
        """Binds inputs, and outputs of the shapes that follow from theirs, to the session by their addresses."""
        outputs = self._output_arrays({name: array.shape for name, array in inputs.items()})
        if outputs is None:
            graph_id = _NO_GRAPH  # a graph writes to addresses that are known before
        binding = self._session.io_binding()
        device_id = self._device.device_id
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", device_id, array.dtype.type, array.shape, array.pointer)
        for spec in self._outputs:
            if outputs is None:
                binding.bind_output(spec.name, "cuda", device_id)
            else:
                array = outputs[spec.name]
                binding.bind_output(spec.name, "cuda", device_id, array.dtype.type, array.shape, array.pointer)
        return _Slot(inputs, outputs, binding, _run_options(graph_id), graph_id)

    def _output_arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, DeviceArray] | None:
        """Memory for the outputs, or None when a size of theirs is not one of the inputs'."""
        sizes: dict[int | str, int] = {}
        for spec in self._inputs:
            sizes.update(zip(spec.shape, shapes[spec.name], strict=True))
        sizes = {name: size for name, size in sizes.items() if isinstance(name, str) and name != "?"}
        resolved = [tuple(sizes.get(d, -1) if isinstance(d, str) else d for d in spec.shape) for spec in self._outputs]
        if any(-1 in shape for shape in resolved):
            return None
        return {
            spec.name: self._allocate(shape, spec.dtype) for spec, shape in zip(self._outputs, resolved, strict=True)
        }

    def _allocate(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Gives back what is kept for other shapes before it fails."""
        try:
            return self._device.allocate(shape, dtype)
        except DeviceMemoryError:
            if not self._kept:
                raise
            self._kept.clear()
            self._device.synchronize()
            return self._device.allocate(shape, dtype)

    def _copied(self, source: DeviceArray) -> DeviceArray:
        into = self._allocate(source.shape, source.dtype)
        self._device.copy(source, into)
        return into

    def _of_runtime(self, value: Any, dtype: str) -> DeviceArray:
        """An output in ONNX Runtime's own memory; the OrtValue keeps it."""
        return self._device.borrow(value.data_ptr(), tuple(value.shape()), dtype, owner=value)

    def _forget(self, slot: _Slot) -> None:
        """Memory ran out: what is kept goes; a shape that was not captured yet is tried anew when it comes again."""
        self._kept.clear()
        if not slot.captured:
            self._with_graph = {shapes: other for shapes, other in self._with_graph.items() if other is not slot}

    def _without_graph(self, slot: _Slot) -> None:
        """Something else on the GPU broke the capture (another thread's allocation does): this shape runs without."""
        slot.graph_id = _NO_GRAPH
        slot.options = _run_options(_NO_GRAPH)


def _run_options(graph_id: int) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")  # we wait, where it is needed
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options
