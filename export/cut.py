"""Parts of an ONNX model as models of their own, cut between values by name: nothing is added to the whole model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.session import Array
from attn_deploy.target import Precision


@dataclass(frozen=True)
class Part:
    """The nodes between some values and `result`, in graph order; `inputs` are the values that it is fed with."""

    result: ir.Value
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(str(i.name) for i in self.inputs)

    @property
    def arithmetic(self) -> Precision:
        """The coarsest that it computes in."""
        if any(is_integer(node.op_type) for node in self.nodes):
            return Precision.INT8
        types = {c.const_value.dtype for c in self.constants if c.const_value is not None}
        types |= {o.dtype for node in self.nodes for o in node.outputs}
        if ir.DataType.BFLOAT16 in types:
            return Precision.BF16
        return Precision.FP16 if ir.DataType.FLOAT16 in types else Precision.FP32


def is_integer(operator: str) -> bool:
    """Whether an operator of ONNX, ONNX Runtime or ours rounds to 8 bits or multiplies what was rounded."""
    return "Quantize" in operator or "Integer" in operator or operator.startswith(("QLinear", "MatMulNBits"))


class Cutter:
    """Cuts parts out of one model, which it leaves as it is."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._positions = {node: number for number, node in enumerate(model.graph)}

    def part(self, result: ir.Value, boundary: Collection[str], *, through: str | None = None) -> Part:
        """What `result` is computed with from the values named in `boundary` and the model's inputs; the one named
        `through` is computed although it is among them."""
        inputs: dict[ir.Value, None] = {}
        constants: dict[ir.Value, None] = {}
        nodes: set[ir.Node] = set()
        pending = [result]
        while pending:
            value = pending.pop()
            producer = value.producer()
            if value.is_initializer():
                constants[value] = None
            elif producer is None or (value is not result and value.name != through and value.name in boundary):
                inputs[value] = None
            elif producer not in nodes:
                nodes.add(producer)
                pending.extend(i for i in producer.inputs if i is not None)
        ordered = sorted(nodes, key=self._positions.__getitem__)
        return Part(result, tuple(ordered), tuple(inputs), tuple(constants))

    def model_of(self, part: Part, feeds: Mapping[str, Array]) -> bytes:
        """The part as a serialized model with one output. Types and shapes of its inputs are those of `feeds`; casts
        stand between where the part reads or makes them in half precision."""
        casts: list[ir.Node] = []
        copies: dict[ir.Value, ir.Value] = {}
        inputs: list[ir.Value] = []
        for value in part.constants:
            copies[value] = ir.Value(name=value.name, const_value=in_memory(value.const_value))
        for value in part.inputs:
            array = feeds[str(value.name)]
            kind = ir.TensorType(ir.DataType.from_numpy(np.asarray(array).dtype))
            fed = ir.Value(name=value.name, shape=ir.Shape(array.shape), type=kind)
            inputs.append(fed)
            copies[value] = _cast(fed, value.dtype, casts) if value.dtype in HALF and value.dtype != kind.dtype else fed
        nodes = [*casts, *(copied_node(node, copies) for node in part.nodes)]
        result = copies[part.result]
        result.type = result.type or ir.TensorType(ir.DataType.FLOAT)
        if result.dtype in HALF:
            after: list[ir.Node] = []
            result = _cast(result, ir.DataType.FLOAT, after)
            nodes += after
        graph = ir.Graph(
            inputs, [result], nodes=nodes, initializers=[copies[c] for c in part.constants],
            opset_imports=dict(self.model.graph.opset_imports), name="part",
        )  # fmt: skip
        functions = [f.clone() for f in self.model.functions.values()]
        whole = ir.Model(graph, ir_version=self.model.ir_version, functions=functions)
        return ir.to_proto(whole).SerializeToString()


HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _cast(value: ir.Value, dtype: ir.DataType | None, made: list[ir.Node]) -> ir.Value:
    """The value in another type; its node is added to `made`."""
    assert dtype is not None
    output = ir.Value(name=f"{value.name}/{dtype}", shape=value.shape, type=ir.TensorType(dtype))
    made.append(
        ir.Node(
            "", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=f"{value.name}/{dtype}/Cast"
        )
    )
    return output


def in_memory(tensor: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """A model given as bytes cannot refer to a file beside it."""
    return ir.tensor(tensor.numpy(), name=tensor.name) if isinstance(tensor, ir.ExternalTensor) else tensor


def copied_node(node: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Node:
    """The node upon the copies of what it reads; its outputs are added to them."""
    outputs = []
    for output in node.outputs:
        copies[output] = ir.Value(name=output.name, shape=output.shape, type=output.type)
        outputs.append(copies[output])
    inputs = [None if i is None else copies[i] for i in node.inputs]
    attributes = list(node.attributes.values())
    return ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=node.name)
