"""A made TensorRT for the calls around it: it keeps the rules that a caller must keep (profile, memory, shapes, aligned
addresses in GPU memory, one enqueue before a capture) and refuses, as TensorRT does, by False or None.

Its engines compute the ONNX model they were parsed from, by ONNX Runtime's CPU provider, on the memory of the made GPU
of `cuda_stand_ins`, which is the host's. Their layers are the model's nodes, one each: nothing is fused but Attention,
and nothing is chosen by time. So it shows that what is built, bound, run and read back belongs together, and nothing of
what NVIDIA's builder makes of a graph.

`import tensorrt` finds it where this folder's parent is on the path, `cuda_stand_ins.run_python` runs such a process.
Models and the environment tell it what to do wrong (`faults.py`). That its names are TensorRT's is what
tests/runtimes/tensorrt/test_api.py checks, with the real bindings.
"""

from __future__ import annotations

from tensorrt.build import Builder, BuilderConfig, OptimizationProfile, TimingCache, built
from tensorrt.engine import ACTIVATION_BYTES, ALIGNMENT, Context, Engine, Inspector, Runtime
from tensorrt.names import (
    BuilderFlag,
    DataType,
    Dims,
    ErrorCodeTRT,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    IErrorRecorder,
    ILogger,
    IProfiler,
    IProgressMonitor,
    LayerInformationFormat,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    ProfilingVerbosity,
    Severity,
)
from tensorrt.network import (
    IConvolutionLayer,
    IDeconvolutionLayer,
    ILayer,
    Network,
    OnnxParser,
    ParserError,
    Tensor,
)
from tensorrt.plan import VERSION, plan

__version__ = ".".join(map(str, VERSION))

__all__ = [
    "ACTIVATION_BYTES", "ALIGNMENT", "Builder", "BuilderConfig", "BuilderFlag", "Context", "DataType", "Dims", "Engine",
    "ErrorCodeTRT", "ExecutionContextAllocationStrategy", "HardwareCompatibilityLevel", "IConvolutionLayer",
    "IDeconvolutionLayer", "IErrorRecorder", "ILayer", "ILogger", "IProfiler", "IProgressMonitor", "Inspector",
    "LayerInformationFormat", "LayerType", "MemoryPoolType", "Network", "NetworkDefinitionCreationFlag", "OnnxParser",
    "OnnxParserFlag", "OptimizationProfile", "ParserError", "ProfilingVerbosity", "Runtime", "Severity", "Tensor",
    "TimingCache", "built", "plan",
]  # fmt: skip
