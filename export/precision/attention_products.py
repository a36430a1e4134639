"""The two matrix products of an attention that is written out in a graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.precision.plan import weight_of


@dataclass(frozen=True)
class AttentionProducts:
    """The two products of an attention that is written out: scores = first(query, key), result = second(weights,
    value)."""

    first: ir.Node
    second: ir.Node


_TO_SCORES = frozenset({"Add", "Mul", "Div", "Where", "Tanh", "Identity"})


def attention_products(model: ir.Model) -> list[AttentionProducts]:
    """Every MatMul - Softmax - MatMul whose products have no constant operand."""
    found = []
    for node in model.graph:
        if node.op_type == "Softmax":
            first, second = _before(node), _behind(node)
            if first is not None and second is not None:
                found.append(AttentionProducts(first, second))
    return found


def _before(softmax: ir.Node) -> ir.Node | None:
    pending = [softmax]
    seen: set[ir.Node] = set()
    while pending:
        for value in pending.pop(0).inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            if producer.op_type == "MatMul" and weight_of(producer) is None:
                return producer
            if producer.op_type in _TO_SCORES:
                pending.append(producer)
    return None


def _behind(softmax: ir.Node) -> ir.Node | None:
    value = softmax.outputs[0]
    for _ in range(3):
        readers = [user for user, _ in value.uses() if user.op_type in ("MatMul", "Where", "Identity")]
        if len(readers) != 1:
            return None
        if readers[0].op_type == "MatMul":
            return readers[0] if readers[0].inputs[0] is value else None
        value = readers[0].outputs[0]
    return None
