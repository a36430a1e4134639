"""Sessions of a TensorRT engine: host arrays or GPU tensors in and out, from many threads at once.

A call runs on a lane of the pool for its optimization profile: an execution context is for one thread at a time, which
is what TensorRT asks for, and its memory for activations is what a second call at the same time costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from attn_deploy.errors import AttnDeployError, FeedError, NotAsAskedError
from attn_deploy.runtimes.cuda_device import DeviceArray, is_device_tensor
from attn_deploy.runtimes.lane_pool import LanePool
from attn_deploy.runtimes.tensorrt_execution import Engine, Shapes
from attn_deploy.runtimes.tensorrt_lane import Lane
from attn_deploy.runtimes.tensorrt_network import numpy_name
from attn_deploy.runtimes.tensorrt_options import Options, Profile, check_sizes, choose_profile, is_batched, sizes_of
from attn_deploy.session import BATCH, Array, TensorSpec


class TensorRTSession:
    """`run` and `run_device` are safe from many threads; a batch beyond the profiles runs in parts.

    Feeds must have been checked by the caller, as far as names and dtypes go.
    """

    def __init__(
        self, engine: Engine, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], options: Options, *,
        profiles: Sequence[Profile], device_id: int, cuda_major: int,
    ) -> None:  # fmt: skip
        """Raises NotAsAskedError when the engine's inputs and outputs are not of the types that the specs say."""
        self._engine: Engine | None = engine
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._profiles = tuple(profiles)
        self._batched = is_batched(inputs, outputs)
        _require_types(engine.engine, [*inputs, *outputs])

        self._graphs = options.cuda_graph
        self._device_id, self._cuda_major = device_id, cuda_major
        self._lanes: LanePool[Lane] = LanePool(self._lane)

    def _lane(self, profile: Any) -> Lane:
        return Lane(
            self.engine, profile, self._inputs, self._outputs,
            graphs=self._graphs, device_id=self._device_id, cuda_major=self._cuda_major,
        )  # fmt: skip

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    @property
    def engine(self) -> Engine:
        """Raises AttnDeployError once the session is closed."""
        if self._engine is None:
            raise AttnDeployError("the session is closed", next_step="load the bundle again")
        return self._engine

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Arrays in host memory (or tensors in GPU memory) -> arrays in host memory, by name, the caller's own.

        Raises FeedError for sizes that no profile holds, DeviceMemoryError when the GPU's memory is full; the session
        is usable after both.
        """
        if any(is_device_tensor(feeds[spec.name]) for spec in self._inputs):
            return {name: array.numpy() for name, array in self.run_device(feeds).items()}
        arrays = {spec.name: np.asarray(feeds[spec.name]) for spec in self._inputs}
        sizes, parts = self._parts({name: array.shape for name, array in arrays.items()})
        results = []
        begin = 0
        for part in parts:
            end = begin + part
            chunk = arrays if len(parts) == 1 else {name: a[begin:end] for name, a in arrays.items()}
            with self._lanes.take(self._profile(sizes, part)) as lane, lane.working():
                results.append(lane.run(chunk))
            begin = end
        if len(results) == 1:
            return results[0]
        return {spec.name: np.concatenate([r[spec.name] for r in results]) for spec in self._outputs}

    def run_device(self, feeds: Mapping[str, Any], *, stream: Any = None) -> dict[str, DeviceArray]:
        """Tensors in GPU memory (DLPack, CUDA array interface, DeviceArray; NumPy arrays too) -> arrays in GPU memory.

        Nothing is copied, except what does not begin at a multiple of 256 bytes. With `stream` (a handle, a torch or
        cuda.core stream) the call returns at once: the run comes after what is on that stream now, and what is put
        there later comes after the run. Without it the call returns when the results are there. Raises as `run`, and
        FeedError for a tensor that is not contiguous or on another GPU.
        """
        shapes = {spec.name: tuple(np.shape(feeds[spec.name])) for spec in self._inputs}
        sizes, parts = self._parts(shapes)
        with self._lanes.take(self._profile(sizes, parts[0])) as lane, lane.working():
            if stream is not None:
                lane.stream.wait_for(stream)
            arrays = {spec.name: lane.on_device(spec, feeds[spec.name]) for spec in self._inputs}
            if len(parts) == 1:
                results = lane.results(shapes)
                lane.run_device(arrays, results)
            else:
                results = self._run_parts(lane, arrays, sizes, parts)
            lane.hand_over(list(arrays.values()), results, stream)
            return results

    def _run_parts(
        self, lane: Lane, arrays: Mapping[str, DeviceArray], sizes: Mapping[str, int], parts: Sequence[int]
    ) -> dict[str, DeviceArray]:
        """Each part writes its rows of the results. One of another profile (a small rest) runs on a lane of that."""
        results = lane.results({n: (parts[0], *a.shape[1:]) for n, a in arrays.items()}, batch=sizes[BATCH])
        own = self._profile(sizes, parts[0])
        begin = 0
        for part in parts:
            feeds = {name: lane.rows(array, begin, part) for name, array in arrays.items()}
            into = {name: lane.rows(array, begin, part) for name, array in results.items()}
            profile = self._profile(sizes, part)
            if profile == own:
                lane.run_device(feeds, into)
            else:
                with self._lanes.take(profile) as other, other.working():
                    other.stream.wait_for(lane.stream.handle)
                    other.run_device(feeds, into)
                    other.stream.make_wait(lane.stream.handle)
            begin += part
        return results

    @contextlib.contextmanager
    def lane_for(self, feeds: Mapping[str, Array]) -> Iterator[tuple[Lane, int]]:
        """The lane, and its profile, that a call with these feeds runs on. Raises FeedError where it runs in parts."""
        sizes, parts = self._parts({name: array.shape for name, array in feeds.items()})
        profile = self._profile(sizes, parts[0])
        if len(parts) > 1 or profile is None:
            raise FeedError("this batch runs in parts", got=sizes.get(BATCH), expected=f"at most {max(parts)}")
        with self._lanes.take(profile) as lane:
            yield lane, profile

    def _profile(self, sizes: Mapping[str, int], part: int) -> int | None:
        return choose_profile(self._profiles, {**sizes, BATCH: part} if BATCH in sizes else sizes)

    def _parts(self, shapes: Shapes) -> tuple[dict[str, int], list[int]]:
        for spec in self._inputs:
            shape = shapes[spec.name]
            fixed = len(shape) == len(spec.shape) and all(
                isinstance(d, str) or d == size for d, size in zip(spec.shape, shape, strict=True)
            )
            if not fixed:
                raise FeedError(f"input {spec.name!r} has the wrong shape", got=list(shape), expected=spec.describe())
        sizes = sizes_of(self._inputs, shapes)
        return sizes, check_sizes(self._profiles, sizes, batched=self._batched)

    def close(self) -> None:
        """Frees the engine and its memory. Calls that are running end normally; arrays handed out stay."""
        self._lanes.close()
        self._engine = None


def _require_types(engine: trt.ICudaEngine, specs: Sequence[TensorSpec]) -> None:
    """Raises NotAsAskedError: the engine's own inputs and outputs decide what is read and written."""
    found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    for spec in specs:
        dtype = numpy_name(engine.get_tensor_dtype(spec.name)) if spec.name in found else "nothing of this name"
        if dtype != spec.dtype:
            raise NotAsAskedError(
                "the engine's inputs and outputs are not the model's",
                got=f"{spec.name}: {dtype}",
                expected=spec.describe(),
            )
