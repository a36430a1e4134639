"""Normalizations that are written out made whole: LayerNormalization and RMSNormalization as one node each.

In half precision the written-out forms overflow in their squares, and TensorRT has kernels for the whole ones.
LayerNorm: Ba et al. 2016, equation 4. RMSNorm: Zhang and Sennrich 2019, equation 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.insert import Inserter, replace_node
from attn_deploy.session import Array


@dataclass(frozen=True)
class _Root:
    """`divisor` = sqrt(mean(term^2) + epsilon) over the last axis."""

    term: ir.Value
    epsilon: float


def whole_norms(model: ir.Model, *, rms: bool) -> int:
    """Replaces what is written out, in place, and returns how many there were. `rms`: RMSNormalization is there, which
    opset 23 has."""
    count = 0
    for node in list(model.graph):
        quotient = _quotient(node)
        if quotient is None:
            continue
        term, root = quotient
        source = _centred_source(term)
        if root.term is not term or (source is None and not rms):
            continue
        count += _replace(model, node, "RMSNormalization" if source is None else "LayerNormalization", root, source)
    return count


def _replace(model: ir.Model, quotient: ir.Node, operator: str, root: _Root, source: ir.Value | None) -> bool:
    """With the constant weight and bias behind, which both operators ask for."""
    scaled = _only_reader(quotient.outputs[0], "Mul")
    length = _last_dim(root.term)
    weight = None if scaled is None else _vector(scaled, quotient.outputs[0], length)
    if scaled is None or weight is None:
        return False
    last, bias = scaled, None
    if operator == "LayerNormalization":
        shifted = _only_reader(scaled.outputs[0], "Add")
        bias = None if shifted is None else _vector(shifted, scaled.outputs[0], length)
        last = shifted if shifted is not None and bias is not None else scaled
    insert = Inserter(model, last)
    operands = [root.term if source is None else source, _flat(insert, "weight", weight)]
    if bias is not None:
        operands.append(_flat(insert, "bias", bias))
    whole = insert.op(
        operator, operands, dtype=root.term.dtype, axis=-1, epsilon=root.epsilon, stash_type=int(ir.DataType.FLOAT)
    )
    replace_node(model, last, whole)
    return True


def _flat(insert: Inserter, label: str, value: ir.Value) -> ir.Value:
    """The weight as a vector: it may be [1, 1, channels]."""
    assert value.const_value is not None
    if len(value.const_value.shape) == 1:
        return value
    return insert.constant(label, value.const_value.numpy().reshape(-1))


def _quotient(node: ir.Node) -> tuple[ir.Value, _Root] | None:
    """term / root, or term * (1 / root)."""
    if node.op_type not in ("Div", "Mul"):
        return None
    pairs = [(node.inputs[0], node.inputs[1])]
    if node.op_type == "Mul":
        pairs.append((node.inputs[1], node.inputs[0]))
    for term, divisor in pairs:
        if node.op_type == "Mul":
            divisor = _input_of(divisor, "Reciprocal")
        root = _root(divisor)
        if term is not None and root is not None:
            return term, root
    return None


def _root(divisor: ir.Value | None) -> _Root | None:
    total = _made_by(_input_of(divisor, "Sqrt"), "Add")
    if total is None:
        return None
    for mean_value, epsilon_value in (total.inputs, reversed(total.inputs)):
        mean, epsilon = _made_by(mean_value, "ReduceMean"), _scalar(epsilon_value)
        if mean is None or epsilon is None or not epsilon > 0 or not _over_last(mean):
            continue
        square = mean.inputs[0]
        producer = square.producer() if square is not None else None
        if producer is None or len(producer.inputs) != 2:
            continue
        base, other = producer.inputs
        squared = (producer.op_type == "Pow" and _scalar(other) == 2.0) or (producer.op_type == "Mul" and base is other)
        if squared and base is not None:
            return _Root(base, epsilon)
    return None


def _centred_source(term: ir.Value) -> ir.Value | None:
    """x of x - mean(x)."""
    difference = _made_by(term, "Sub")
    if difference is None:
        return None
    source, mean_value = difference.inputs
    mean = _made_by(mean_value, "ReduceMean")
    return source if mean is not None and mean.inputs[0] is source and _over_last(mean) else None


def _over_last(mean: ir.Node) -> bool:
    source = mean.inputs[0]
    axes = mean.inputs[1].const_value if len(mean.inputs) > 1 and mean.inputs[1] is not None else None
    if source is None or source.shape is None or axes is None or not mean.attributes.get_int("keepdims", 1):
        return False
    return axes.numpy().ravel().tolist() in ([-1], [len(source.shape) - 1])


def _vector(node: ir.Node, besides: ir.Value, length: int | None) -> ir.Value | None:
    """The constant operand of `node` that has an entry for each channel of the last axis."""
    others = [v for v in node.inputs if v is not besides]
    held = others[0].const_value if len(others) == 1 and others[0] is not None else None
    if held is None or length is None or held.dtype != ir.DataType.FLOAT:
        return None
    shape = tuple(int(d) for d in held.shape)
    return others[0] if shape and shape[-1] == length and int(np.prod(shape)) == length else None


def _last_dim(value: ir.Value) -> int | None:
    dim = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return dim if isinstance(dim, int) else None


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0][0] if uses[0][0].op_type == operator else None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == operator and not producer.domain else None


def _input_of(value: ir.Value | None, operator: str) -> ir.Value | None:
    node = _made_by(value, operator)
    return None if node is None else node.inputs[0]


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    array: Array = value.const_value.numpy()
    return float(array.reshape(()))
