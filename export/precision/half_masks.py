"""Mask constants: the hugely negative numbers that end in a softmax as weights of nothing.

-1e9, finfo.min or -inf say "not this one", not a number to compute with: they are clamped to what the type holds, and
the values that carry them have no range that matters.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.half_types import LARGEST, is_float
from attn_deploy.session import Array

MASKED_BELOW = -1e4
"""BERT's old masks are -10000; a trained bias is far from it."""

ADDITIVE_SHARE = 0.25
"""Of FP16's lowest number, for a mask that is added: three of them and a score of 512 still add up to something
finite, so that a row that is masked as a whole has a softmax. exp(-16376) is 0 in every type."""

_CARRIERS = frozenset(
    {"Where", "Add", "Mul", "Sub", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Slice", "Gather",
     "Concat", "Cast", "Identity", "Min", "Max", "Tile", "Flatten"}
)  # fmt: skip
_ENDS = frozenset({"Softmax", "LogSoftmax", "Attention", "MultiHeadAttention"})
_ADDING = frozenset({"Add", "Sub", "Attention", "MultiHeadAttention"})


@dataclass(frozen=True)
class Masks:
    """`constants`: where a mask constant is read (node, input). `values`: activations that carry one.
    `added`: those constants that are added to scores and not put in their place. `guarded`: those whose softmax is
    asked for NaN afterwards: there -inf means what it says."""

    constants: frozenset[tuple[ir.Node, int]]
    values: frozenset[ir.Value]
    added: frozenset[tuple[ir.Node, int]]
    guarded: frozenset[tuple[ir.Node, int]]

    def clamped(self, array: Array, use: tuple[ir.Node, int], half: ir.DataType) -> Array:
        """The mask constant of this use as the half type can hold it, still float32."""
        if use in self.guarded:
            return array
        share = ADDITIVE_SHARE if half == ir.DataType.FLOAT16 and use in self.added else 1.0
        return np.maximum(array, np.float32(-LARGEST[half] * share))


def find_masks(model: ir.Model) -> Masks:
    constants: set[tuple[ir.Node, int]] = set()
    added: set[tuple[ir.Node, int]] = set()
    guarded: set[tuple[ir.Node, int]] = set()
    values: set[ir.Value] = set()
    for value in model.graph.initializers.values():
        if not is_float(value) or value.const_value is None or not _is_mask(value.const_value.numpy()):
            continue
        for reader, index in value.uses():
            path, ends = _to_softmax(reader, index)
            if not ends:
                continue
            constants.add((reader, index))
            values.update(o for node in path - ends for o in node.outputs)
            if any(node.op_type in _ADDING for node in path):
                added.add((reader, index))
            if any(user.op_type == "IsNaN" for end in ends for user, _ in end.outputs[0].uses()):
                guarded.add((reader, index))
    return Masks(frozenset(constants), frozenset(values), frozenset(added), frozenset(guarded))


def _is_mask(array: Array) -> bool:
    """Nothing but small numbers and hugely negative ones."""
    if not array.size or np.isnan(array).any():
        return False
    masked = array <= MASKED_BELOW
    return bool(masked.any()) and bool((np.abs(array[~masked]) <= 512).all())


def _to_softmax(reader: ir.Node, index: int) -> tuple[set[ir.Node], set[ir.Node]]:
    """The nodes on the ways from a reader of a constant to softmaxes, and those softmaxes."""
    if reader.op_type in _ENDS:
        return ({reader}, {reader}) if index > 0 else (set(), set())
    if reader.op_type not in _CARRIERS:
        return set(), set()
    seen = {reader}
    ends: set[ir.Node] = set()
    pending = deque([reader])
    while pending:
        for user in {u for o in pending.popleft().outputs for u, _ in o.uses()}:
            if user.op_type in _ENDS:
                ends.add(user)
            elif user.op_type in _CARRIERS and user not in seen:
                seen.add(user)
                pending.append(user)
    path = set(ends)
    pending = deque(ends)
    while pending:
        for value in pending.popleft().inputs:
            producer = value.producer() if value is not None else None
            if producer in seen and producer not in path:
                path.add(producer)
                pending.append(producer)
    return path, ends
