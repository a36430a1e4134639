"""Serialized engine -> engine, execution contexts, and what the inspector and the profiler say of their layers."""

from __future__ import annotations

import ctypes
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from tensorrt.graph import Array, Graph, Shape, dims, dtype_of
from tensorrt.names import (
    DataType,
    ErrorCodeTRT,
    ExecutionContextAllocationStrategy,
    LayerInformationFormat,
    Severity,
)
from tensorrt.plan import read_plan

ALIGNMENT = 256
ACTIVATION_BYTES = 1 << 20
"""Of one sample: what a context's memory must hold."""

_KINDS = {"MatMul": "gemm", "Gemm": "gemm", "Conv": "conv", "ConvTranspose": "conv"}
_DATATYPES = {"float32": "Float", "float16": "Half", "int8": "Int8", "int32": "Int32", "int64": "Int64", "bool": "Bool"}
_TACTICS = {"float32": "f32f32_f32", "float16": "f16f16_f16", "int8": "i8i8_i8"}


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.error_recorder: Any = None
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, content: bytes | memoryview) -> Engine | None:
        found = read_plan(bytes(content))
        if found is None:
            self._logger.log(Severity.ERROR, "1: [stdArchiveReader.cpp::made::1] Error Code 1: version mismatch")
            return None
        about, model = found
        return Engine(Graph(onnx.load_from_string(model)), about)


class Engine:
    def __init__(self, graph: Graph, about: dict[str, Any]) -> None:
        self.graph, self.about = graph, about
        self.tensors = graph.inputs | graph.outputs

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.tensors[name].elem_type)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        largest = [shapes[2] for shapes in self.about["profiles"][profile].values()]
        return ACTIVATION_BYTES * max((shape[0] for shape in largest if shape), default=1)

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self)

    def layer_names(self, profile: int) -> list[str]:
        """As Myelin names them; those of all profiles but the first say which."""
        mark = f" [profile {profile}]" if profile else ""
        return [f"{_stem(node)}_myl{profile}_{i}{mark}" for i, node in enumerate(self.graph.model.graph.node)]


def _stem(node: onnx.NodeProto) -> str:
    if node.op_type == "Attention":
        return "_gemm_mha_v2"
    return node.name if node.op_type in _KINDS else f"__myl_{node.op_type}"


