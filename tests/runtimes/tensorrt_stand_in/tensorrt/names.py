"""TensorRT's enumerations and the classes that a caller derives from, as far as our code names them."""

from __future__ import annotations

import enum


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
    """The value is what ONNX calls the type (TensorProto.DataType)."""

    FLOAT, UINT8, INT8, INT32, INT64, BOOL, HALF, BF16, FP8 = 1, 2, 3, 6, 7, 9, 10, 16, 17


class LayerType(enum.Enum):
    CONVOLUTION, DECONVOLUTION, MATRIX_MULTIPLY, ATTENTION_INPUT, ELEMENTWISE = 0, 1, 2, 3, 4


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
