"""Inserting named nodes and constants into an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from attn_deploy.session import Array


class Inserter:
    """Makes nodes in front of `anchor`; every name starts with the anchor's, so that profiles show where they belong.

    `part` keeps the names of several inserters at one anchor apart.
    """

    def __init__(self, model: ir.Model, anchor: ir.Node, part: str = "") -> None:
        self._model = model
        self._anchor = anchor
        self._prefix = f"{anchor.name}/{part}" if part else str(anchor.name)
        self._count = 0

    def op(
        self, operator: str, inputs: Sequence[ir.Value | None], *, domain: str = "", dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:  # fmt: skip
        """One node with one output."""
        self._count += 1
        name = f"{self._prefix}/{operator}_{self._count}"
        output = ir.Value(name=f"{name}_output", type=None if dtype is None else ir.TensorType(dtype))
        node = ir.node(operator, list(inputs), attributes, domain=domain, outputs=[output], name=name)
        self._model.graph.insert_before(self._anchor, node)
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        return output

    def constant(self, label: str, array: Array | np.generic) -> ir.Value:
        """An initializer named after the anchor."""
        name = f"{self._prefix}/{label}"
        if name in self._model.graph.initializers:
            return self._model.graph.initializers[name]
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
        self._model.graph.register_initializer(value)
        return value


def set_constant(model: ir.Model, node: ir.Node, index: int, array: Array) -> None:
    """Gives the node a constant of its own as input `index`, in place of the one it had, if any; that one goes where
    nothing else uses it. Weights that several nodes share are thus left to the others."""
    old = node.inputs[index] if index < len(node.inputs) else None
    name, number = f"{node.name}/constant_{index}", 1
    while name in model.graph.initializers:
        name, number = f"{node.name}/constant_{index}_{number}", number + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    model.graph.register_initializer(value)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None and not old.uses() and not old.is_graph_output():
        model.graph.initializers.pop(str(old.name), None)


def replace_node(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """`value` takes over the node's output, its name and its place among the model's outputs; the node goes."""
    old = node.outputs[0]
    name, shape, dtype = old.name, old.shape, old.type
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    value.name, value.shape, value.type = name, shape, dtype


def drop_unused_initializers(model: ir.Model) -> None:
    """Weights that were replaced would stay in the file."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