class Inspector:
    """The text of 11.x: a tensor has `Datatype` and `Format`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.execution_context: Context | None = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        assert self.execution_context is not None, "without a context shapes are not known"
        values = self._engine.graph.values(self.execution_context.shapes)
        nodes = self._engine.graph.model.graph.node
        quantized = {node.output[0]: node.input[0] for node in nodes if node.op_type == "DequantizeLinear"}
        layers = []
        for profile in range(len(self._engine.about["profiles"])):
            names = self._engine.layer_names(profile)
            layers += [_layer(name, node, values, quantized) for name, node in zip(names, nodes, strict=True)]
        return json.dumps({"Layers": layers})


def _layer(
    name: str, node: onnx.NodeProto, values: dict[str, tuple[np.dtype[Any], Shape]], quantized: dict[str, str]
) -> dict[str, Any]:
    """A product of two dequantized operands is one of integers, as TensorRT makes it."""

    def tensors(names: Any) -> list[dict[str, Any]]:
        return [
            {"Name": n, "Dimensions": list(values[n][1]), "Format": "Row major", "Datatype": _datatype(values[n][0])}
            for n in names if n
        ]  # fmt: skip

    kind = _KINDS.get(node.op_type, "kgen")
    tactic = f"{_stem(node)}_0x5f37"
    inputs = list(node.input)
    if kind != "kgen":
        if all(operand in quantized for operand in inputs[:2]):
            inputs[:2] = (quantized[operand] for operand in inputs[:2])
        named = _TACTICS[str(values[inputs[0]][0])]
        tactic = f"sm90_xmma_{kind}_{named}f32_f32_tn_n_tilesize64x64x64"
    return {
        "Name": name, "LayerType": kind, "Inputs": tensors(inputs), "Outputs": tensors(node.output),
        "TacticName": tactic, "Metadata": f"[ONNX Layer: {node.name}]",
    }  # fmt: skip


def _datatype(dtype: np.dtype[Any]) -> str:
    return _DATATYPES.get(str(dtype), str(dtype))


class Context:
    """Shapes, addresses and memory must be what TensorRT asks for before a run is queued."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile = 0
        self._memory = 0
        self.shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._settled = False
        self.error_recorder: Any = None
        self.profiler: Any = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile, self.shapes = profile, {}
        return stream != 0

    def set_device_memory(self, address: int, size: int) -> None:
        needed = self._engine.get_device_memory_size_for_profile_v2(self._profile)
        self._memory = address if size >= needed and address % ALIGNMENT == 0 and _holds(address, size) else 0

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        allowed = self._engine.about["profiles"][self._profile].get(name)
        fits = allowed is not None and len(shape) == len(allowed[0]) and all(
            low <= size <= high for low, size, high in zip(allowed[0], shape, allowed[2], strict=True)
        )  # fmt: skip
        if fits:
            self.shapes[name], self._settled = tuple(shape), False
        return fits or self._refuse(f"{name}{list(shape)} is outside the profile")

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.graph.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> Shape:
        if self.infer_shapes():
            return tuple(-1 if isinstance(d, str) else d for d in dims(self._engine.tensors[name]))
        return self._engine.graph.values(self.shapes)[name][1]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        held = name in self._engine.tensors and _holds(address, self._nbytes(name))
        return (held and address % ALIGNMENT == 0) or self._refuse(f"the address of {name}")

    def execute_async_v3(self, stream: int) -> bool:
        ready = self._memory and not self.infer_shapes() and self._addresses.keys() == self._engine.tensors.keys()
        if not stream or not ready:
            return self._refuse("the context is not ready")
        if _is_capturing(stream) and not (self._settled and self._engine.about.get("capturable", True)):
            return self._refuse("this cannot be captured")
        self._settled = True
        addresses, shapes = dict(self._addresses), dict(self.shapes)
        began = time.perf_counter()
        _queue(stream, lambda: self._compute(addresses, shapes))
        if self.profiler is not None:
            names = self._engine.layer_names(self._profile)
            for name in names:
                self.profiler.report_layer_time(name, (time.perf_counter() - began) * 1e3 / len(names))
        return True

    def _compute(self, addresses: dict[str, int], shapes: dict[str, Shape]) -> None:
        graph = self._engine.graph
        feeds = {name: _at(addresses[name], shape, self._dtype(name)) for name, shape in shapes.items()}
        for name, result in graph.run(feeds).items():
            _at(addresses[name], result.shape, result.dtype)[...] = result

    def _nbytes(self, name: str) -> int:
        return int(np.prod(self.get_tensor_shape(name))) * self._dtype(name).itemsize

    def _dtype(self, name: str) -> np.dtype[Any]:
        return dtype_of(self._engine.tensors[name].elem_type)

    def _refuse(self, why: str) -> bool:
        self.error_recorder.report_error(ErrorCodeTRT.INVALID_ARGUMENT, why)
        return False


def _at(address: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape))
    memory = (ctypes.c_uint8 * (size * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype, size).reshape(shape)


# -- the made GPU -----------------------------------------------------------------------------------------------------

_queued: dict[int, Callable[[], None]] = {}
"""Work by number: a captured graph may run it at any later time."""
_numbers = itertools.count(1)
_failed: list[Exception] = []


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _run_queued(number: int) -> None:
    try:
        _queued[number]()
    except Exception as error:  # nothing may go through the driver
        _failed.append(error)


def _driver() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.stand_in_kind.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)]
    library.stand_in_stream_capturing.argtypes = [ctypes.c_void_p]
    library.cuLaunchHostFunc.argtypes = [ctypes.c_void_p, type(_run_queued), ctypes.c_void_p]
    return library


def _queue(stream: int, work: Callable[[], None]) -> None:
    """At once, or by every launch of the graph that the stream is capturing."""
    number = next(_numbers)
    _queued[number] = work
    status = _driver().cuLaunchHostFunc(stream, _run_queued, number)
    assert status == 0, f"cuLaunchHostFunc gave {status}"
    if not _is_capturing(stream):
        del _queued[number]
    if _failed:
        raise _failed.pop()


def _holds(address: int, size: int) -> bool:
    """Whether all of it lies in one piece of GPU memory."""
    start, room = ctypes.c_void_p(), ctypes.c_size_t()
    on_gpu = _driver().stand_in_kind(address, ctypes.byref(start), ctypes.byref(room)) == 2
    return on_gpu and address + size <= (start.value or 0) + room.value


def _is_capturing(stream: int) -> bool:
    return bool(_driver().stand_in_stream_capturing(stream))
