"""ONNX -> network: the parser, and the layers that it makes of nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from tensorrt.faults import told
from tensorrt.graph import Graph, dims
from tensorrt.names import DataType, Dims, LayerType, NetworkDefinitionCreationFlag

_LAYERS = {"MatMul": LayerType.MATRIX_MULTIPLY, "Gemm": LayerType.MATRIX_MULTIPLY, "Conv": LayerType.CONVOLUTION,
           "ConvTranspose": LayerType.DECONVOLUTION, "Attention": LayerType.ATTENTION_INPUT}  # fmt: skip


class Tensor:
    """An input or output of a network, or an operand of a layer."""

    is_shape_tensor = False

    def __init__(self, name: str, dtype: DataType, shape: tuple[int, ...], dimensions: tuple[str | None, ...]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self._dimensions = dimensions

    def get_dimension_name(self, axis: int) -> str | None:
        return self._dimensions[axis]


class ILayer:
    """What the bindings give out for any layer: its parameters are its own class's."""

    def __init__(self, network: Network, node: onnx.NodeProto) -> None:
        self._network, self._node = network, node
        self.name, self.metadata = node.name, f"[ONNX Layer: {node.name}]"
        self.type = _LAYERS.get(node.op_type, LayerType.ELEMENTWISE)

    def get_input(self, index: int) -> Tensor | None:
        names = self._node.input
        return self._network.tensor(names[index]) if index < len(names) and names[index] else None

    def get_output(self, index: int) -> Tensor | None:
        return self._network.tensor(self._node.output[index])


class IConvolutionLayer(ILayer):
    @property
    def kernel_size_nd(self) -> Dims:
        return Dims(self._attributes["kernel_shape"])

    @property
    def num_groups(self) -> int:
        return int(self._attributes.get("group", 1))

    @property
    def _attributes(self) -> dict[str, Any]:
        return {a.name: onnx.helper.get_attribute_value(a) for a in self._node.attribute}


class IDeconvolutionLayer(IConvolutionLayer): ...


class Network:
    def __init__(self, flags: int) -> None:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED, "the network is weakly typed"
        self.graph: Graph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def fill(self, graph: Graph) -> None:
        """Only inputs have names of their dimensions (NvInfer.h, ITensor::setDimensionName)."""
        self.graph = graph
        self._inputs = [_tensor(name, t, named=True) for name, t in graph.inputs.items()]
        self._outputs = [_tensor(name, t, named=False) for name, t in graph.outputs.items()]

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        return len(self._nodes)

    @property
    def _nodes(self) -> list[onnx.NodeProto]:
        return [] if self.graph is None else list(self.graph.model.graph.node)

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    def get_layer(self, index: int) -> ILayer:
        return ILayer(self, self._nodes[index])

    def tensor(self, name: str) -> Tensor:
        """A value at the shapes that the inputs have now."""
        assert self.graph is not None
        dtype, shape = self.graph.values({t.name: tuple(t.shape) for t in self._inputs})[name]
        return Tensor(name, DataType(onnx.helper.np_dtype_to_tensor_dtype(dtype)), shape, (None,) * len(shape))


def _tensor(name: str, tensor: onnx.TypeProto.Tensor, *, named: bool) -> Tensor:
    sizes = dims(tensor)
    shape = tuple(-1 if isinstance(size, str) else size for size in sizes)
    names = tuple(size if named and isinstance(size, str) else None for size in sizes)
    return Tensor(name, DataType(tensor.elem_type), shape, names)


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
    """Takes what ONNX Runtime's CPU provider takes."""

    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network
        self._errors: list[list[str]] = []

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def parse(self, content: bytes) -> bool:
        return self._parse(onnx.load_from_string(content))

    def parse_from_file(self, path: str) -> bool:
        return self._parse(onnx.load(Path(path)))

    def _parse(self, model: onnx.ModelProto) -> bool:
        graph = Graph(model)
        self._errors = told(model).get("errors", [])
        if not self._errors:
            try:
                _ = graph.session
            except Exception as error:  # ONNX Runtime's classes share no other base
                self._errors = [["", "", str(error)]]
        self._network.fill(graph)
        return not self._errors

    def set_flag(self, flag: Any) -> None: ...

    def get_error(self, index: int) -> ParserError:
        return ParserError(self._errors[index])

    def clear_errors(self) -> None:
        self._errors = []
