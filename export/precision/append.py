"""Adding nodes, constants and outputs at the end of a copied graph: what is measured beside a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.session import Array


def observed_copy(model: ir.Model) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy without outputs, and its activations and inputs by name: to be given what is observed as outputs."""
    copy = model.clone()
    values = {str(o.name): o for node in copy.graph for o in node.outputs}
    values |= {str(i.name): i for i in copy.graph.inputs}
    copy.graph.outputs.clear()
    return copy, values


class Appender:
    """Every name starts with `prefix`. A label that was used gives the constant that it named before."""

    def __init__(self, model: ir.Model, prefix: str) -> None:
        self._graph = model.graph
        self._prefix = prefix

    def constant(self, label: str, array: Array | np.generic) -> ir.Value:
        name = f"{self._prefix}/{label}"
        if name not in self._graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def op(
        self, operator: str, *inputs: ir.Value | None, attributes: Sequence[ir.Attr] = (), **named: int | str
    ) -> ir.Value:
        """One node with one output."""
        name = f"{self._prefix}/{operator}_{len(self._graph)}"
        known = [ir.AttrString(k, v) if isinstance(v, str) else ir.AttrInt64(k, v) for k, v in named.items()]
        node = ir.Node("", operator, list(inputs), [*attributes, *known], name=name)
        node.outputs[0].name = f"{name}_output"
        self._graph.append(node)
        return node.outputs[0]

    def output(self, name: str, value: ir.Value, *, rank: int = 0, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        """ONNX wants a shape of what a model gives; the sizes may stay open."""
        value.name, value.shape, value.type = name, ir.Shape([None] * rank), ir.TensorType(dtype)
        self._graph.outputs.append(value)
