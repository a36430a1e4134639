"""Rows: operations that treat every vector along the last axis alone, and what can be moved across them.

A window attention reads [batch, tokens, channels] and what stands around it [batch, height, width, channels]. The rows
are the same, so LayerNormalization, linear layers and additions run on [batch, tokens, channels] throughout a stage and
the reshapes between them go; norm, linear layer and residual then read the same value and can become one operator.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attn_deploy.export.lower.cuda_nodes import constant_of, dims
from attn_deploy.export.precision.insert import Inserter

UNARY = frozenset({"Gelu", "Relu", "Sigmoid", "HardSwish", "HardSigmoid", "Swish", "Tanh", "Erf", "Identity"})
BINARY = frozenset({"Add", "Sub", "Mul", "Div"})


def row_operands(node: ir.Node) -> tuple[ir.Value, ...]:
    """The operands whose rows the node reads one by one, each of the result's shape but for the last axis; empty where
    the node is no such operation. What else it reads is constant and the same for every row."""
    if node.domain or not node.inputs or node.inputs[0] is None or any(o.uses() for o in node.outputs[1:]):
        return ()
    first = node.inputs[0]
    if node.op_type in UNARY:
        return (first,)
    if node.op_type == "LayerNormalization":
        return (first,) if normalizes_last_axis(node) else ()
    if node.op_type == "MatMul":
        return (first,) if first.const_value is None and _rank_of_constant(node.inputs[1]) == 2 else ()
    if node.op_type not in BINARY:
        return ()
    varying = [i for i in node.inputs if i is not None and constant_of(i) is None]
    vectors = [i for i in node.inputs if i is not None and constant_of(i) is not None]
    alike = all(dims(i) == dims(node.outputs[0]) and None not in dims(i) for i in varying)
    return tuple(varying) if varying and alike and all((_rank_of_constant(v) or 0) <= 1 for v in vectors) else ()


def normalizes_last_axis(norm: ir.Node) -> bool:
    x = norm.inputs[0]
    rank = len(x.shape) if x is not None and x.shape is not None else 0
    return rank > 0 and norm.attributes.get_int("axis", -1) in (-1, rank - 1)


def _rank_of_constant(value: ir.Value | None) -> int | None:
    held = constant_of(value)
    return None if held is None else held.ndim


class _Tokens:
    """Of values of rank 4 and more: the same rows as [batch, tokens, channels]."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.flat: dict[ir.Value, ir.Value] = {}

    def regroup(self, node: ir.Node) -> bool:
        """Takes note of a Reshape that keeps batch and channels, and drops one whose result is there already."""
        source, result = node.inputs[0], node.outputs[0]
        if node.op_type != "Reshape" or node.domain or source is None or not _same_rows(source, result):
            return False
        known = self.flat.get(source) or next((v for v in (source, result) if len(dims(v)) == 3), None)
        if known is None:
            return False
        if len(dims(result)) > 3:
            self.flat[result] = known
        elif known is result:
            self.flat[source] = result
        elif not result.is_graph_output():
            result.replace_all_uses_with(known)
        return True

    def flatten(self, node: ir.Node) -> None:
        """Lets an operation on rows of rank 4 and more run on [batch, tokens, channels]."""
        operands, result = row_operands(node), node.outputs[0]
        starts = node.op_type in ("LayerNormalization", "MatMul")
        if not (operands and _tokens(result) and (starts or any(o in self.flat for o in operands))):
            return
        if not all(_tokens(o) for o in operands):
            return
        for position, operand in enumerate(node.inputs):
            if operand is not None and operand in operands:
                node.replace_input_with(position, self._flattened(node, operand))
        restored = reshaped_behind(self.model, node, _tokens(result), [0, *_lengths(result)])
        self.flat[restored] = result

    def _flattened(self, reader: ir.Node, value: ir.Value) -> ir.Value:
        if value not in self.flat:
            shape = _tokens(value)
            insert = Inserter(self.model, reader, f"tokens_of_{value.name}")
            to = insert.constant("shape", np.array([0, *shape[1:]], np.int64))
            made = insert.op("Reshape", [value, to], dtype=value.dtype)
            made.shape = ir.Shape(shape)
            self.flat[value] = made
        return self.flat[value]


def keep_tokens_flat(model: ir.Model) -> None:
    """Operations on rows run on [batch, tokens, channels], in place; reshapes that this makes idle go."""
    tokens = _Tokens(model)
    for node in list(model.graph):
        if not tokens.regroup(node):
            tokens.flatten(node)
    for node in model.graph:
        _read_past_reshapes(node)
    RemoveUnusedNodesPass()(model)


def reshaped_behind(model: ir.Model, node: ir.Node, shape: tuple[int | str | None, ...], back: list[int]) -> ir.Value:
    """`node` now makes a value of `shape`; the Reshape of it to `back` behind it takes over name, shape and readers of
    what it made before."""
    made = node.outputs[0]
    restored = ir.Value(name=made.name, shape=made.shape, type=made.type)
    made.replace_all_uses_with(restored, replace_graph_outputs=True)
    made.name, made.shape = f"{made.name}/rows", ir.Shape(shape)
    to = Inserter(model, node, "back").constant("shape", np.array(back, np.int64))
    reshape = ir.node("Reshape", [made, to], outputs=[restored], name=f"{node.name}/Reshape")
    model.graph.insert_after(node, reshape)
    return restored


def _same_rows(source: ir.Value, result: ir.Value) -> bool:
    """A reshape between them keeps batch and channels: both are known, and of rank 3 and more."""
    before, after = dims(source), dims(result)
    return (
        min(len(before), len(after)) >= 3
        and before[0] == after[0] is not None
        and before[-1] == after[-1]
        and all(isinstance(d, int) for d in (*before[1:], *after[1:]))
    )


def _tokens(value: ir.Value) -> tuple[int | str | None, ...]:
    """The shape as [batch, tokens, channels]; empty for what has rank 3 or less, or lengths that are not known."""
    shape, lengths = dims(value), _lengths(value)
    if len(shape) < 4 or len(lengths) < len(shape) - 1:
        return ()
    return (shape[0], math.prod(lengths[:-1]), lengths[-1])


def _lengths(value: ir.Value) -> list[int]:
    """The known lengths behind the batch."""
    return [d for d in dims(value)[1:] if isinstance(d, int)]


def _read_past_reshapes(node: ir.Node) -> None:
    """A Reshape to a constant shape does not care how its operand was shaped; nor does one that copies the batch."""
    if node.op_type != "Reshape" or node.domain:
        return
    to, source = constant_of(node.inputs[1]), node.inputs[0]
    producer = source.producer() if source is not None else None
    if to is None or source is None or producer is None or producer.op_type != "Reshape" or producer.domain:
        return
    before = producer.inputs[0]
    copies = np.flatnonzero(to == 0).tolist()
    if before is not None and (not copies or (copies == [0] and dims(before)[:1] == dims(source)[:1] != [])):
        node.replace_input_with(0, before)
