"""A made TensorRT for the calls around it: it keeps the rules that a caller must keep (profile, memory, shapes, aligned
addresses in GPU memory, one enqueue before a capture) and refuses, as TensorRT does, by False or None.

Its engines compute `y = 2 x + 1` on the made GPU's memory, which is the host's. `check_tensorrt.py` holds our sessions
to the rules; that its names are TensorRT's is what tests/runtimes/tensorrt/test_api.py checks with the real bindings.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__version__ = "11.4.0.106"

ALIGNMENT = 256
ACTIVATION_BYTES = 1 << 20
"""Of one sample: what a context's memory must hold."""


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING

    def __init__(self) -> None: ...


class IErrorRecorder(ILogger): ...


class IProgressMonitor(ILogger): ...


class IProfiler(ILogger): ...


class ErrorCodeTRT(enum.Enum):
    INVALID_ARGUMENT = 3
    FAILED_ALLOCATION = 5


class DataType(enum.Enum):
    FLOAT = 0


class LayerType(enum.Enum):
    CONVOLUTION, DECONVOLUTION, MATRIX_MULTIPLY, ATTENTION_INPUT = 0, 1, 2, 3


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.Enum):
    TF32, VERSION_COMPATIBLE = 0, 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    DETAILED = 1


class HardwareCompatibilityLevel(enum.Enum):
    NONE, AMPERE_PLUS = 0, 1


class OnnxParserFlag(enum.Enum):
    NATIVE_INSTANCENORM = 0


class ExecutionContextAllocationStrategy(enum.Enum):
    USER_MANAGED = 2


class LayerInformationFormat(enum.Enum):
    JSON = 1


class Dims(tuple): ...


def model(**about: Any) -> bytes:
    """What stands for an ONNX file here: `errors` the parser gives, `capturable`, `fails_to_build`."""
    return json.dumps(about).encode()


class Tensor:
    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype, self.is_shape_tensor = name, shape, DataType.FLOAT, False

    def get_dimension_name(self, axis: int) -> str:
        return "batch" if axis == 0 else ""


class Layer:
    """One matrix product with a square weight."""

    name, metadata, type = "layer/MatMul", "[ONNX Layer: layer/MatMul]", LayerType.MATRIX_MULTIPLY

    def __init__(self, network: Network) -> None:
        self._network = network

    def get_input(self, index: int) -> Tensor:
        return self._network.get_input(0)

    def get_output(self, index: int) -> Tensor:
        return self._network.get_input(0)


class Network:
    num_inputs = num_outputs = num_layers = 1

    def __init__(self, flags: int) -> None:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "the network is weakly typed"
        self.about: dict[str, Any] = {}
        self._input, self._output = Tensor("x", (-1, 4)), Tensor("y", (-1, 4))

    def get_input(self, index: int) -> Tensor:
        return self._input

    def get_output(self, index: int) -> Tensor:
        return self._output

    def get_layer(self, index: int) -> Layer:
        return Layer(self)


class ParserError:
    def __init__(self, row: list[str]) -> None:
        self._row = row

    def node_name(self) -> str:
        return self._row[0]

    def node_operator(self) -> str:
        return self._row[1]

    def desc(self) -> str:
        return self._row[2]

    def node(self) -> int:
        return 0


class OnnxParser:
    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network
        self._errors: list[list[str]] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def parse(self, content: bytes) -> bool:
        self._network.about = json.loads(content)
        self._errors = self._network.about.get("errors", [])
        return not self._errors

    def parse_from_file(self, path: str) -> bool:
        with open(path, "rb") as stream:
            return self.parse(stream.read())

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])

    def clear_errors(self) -> None:
        self._errors = []


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class BuilderConfig:
    def __init__(self) -> None:
        self.flags = {BuilderFlag.TF32}
        self.profiles: list[list[list[int]]] = []
        self.limits: dict[MemoryPoolType, int] = {}
        self.timing: TimingCache | None = None
        self.progress_monitor: Any = None

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.limits[pool] = size

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile.shapes["x"])
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        return None if content.startswith(b"damaged") else TimingCache(content)

    def set_timing_cache(self, timing: TimingCache, ignore_mismatch: bool) -> bool:
        self.timing = timing
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.timing


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]) -> None:
        self.shapes[name] = [list(min), list(opt), list(max)]


built: list[BuilderConfig] = []
"""Every build that was done."""


