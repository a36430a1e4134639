"""Linear layers that read the same values as one product: query, key and value, or the two halves of a gated MLP.

One product of [tokens, K] and [K, N1 + N2 + ...] fills a GPU where three of [K, N] do not, and three launches with
three additions behind them become three kernels in all: product, bias, Split. Each layer's result keeps its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes, constant_of


@dataclass(frozen=True)
class _Linear:
    """x [batch, ..., K] times `weight` [K, N], plus `bias` [N] if there is one; `last` makes the result."""

    product: ir.Node
    last: ir.Node
    weight: ir.Value
    bias: ir.Value | None

    @property
    def width(self) -> int:
        assert self.weight.shape is not None
        return int(self.weight.shape[1])  # type: ignore[arg-type]


def merge_linears(model: ir.Model, exclude: Sequence[str] = ()) -> int:
    """In place; layers below the module paths `exclude` stay apart. Returns how many products there are fewer."""
    groups: dict[tuple[ir.Value, str, bool], list[_Linear]] = {}
    for node in model.graph:
        linear = _linear(node)
        if linear is not None and not _excluded(node, exclude):
            x = node.inputs[0]
            assert x is not None
            groups.setdefault((x, _parent(node), linear.bias is not None), []).append(linear)
    merged = [_merge(model, group) for group in groups.values() if len(group) > 1]
    return sum(merged)


def _linear(node: ir.Node) -> _Linear | None:
    if node.op_type != "MatMul" or node.domain != "":
        return None
    x, weight = node.inputs
    if x is None or x.is_initializer() or weight is None or not weight.is_initializer() or weight.dtype != FLOAT:
        return None
    if weight.shape is None or len(weight.shape) != 2 or x.shape is None or len(x.shape) < 2:
        return None
    readers = [reader for reader, _ in node.outputs[0].uses()]
    if len(readers) == 1 and readers[0].op_type == "Add" and not node.outputs[0].is_graph_output():
        others = [i for i in readers[0].inputs if i is not node.outputs[0]]
        bias = others[0] if others else None
        if bias is not None and bias.is_initializer() and list(bias.shape or ()) == [weight.shape[1]]:
            return _Linear(node, readers[0], weight, bias)
    return _Linear(node, node, weight, None)


def _parent(node: ir.Node) -> str:
    """The module that the layer is in. Layers that read the same from afar (each decoder layer reads the encoder's
    result) stay apart: their results would all be kept until the last one is read."""
    return str(node.name).partition("/")[0].rpartition(".")[0]


def _excluded(node: ir.Node, exclude: Sequence[str]) -> bool:
    module = str(node.name).partition("/")[0]
    return any(module == path or module.startswith(f"{path}.") for path in exclude)


def _merge(model: ir.Model, group: Sequence[_Linear]) -> int:
    first = group[0].product
    nodes = Nodes(model, first)
    result = nodes.op("MatMul", [first.inputs[0], nodes.const(_joined([m.weight for m in group], axis=1))], dtype=FLOAT)
    biases = [m.bias for m in group if m.bias is not None]
    if biases:
        result = nodes.op("Add", [result, nodes.const(_joined(biases, axis=0))], dtype=FLOAT)
    parts = nodes.split(result, [m.width for m in group])
    for linear, part in zip(group, parts, strict=True):
        old = linear.last.outputs[0]
        name, shape = old.name, old.shape
        old.replace_all_uses_with(part, replace_graph_outputs=True)
        for node in dict.fromkeys((linear.last, linear.product)):
            model.graph.remove(node, safe=True)
        part.name, part.shape = name, shape
    return len(group) - 1


def _joined(values: Sequence[ir.Value], axis: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    arrays = [constant_of(value) for value in values]
    return np.concatenate([a for a in arrays if a is not None], axis=axis)
