"""A head that reads one token of the last layer: what that layer computes row by row is computed for that token alone.

A classifier on the class token of a Vision Transformer (Dosovitskiy et al. 2021, section 3.1) leaves the results of the
last feed-forward block for every other token unread. Gather and the operations on rows in front of it change places.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attn_deploy.export.lower.cpu_rows import row_operands
from attn_deploy.export.lower.cuda_nodes import constant_of, dims

MOST_TOKENS = 4
"""A Gather of more is no choice of class tokens."""


def select_rows_early(model: ir.Model) -> int:
    """In place; returns how many operations are done on the chosen tokens alone."""
    moved = 0
    while any(_moved(model, node) for node in model.graph if _chooses_tokens(node)):
        moved += 1
    RemoveUnusedNodesPass()(model)
    return moved


def _chooses_tokens(node: ir.Node) -> bool:
    """A Gather of a few constant positions along the tokens of [batch, tokens, channels]."""
    if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 1:
        return False
    value, index = node.inputs[0], constant_of(node.inputs[1])
    few = index is not None and index.ndim < 2 and index.size <= MOST_TOKENS
    return few and value is not None and len(dims(value)) == 3


def _moved(model: ir.Model, gather: ir.Node) -> bool:
    """The Gather and the operation that makes what it reads change places, if nothing else reads that."""
    value = gather.inputs[0]
    assert value is not None
    producer = value.producer()
    twins = [reader for reader, _ in value.uses()]
    if producer is None or value.is_graph_output() or not all(_same_choice(gather, twin) for twin in twins):
        return False
    operands = row_operands(producer)
    if not operands or any(len(dims(operand)) != 3 for operand in operands):
        return False
    chosen = {operand: _gather_before(model, gather, producer, operand) for operand in dict.fromkeys(operands)}
    inputs = [chosen.get(i, i) if i is not None else None for i in producer.inputs]
    attributes = [a for a in producer.attributes.values() if a.name != "axis"]
    attributes += [ir.AttrInt64("axis", -1)] if "axis" in producer.attributes else []
    result = gather.outputs[0]
    made = ir.Value(name=result.name, shape=result.shape, type=result.type)
    node = ir.Node(producer.domain, producer.op_type, inputs, attributes, outputs=[made], name=producer.name)
    node.metadata_props.update(producer.metadata_props)
    model.graph.insert_before(gather, node)
    for twin in twins:
        twin.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
        model.graph.remove(twin, safe=True)
    model.graph.remove(producer, safe=True)
    return True


def _same_choice(one: ir.Node, other: ir.Node) -> bool:
    if not _chooses_tokens(other):
        return False
    first, second = constant_of(one.inputs[1]), constant_of(other.inputs[1])
    return first is not None and second is not None and np.array_equal(first, second)


def _gather_before(model: ir.Model, gather: ir.Node, producer: ir.Node, operand: ir.Value) -> ir.Value:
    index = constant_of(gather.inputs[1])
    assert index is not None
    batch, _, channels = dims(operand)
    shape = ir.Shape([batch, *index.shape, channels])
    made = ir.Value(name=f"{operand.name}/chosen_{producer.name}", shape=shape, type=operand.type)
    name = f"{producer.name}/Gather_{list(producer.inputs).index(operand)}"
    model.graph.insert_before(
        producer, ir.node("Gather", [operand, gather.inputs[1]], {"axis": 1}, outputs=[made], name=name)
    )
    return made