class Builder:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.error_recorder: Any = None

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> BuilderConfig:
        return BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(self, network: Network, config: BuilderConfig) -> bytes | None:
        built.append(config)
        config.progress_monitor.phase_start("building", None, 4)
        for step in range(4):
            if not config.progress_monitor.step_complete("building", step):
                return None
        config.progress_monitor.phase_finish("building")
        failure = network.about.get("fails_to_build")
        if failure:
            self.error_recorder.report_error(ErrorCodeTRT[failure], "[made.cpp::build::1] a reason")
            return None
        return plan(profiles=config.profiles, capturable=network.about.get("capturable", True))


def plan(version: tuple[int, int, int, int] = (11, 4, 0, 106), **about: Any) -> bytes:
    return b"ftrt" + bytes(20) + bytes(version) + json.dumps(about).encode()


class Runtime:
    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self.error_recorder: Any = None
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, content: bytes | memoryview) -> Engine | None:
        content = bytes(content)
        if content[24:26] != bytes([11, 4]):
            self._logger.log(Severity.ERROR, "1: [stdArchiveReader.cpp::made::1] Error Code 1: version mismatch")
            return None
        return Engine(json.loads(content[28:]), self._logger)


class Engine:
    num_io_tensors = 2

    def __init__(self, about: dict[str, Any], logger: Any) -> None:
        self.about, self.logger = about, logger

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.FLOAT

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return int(ACTIVATION_BYTES * self.about["profiles"][profile][2][0])

    def create_execution_context(self, strategy: ExecutionContextAllocationStrategy) -> Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


class Inspector:
    execution_context: Any = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        tensor = {"Name": "x", "Dimensions": [2, 4], "Datatype": "Half", "Format": "linear"}
        return json.dumps({"Layers": [{
            "Name": "layer/MatMul_myl0_0", "LayerType": "gemm", "Inputs": [tensor], "Outputs": [tensor],
            "TacticName": "sm90_xmma_gemm_f16f16_f16f32_f32", "Metadata": "[ONNX Layer: layer/MatMul]",
        }]})  # fmt: skip


captured: list[Callable[[], None]] = []
"""What was enqueued on streams that were capturing."""


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._memory = 0
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._settled = False
        self.error_recorder: Any = None
        self.profiler: Any = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile, self._shape = profile, None
        return stream != 0

    def set_device_memory(self, address: int, size: int) -> None:
        needed = self._engine.get_device_memory_size_for_profile_v2(self._profile or 0)
        self._memory = address if size >= needed and address % ALIGNMENT == 0 and _on_gpu(address) else 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine.about["profiles"][self._profile or 0]
        fits = name == "x" and all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True))
        if fits:
            self._shape, self._settled = shape, False
        return fits or self._refuse(f"{name}{list(shape)} is outside the profile")

    def infer_shapes(self) -> list[str]:
        return [] if self._shape is not None else ["x"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape or (-1, 4)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return (address % ALIGNMENT == 0 and _on_gpu(address)) or self._refuse(f"the address of {name}")

    def execute_async_v3(self, stream: int) -> bool:
        if not stream or not self._memory or self._shape is None or set(self._addresses) != {"x", "y"}:
            return self._refuse("the context is not ready")
        addresses, size = dict(self._addresses), int(np.prod(self._shape))
        if _is_capturing(stream):
            if not self._settled or not self._engine.about.get("capturable", True):
                return self._refuse("this cannot be captured")
            captured.append(lambda: _compute(addresses, size))
            return True
        self._settled = True
        _compute(addresses, size)
        if self.profiler is not None:
            self.profiler.report_layer_time("layer/MatMul_myl0_0", 0.5)
        return True

    def _refuse(self, why: str) -> bool:
        self.error_recorder.report_error(ErrorCodeTRT.INVALID_ARGUMENT, why)
        return False


def _compute(addresses: dict[str, int], size: int) -> None:
    def at(name: str) -> np.ndarray[Any, Any]:
        return np.frombuffer((ctypes.c_float * size).from_address(addresses[name]), np.float32)

    at("y")[:] = 2 * at("x") + 1


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _on_gpu(address: int) -> bool:
    library = _driver()
    library.stand_in_kind.argtypes = [ctypes.c_void_p] * 3
    return bool(library.stand_in_kind(address, None, None) == 2)


def _is_capturing(stream: int) -> bool:
    library = _driver()
    library.stand_in_stream_capturing.argtypes = [ctypes.c_void_p]
    return bool(library.stand_in_stream_capturing(stream))
