"""An ONNX model as TensorRT's parser reads it: a strongly typed network, what it is fed, what it multiplies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorrt as trt

from attn_deploy.errors import AttnDeployError, UnavailableError, UsageError
from attn_deploy.runtimes.tensorrt_log import Messages, Recorder, failure, no_device, readable
from attn_deploy.runtimes.tensorrt_work import (
    Product,
    attention_work,
    convolution_work,
    deconvolution_work,
    product_work,
)
from attn_deploy.session import TensorSpec

_ERRORS_SHOWN = 5

_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
          "UINT8": "uint8", "BF16": "bfloat16"}  # fmt: skip


@dataclass(frozen=True)
class Parsed:
    """A network and what it needs to live: TensorRT's objects refer to each other."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    messages: Messages
    recorder: Recorder


def parse(model: bytes | Path, messages: Messages) -> Parsed:
    """Raises UnavailableError without a GPU, AttnDeployError that names the nodes which TensorRT does not take."""
    recorder = Recorder(messages)
    try:
        builder: trt.Builder = trt.Builder(messages)
    except TypeError as error:
        raise no_device(messages, error) from error
    builder.error_recorder = recorder
    network: trt.INetworkDefinition | None = builder.create_network(_network_flags())
    if network is None:
        raise failure("TensorRT cannot make a network", messages)
    parser: trt.OnnxParser = trt.OnnxParser(network, messages)
    if isinstance(model, Path):  # the parser looks beside the file for weights that are in files of their own
        if not model.is_file():
            raise UsageError("there is no such model file", got=str(model))
        accepted = parser.parse_from_file(str(model))
    else:
        accepted = parser.parse(model)
    if not accepted:
        raise _rejected(parser, messages, str(model) if isinstance(model, Path) else None)
    return Parsed(builder, network, parser, messages, recorder)


def _network_flags() -> int:
    """Types as the graph says, everywhere: 10.x would choose them by itself, 11 knows nothing else."""
    flag: trt.NetworkDefinitionCreationFlag | None = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _rejected(parser: trt.OnnxParser, messages: Messages, where: str | None) -> AttnDeployError:
    rows = []
    for index in range(parser.num_errors):
        error: trt.ParserError = parser.get_error(index)
        node = error.node_name() or f"node {error.node()}"
        rows.append(f"{node} ({error.node_operator() or 'unknown operator'}): {readable([error.desc()])}")
    parser.clear_errors()
    logged = messages.take_errors()
    shown = list(dict.fromkeys(rows))
    more = f"; and {len(shown) - _ERRORS_SHOWN} more" if len(shown) > _ERRORS_SHOWN else ""
    return AttnDeployError(
        f"TensorRT {trt.__version__} does not take the model",
        where=where,
        got="; ".join(shown[:_ERRORS_SHOWN]) + more if shown else readable(logged),
        next_step="export again with --target tensorrt on this version, or use --target onnxruntime-cuda",
    )


def network_specs(network: trt.INetworkDefinition) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs), with the dynamic dimensions named as in ONNX."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return tuple(_spec(t) for t in inputs), tuple(_spec(t) for t in outputs)


def _spec(tensor: trt.ITensor) -> TensorSpec:
    shape = tuple(
        size if size >= 0 else tensor.get_dimension_name(axis) or f"{tensor.name}.{axis}"
        for axis, size in enumerate(tensor.shape)
    )
    return TensorSpec(tensor.name, numpy_name(tensor.dtype), shape)


def numpy_name(dtype: trt.DataType) -> str:
    """NumPy's name of a TensorRT type; the type's own name in small letters where NumPy has none."""
    return _NUMPY.get(dtype.name, dtype.name.lower())


def require_inputs(network: trt.INetworkDefinition, specs: Sequence[TensorSpec]) -> None:
    """Raises UsageError: other inputs than the specs say, or one whose values decide about shapes."""
    names = [spec.name for spec in specs]
    found = [network.get_input(i).name for i in range(network.num_inputs)]
    if sorted(names) != sorted(found):
        raise UsageError("the model's inputs are not the bundle's", got=", ".join(found), expected=", ".join(names))
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise UsageError(
                f"the values of input {tensor.name!r} decide about shapes, which an engine cannot be built for here",
                got=tensor.name,
                next_step="use --target onnxruntime-cuda",
            )


FP8_SINCE = (8, 9)
"""The compute capability (Ada) whose tensor cores took up E4M3."""


def require_types(network: trt.INetworkDefinition, capability: str) -> None:
    """Raises UnavailableError for a network with FP8 on a GPU without it: TensorRT itself would only say that it found
    no implementation of a layer. `capability`: `9.0`."""
    if tuple(int(part) for part in capability.split(".")) >= FP8_SINCE:
        return
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        tensor: trt.ITensor | None = layer.get_output(0)
        if tensor is not None and tensor.dtype == trt.DataType.FP8:
            raise UnavailableError(
                "this GPU cannot compute in FP8", where=layer.name, got=f"compute capability {capability}",
                expected="8.9 (Ada) or later", next_step="use the variant in int8 or fp16",
            )  # fmt: skip


def products(network: trt.INetworkDefinition, shapes: Mapping[str, tuple[int, ...]]) -> list[Product]:
    """Matrix products, convolutions and attentions by ONNX node, with their multiply-adds at these input shapes.

    Types are not taken from here: what multiplies in which type is the engine's to say.
    """
    for index in range(network.num_inputs):
        tensor: trt.ITensor = network.get_input(index)
        tensor.shape = trt.Dims(shapes[tensor.name])
    found = []
    for index in range(network.num_layers):
        layer: trt.ILayer = network.get_layer(index)
        work = _work(layer)
        if work:
            found.append(Product(layer.metadata or layer.name, work))
    return found


def _work(layer: trt.ILayer) -> int:
    kind = layer.type
    if kind == trt.LayerType.MATRIX_MULTIPLY:
        return product_work(_shape(layer.get_input(0)), _shape(layer.get_output(0)))
    if kind == trt.LayerType.CONVOLUTION:
        convolution = _as_convolution(layer)
        kernel = tuple(convolution.kernel_size_nd)
        return convolution_work(_shape(layer.get_input(0)), _shape(layer.get_output(0)), kernel, convolution.num_groups)
    if kind == trt.LayerType.DECONVOLUTION:
        transposed = _as_deconvolution(layer)
        kernel = tuple(transposed.kernel_size_nd)
        return deconvolution_work(
            _shape(layer.get_input(0)), _shape(layer.get_output(0)), kernel, transposed.num_groups
        )
    attention: trt.LayerType | None = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if attention is not None and kind == attention:
        return attention_work(*(_shape(layer.get_input(i)) for i in range(3)))
    return 0


def _shape(tensor: trt.ITensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)


def _as_convolution(layer: trt.ILayer) -> trt.IConvolutionLayer:
    """The bindings give a layer out as its base class; its parameters are reached by naming its own."""
    layer.__class__ = trt.IConvolutionLayer
    return layer


def _as_deconvolution(layer: trt.ILayer) -> trt.IDeconvolutionLayer:
    layer.__class__ = trt.IDeconvolutionLayer
    return layer
