"""Which parts of a model are alike: the same operators on the same shapes, as ViT's twelve layers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import onnx_ir as ir


class Part(Protocol):
    """Some nodes of a model, by name, and the ways in which they can run."""

    @property
    def nodes(self) -> tuple[str, ...]: ...
    @property
    def levels(self) -> tuple[str, ...]: ...


AnyPart = TypeVar("AnyPart", bound=Part)


def alike(model: ir.Model, parts: Sequence[AnyPart]) -> list[tuple[AnyPart, ...]]:
    """Parts that take the same time by all that the model shows, together; both in the order of the first."""
    nodes = {str(node.name): node for node in model.graph}
    groups: dict[object, list[AnyPart]] = {}
    for part in parts:
        key = (part.levels, tuple(_key(nodes[name]) for name in part.nodes if name in nodes))
        groups.setdefault(key, []).append(part)
    return [tuple(group) for group in groups.values()]


def _key(node: ir.Node) -> object:
    """Operator, sizes and numbers of a node: not its values."""
    numbers = (ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.FLOAT, ir.AttributeType.STRING)
    attributes = sorted((a.name, str(a.value)) for a in node.attributes.values() if a.type in numbers)
    shapes = tuple(None if v is None or v.shape is None else str(v.shape) for v in (*node.inputs, *node.outputs))
    return node.domain, node.op_type, tuple(attributes), shapes
