"""An ONNX graph that is rewritten in place: who makes a value, who reads it, and what it looks like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attn_deploy.session import Array

if TYPE_CHECKING:
    import onnx

NCHWC = "com.microsoft.nchwc"
MICROSOFT = "com.microsoft"
OURS = "attn_deploy"

Dims = tuple[int | str, ...]

_MADE = "/blocked/"
"""Stands in the names of nodes that were added, after the name of the node that they were made from."""


class Graph:
    """The main graph of a model that ONNX Runtime saved: no subgraph reads its values, and every shape is inferred.

    Nodes that are added may stand anywhere; `finish` orders them and drops what nothing reads.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._shapes = {value.name: _dims(value) for value in values}
        self._producer: dict[str, onnx.NodeProto] = {}
        self._consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.nodes:
            self._connect(node)
        self._names = {*self._shapes, *self._initializers, *self._producer}

    def producer(self, value: str) -> onnx.NodeProto | None:
        return self._producer.get(value)

    def consumers(self, value: str) -> list[onnx.NodeProto]:
        return list(self._consumers.get(value, ()))

    def only_consumer(self, value: str) -> onnx.NodeProto | None:
        """The node that alone reads the value; None when there are several, or it is an output of the graph."""
        readers = self._consumers.get(value, ())
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def shape(self, value: str) -> Dims | None:
        """Its dims, a symbolic one by its name; None where they are not known."""
        if value in self._initializers:
            return tuple(self._initializers[value].dims)
        return self._shapes.get(value)

    def set_shape(self, value: str, dims: Dims) -> None:
        self._shapes[value] = dims

    def constant(self, value: str) -> Array | None:
        """An initializer's content."""
        from onnx import numpy_helper

        tensor = self._initializers.get(value)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def constant_shape(self, value: str) -> tuple[int, ...] | None:
        """Of an initializer; None for any other value."""
        tensor = self._initializers.get(value)
        return None if tensor is None else tuple(tensor.dims)

    def add_constant(self, content: Array, like: str) -> str:
        """A new initializer named after `like`."""
        from onnx import numpy_helper

        name = self._fresh(like)
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(content), name)
        return name

    def add(
        self, operator: str, inputs: Sequence[str], *, name: str, domain: str, shapes: Sequence[Dims | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[str, ...]:  # fmt: skip
        """A new node; its outputs, one for each shape. Trailing inputs that are absent ("") are left out."""
        from onnx import helper

        inputs = list(inputs)
        while inputs and not inputs[-1]:
            inputs.pop()
        name = f"{name.partition(_MADE)[0].rstrip('/')}{_MADE}{operator}"
        outputs = [self._fresh(name) for _ in shapes]
        node = helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **(attributes or {}))
        for output, dims in zip(outputs, shapes, strict=True):
            if dims is not None:
                self._shapes[output] = dims
        self.nodes.append(node)
        self._connect(node)
        return tuple(outputs)

    def replace(self, value: str, by: str) -> None:
        """Whoever reads `value` reads `by` from now on. An output of the graph keeps its name: `by` must not be needed
        under its own."""
        assert value not in self.outputs, value
        for node in self.consumers(value):
            self.redirect(node, value, by)

    def redirect(self, node: onnx.NodeProto, value: str, by: str) -> None:
        """One reader of `value` reads `by`."""
        for index, name in enumerate(node.input):
            if name == value:
                node.input[index] = by
        self._consumers[value] = [n for n in self._consumers[value] if n is not node]
        self._consumers[by].append(node)

    def remove(self, node: onnx.NodeProto) -> None:
        """A node whose outputs nothing reads any more."""
        assert not any(self._consumers.get(o) or o in self.outputs for o in node.output), node.name
        self.nodes = [n for n in self.nodes if n is not node]
        for value in set(node.input):
            self._consumers[value] = [n for n in self._consumers[value] if n is not node]
        for value in node.output:
            self._producer.pop(value, None)

    def drop_dead(self) -> int:
        """Removes nodes that nothing reads; returns how many."""
        dropped = 0
        while dead := [n for n in self.nodes if not any(self._consumers.get(o) or o in self.outputs for o in n.output)]:
            for node in dead:
                self.remove(node)
            dropped += len(dead)
        return dropped

    def finish(self) -> onnx.ModelProto:
        """The model with ordered nodes, without dead ones, with the initializers that are still read."""
        self.drop_dead()
        graph = self.model.graph
        ordered = self._ordered()
        used = {name for node in ordered for name in node.input}
        del graph.node[:]
        graph.node.extend(ordered)
        del graph.initializer[:]
        graph.initializer.extend(t for name, t in self._initializers.items() if name in used or name in self.outputs)
        del graph.value_info[:]
        return self.model

    def _ordered(self) -> list[onnx.NodeProto]:
        """Kahn's order, which keeps the given one where it is free to."""
        waiting = {id(n): sum(i in self._producer for i in set(n.input)) for n in self.nodes}
        ready = [n for n in self.nodes if not waiting[id(n)]]
        ordered: list[onnx.NodeProto] = []
        while ready:
            node = ready.pop(0)
            ordered.append(node)
            for value in node.output:
                for reader in self._consumers.get(value, ()):
                    waiting[id(reader)] -= 1
                    if not waiting[id(reader)]:
                        ready.append(reader)
        assert len(ordered) == len(self.nodes), "the rewritten graph has a cycle"
        return ordered

    def _connect(self, node: onnx.NodeProto) -> None:
        for value in set(node.input):
            if value:
                self._consumers[value].append(node)
        for value in node.output:
            if value:
                self._producer[value] = node

    def _fresh(self, wish: str) -> str:
        name, number = wish, 1
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value: int, float, str or a list of ints or floats."""
    from onnx import helper

    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """All of a node's attributes by name."""
    return {item.name: attribute(node, item.name) for item in node.attribute}


def is_a(node: onnx.NodeProto | None, domain: str, *operators: str) -> bool:
    return node is not None and node.op_type in operators and node.domain in ((domain,) if domain else ("", "ai.onnx"))


def other_input(node: onnx.NodeProto, value: str) -> str | None:
    """The operand of a binary node that is not `value`; None when both are."""
    others = [name for name in node.input if name != value]
    return others[0] if len(others) == 1 else None


def _dims(value: onnx.ValueInfoProto) -> Dims | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in kind.shape.dim)


def has_subgraphs(nodes: Iterable[onnx.NodeProto]) -> bool:
    from onnx import AttributeProto

    kinds = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    return any(a.type in kinds for node in nodes for a in node.attribute)
