"""A model run in stretches over a few batches: from one value to the next, holding what the rest still reads.

Who changes a layer by what it gives, and then wants to see the next one, would otherwise run all that is before each
layer again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from attn_deploy.export.cut import copied_node, in_memory
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.session import Array


class Stretches:
    """`batches`: feeds of the whole model; they are held. Nodes of `model` that were run are not run again: what is
    changed in them later is the caller's to add (`held`)."""

    def __init__(self, model: ir.Model, batches: Iterable[Mapping[str, Array]], open_model: OpenModel) -> None:
        self._model = model
        self._open_model = open_model
        self._positions = {node: number for number, node in enumerate(model.graph)}
        self._done: set[ir.Node] = set()
        inputs = {str(value.name): value for value in model.graph.inputs}
        self._held = [{inputs[n]: np.asarray(array) for n, array in feeds.items() if n in inputs} for feeds in batches]

    def run_to(self, value: ir.Value) -> list[Array]:
        """The value for each batch."""
        if not self._held or value in self._held[0]:
            return [held[value] for held in self._held]
        nodes = self._before(value)
        self._done.update(nodes)
        made = [output for node in nodes for output in node.outputs]
        kept = [v for v in made if v is value or self._is_read(v)]
        read = {i for node in nodes for i in node.inputs if i is not None and i in self._held[0]}
        run = self._open_model(self._stretch(nodes, read, kept))
        for held in self._held:
            outputs = run({str(v.name): held[v] for v in read})
            held.update({v: outputs[str(v.name)] for v in kept})
            for old in [v for v in held if v is not value and not self._is_read(v)]:
                del held[old]
        return [held[value] for held in self._held]

    def replace(self, value: ir.Value, arrays: Iterable[Array]) -> None:
        """What the rest shall read as `value`, for each batch."""
        for held, array in zip(self._held, arrays, strict=True):
            held[value] = array

    def _before(self, value: ir.Value) -> list[ir.Node]:
        """What is not held and the value follows from, in graph order."""
        found: set[ir.Node] = set()
        pending = [value]
        while pending:
            current = pending.pop()
            node = current.producer()
            if node is not None and current not in self._held[0] and node not in found:
                found.add(node)
                pending.extend(i for i in node.inputs if i is not None)
        return sorted(found, key=self._positions.__getitem__)

    def _is_read(self, value: ir.Value) -> bool:
        return any(user not in self._done for user, _ in value.uses())

    def _stretch(self, nodes: list[ir.Node], read: Iterable[ir.Value], kept: Iterable[ir.Value]) -> ir.Model:
        copies: dict[ir.Value, ir.Value] = {}
        for value in read:
            dtype = ir.DataType.from_numpy(self._held[0][value].dtype)
            copies[value] = ir.Value(name=value.name, type=ir.TensorType(dtype))
        inputs = list(copies.values())
        constants = {i: None for node in nodes for i in node.inputs if i is not None and i.is_initializer()}
        for value in constants:
            copies[value] = ir.Value(name=value.name, const_value=in_memory(value.const_value))
        made = [copied_node(node, copies) for node in nodes]
        graph = ir.Graph(
            inputs, [copies[v] for v in kept], nodes=made, initializers=[copies[c] for c in constants],
            opset_imports=dict(self._model.graph.opset_imports), name="stretch",
        )  # fmt: skip
        functions = [f.clone() for f in self._model.functions.values()]
        return ir.Model(graph, ir_version=self._model.ir_version, functions=functions)
