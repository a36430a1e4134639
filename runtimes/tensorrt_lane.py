"""A lane of a TensorRT session: a stream, memory for activations, and a context for each set of shapes seen lately."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import tensorrt as trt

from attn_deploy.errors import FeedError
from attn_deploy.runtimes.cuda_device import (
    DeviceArray,
    DeviceMemoryError,
    DeviceStream,
    as_device_array,
    is_device_tensor,
)
from attn_deploy.runtimes.tensorrt_execution import ALIGNMENT, SETTING_UP, Engine, Execution, Shapes
from attn_deploy.session import Array, TensorSpec

EXECUTIONS = 8
"""Sets of shapes that a lane keeps ready, each with its buffers and graphs."""


class Event(Protocol):
    """What DeviceStream.record gives."""

    @property
    def is_done(self) -> bool: ...


class Lane:
    """One call at a time, at shapes of one optimization profile."""

    def __init__(
        self, engine: Engine, profile: int, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *,
        graphs: bool, device_id: int, cuda_major: int,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._profile = profile
        self._inputs, self._outputs = inputs, outputs
        self._graphs = graphs
        own: trt.ICudaEngine = engine.engine
        size = own.get_device_memory_size_for_profile_v2(profile)
        with SETTING_UP:
            self.stream = DeviceStream(device_id, cuda_major=cuda_major)
            self._memory = self.stream.allocate((size,), np.uint8)
        self._executions: OrderedDict[tuple[tuple[int, ...], ...], Execution] = OrderedDict()
        self._held: deque[tuple[Event, list[DeviceArray]]] = deque()

    def execution(self, shapes: Shapes) -> Execution:
        """The context of these shapes, made now if it is not there; contexts not used lately make room for it."""
        key = tuple(tuple(shapes[spec.name]) for spec in self._inputs)
        known = self._executions.get(key)
        if known is None:
            if len(self._executions) >= EXECUTIONS:
                self._executions.popitem(last=False)[1].close()
            with SETTING_UP:
                known = self._executions[key] = Execution(
                    self._engine, self._profile, shapes, self._outputs,
                    memory=self._memory, stream=self.stream, graphs=self._graphs,
                )  # fmt: skip
        self._executions.move_to_end(key)
        return known

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Host -> GPU, run, GPU -> host; the results are the caller's own."""
        execution = self.execution({name: array.shape for name, array in feeds.items()})
        buffers = {spec.name: execution.buffer(spec) for spec in [*self._inputs, *self._outputs]}
        for spec in self._inputs:
            self.stream.upload(spec.name, feeds[spec.name], buffers[spec.name])
        execution.launch({name: array.pointer for name, array in buffers.items()})
        return self.stream.download({spec.name: buffers[spec.name] for spec in self._outputs})

    def on_device(self, spec: TensorSpec, value: Any) -> DeviceArray:
        """A feed in GPU memory: the caller's own tensor, or a copy of a host array. Raises FeedError."""
        if not is_device_tensor(value):
            source = np.asarray(value)
            array = self.stream.allocate(source.shape, spec.dtype)
            self.stream.upload(spec.name, source, array)
            return array
        array = as_device_array(spec.name, value, self.stream.handle, device_id=self.stream.device_id)
        if array.dtype != np.dtype(spec.dtype):
            raise FeedError(f"input {spec.name!r} has the wrong dtype", got=array.dtype, expected=spec.dtype)
        return array

    def results(self, shapes: Shapes, *, batch: int | None = None) -> dict[str, DeviceArray]:
        """New arrays for the outputs at these input shapes, or with another batch."""
        found = self.execution(shapes).output_shapes
        return {
            spec.name: self.stream.allocate(
                found[spec.name] if batch is None else (batch, *found[spec.name][1:]), spec.dtype
            )
            for spec in self._outputs
        }

    def rows(self, array: DeviceArray, begin: int, count: int) -> DeviceArray:
        """A part of the first axis, in place."""
        row_bytes = array.nbytes // array.shape[0]
        return self.stream.borrow(
            array.pointer + begin * row_bytes, (count, *array.shape[1:]), array.dtype, owner=array
        )

    def run_device(self, feeds: Mapping[str, DeviceArray], results: Mapping[str, DeviceArray]) -> None:
        """Queues a run that reads the feeds where they are and writes the results where they are.

        What does not lie at an aligned address (a view into a tensor) goes through a buffer of ours, on the GPU.
        """
        execution = self.execution({name: array.shape for name, array in feeds.items()})
        addresses: dict[str, int] = {}
        late: list[tuple[DeviceArray, DeviceArray]] = []
        for spec in self._inputs:
            array = feeds[spec.name]
            if array.pointer % ALIGNMENT:
                aligned = execution.buffer(spec)
                self.stream.copy(array, aligned)
                array = aligned
            addresses[spec.name] = array.pointer
        for spec in self._outputs:
            array = results[spec.name]
            if array.pointer % ALIGNMENT:
                late.append((execution.buffer(spec), array))
                array = execution.buffer(spec)
            addresses[spec.name] = array.pointer
        execution.launch(addresses)
        for source, target in late:
            self.stream.copy(source, target)

    def hand_over(self, feeds: list[DeviceArray], results: Mapping[str, DeviceArray], stream: Any) -> None:
        """Orders the caller's stream after ours; without one waits. The feeds are kept until they have been read."""
        while self._held and self._held[0][0].is_done:
            self._held.popleft()
        if stream is None:
            self.stream.synchronize()
            return
        done = self.stream.record()
        self._held.append((done, feeds))
        for array in results.values():
            array.ready = done
            array.wait_on(stream)
            array.release_on(stream)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Around a call, in the calling thread. When memory runs out, what is kept for other shapes is given back, so
        that the next call finds room."""
        self.stream.make_current()
        try:
            yield
        except DeviceMemoryError:
            self.forget()
            raise

    def forget(self) -> None:
        """Gives back what is kept between calls, except the stream and the activation memory."""
        for execution in self._executions.values():
            execution.close()
        self._executions.clear()

    def close(self) -> None:
        self.stream.make_current()
        self.forget()
        self._held.clear()
        self.stream.close()
