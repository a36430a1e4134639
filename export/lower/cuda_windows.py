"""Windowed attention (PackedAttentionIndexed...) as Gathers around one fused operator.

Each of query, key and value is gathered window by window by constant positions, straight from the packed tensor, and
one Gather by the inverse map writes back. Nothing is transposed, and no shape depends on the batch:

- windows that share one bias go into the batch: [batch * windows, length, heads * head_dim], bias [1, heads, ...];
- windows with biases of their own (shifted windows) go into the heads: [batch, length, windows * heads * head_dim],
  bias [1, windows * heads, length, keys], a constant that broadcasts over the batch. An attention treats heads alone,
  so that is the same. Where that makes more than MAX_HEADS, the bias is repeated for the batch instead.

With a bias, keys that nobody sees fill a window up to a multiple of 8 (7 x 7 = 49 becomes 56), since memory-efficient
kernels read the bias in aligned pieces; in MultiHeadAttention the queries as well, whose results nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes, constant_of
from attn_deploy.export.lower.cuda_operator import KERNEL_MULTIPLE, MAX_HEADS, Call, NotFused
from attn_deploy.export.lower.cuda_packed import Packed
from attn_deploy.export.lower.cuda_scores import padded_array
from attn_deploy.session import Array


@dataclass(frozen=True)
class Windows:
    """`index` [windows, length]: token numbers, -1 for padding. `queries` and `keys` [windows, query_len or key_len]
    are what is gathered, with what fills up the windows. `in_heads`: windows stand in the heads, else in the batch."""

    index: Array
    queries: Array
    keys: Array
    tokens: int
    in_heads: bool


def plan(node: ir.Node, inputs: dict[str, ir.Value], heads: int) -> Windows | NotFused:
    """Without what fills up the queries, which only one of the operators needs."""
    index = constant_of(inputs["index"])
    which = constant_of(inputs["bias_index"]) if "bias_index" in inputs else None
    if index is None or ("bias_index" in inputs and which is None):
        return NotFused("the index map is computed in the model")
    extra = -index.shape[1] % KERNEL_MULTIPLE if which is not None else 0
    keys = np.pad(index, ((0, 0), (0, extra)))
    several = which is not None and len(np.unique(which)) > 1
    in_heads = several and index.shape[0] * heads <= MAX_HEADS
    return Windows(index, index, keys, node.attributes["tokens"].as_int(), in_heads)


def gathered(nodes: Nodes, packed: Packed, windows: Windows, fill: ir.Value | None) -> tuple[ir.Value, ...]:
    """query, key and value as the operator reads them. Padding reads `fill` [3, heads, head_dim]; a query that is
    padding is not written, so it may be any token."""
    made = []
    for part, numbers in enumerate((windows.queries, windows.keys, windows.keys)):
        numbers = numbers.T if windows.in_heads else numbers
        rows = packed.rows(part, np.maximum(numbers, 0))
        if fill is not None and part and (numbers < 0).any():
            rows = nodes.where(nodes.const(numbers[..., None] < 0), packed.fill(part, fill), rows)
        shape = (0, len(numbers), -1) if windows.in_heads else (-1, numbers.shape[1], packed.channels)
        made.append(nodes.reshape(rows, *shape))
    return tuple(made)


def bias_of(nodes: Nodes, windows: Windows, inputs: dict[str, ir.Value], qkv: ir.Value) -> ir.Value | None:
    """[1, heads or windows * heads, query_len, key_len], or a bias for every window of every sample."""
    if "windows_bias" not in inputs:
        return None
    which = constant_of(inputs["bias_index"])
    assert which is not None
    several = len(np.unique(which)) > 1
    chosen = which if several else which[:1]
    per_window = _chosen_bias(nodes, windows, inputs["windows_bias"], chosen)
    if windows.in_heads:
        return nodes.reshape(per_window, 1, -1, windows.queries.shape[1], windows.keys.shape[1])
    return _for_each_sample(nodes, per_window, qkv) if several else per_window


def _chosen_bias(nodes: Nodes, windows: Windows, bias: ir.Value, chosen: Array) -> ir.Value:
    """[windows or 1, heads, query_len, key_len], with the filled-up keys masked."""
    length = windows.index.shape[1]
    extra_keys, extra_queries = windows.keys.shape[1] - length, windows.queries.shape[1] - length
    array = constant_of(bias)
    if array is not None:
        array = padded_array(array[chosen], extra_keys)
        return nodes.const(np.pad(array, ((0, 0), (0, 0), (0, extra_queries), (0, 0))))
    value = nodes.take(bias, chosen, axis=0)
    if extra_queries:
        value = nodes.take(value, np.minimum(np.arange(length + extra_queries), length - 1), axis=2)
    if extra_keys:
        value = nodes.take(value, np.minimum(np.arange(length + extra_keys), length - 1), axis=3)
        beyond = padded_array(np.zeros((1, length), np.float32), extra_keys)
        value = nodes.op("Add", [value, nodes.const(beyond)], dtype=FLOAT)
    return value


def _for_each_sample(nodes: Nodes, bias: ir.Value, qkv: ir.Value) -> ir.Value:
    """[windows, heads, ...] -> [batch * windows, heads, ...]."""
    ones = nodes.ints(1, 1, 1, 1)
    batch = nodes.op("Shape", [qkv], dtype=ir.DataType.INT64, start=0, end=1)
    shape = nodes.op("Concat", [batch, ones], dtype=ir.DataType.INT64, axis=0)
    single = nodes.op("Unsqueeze", [bias, nodes.ints(0)], dtype=FLOAT)
    repeated = nodes.op("Expand", [single, shape], dtype=FLOAT)
    merged = nodes.op("Shape", [bias], dtype=ir.DataType.INT64, start=1)
    return nodes.op(
        "Reshape", [repeated, nodes.op("Concat", [nodes.ints(-1), merged], dtype=ir.DataType.INT64, axis=0)],
        dtype=FLOAT,
    )  # fmt: skip


def folded(windows: Windows, call: Call) -> Call:
    """The call as the operator sees it: more heads, or a longer batch that it does not know of."""
    if not windows.in_heads:
        return call
    heads = call.heads * len(windows.index)
    return Call(
        call.query, call.key, call.value, heads, heads, call.head_dim, call.value_dim, call.scale, call.bias,
        square=call.square,
    )  # fmt: skip


def scattered(nodes: Nodes, windows: Windows, result: ir.Value, channels: int) -> ir.Value:
    """[batch, tokens, channels]; a token in no window gives 0."""
    count, length = windows.queries.shape
    shape = (0, length * count) if windows.in_heads else (-1, count * length)
    rows = nodes.reshape(result, *shape, channels)
    window, place = np.nonzero(windows.index >= 0)
    position = place * count + window if windows.in_heads else window * length + place
    inverse = np.full(windows.tokens, -1)
    inverse[windows.index[window, place]] = position
    output = nodes.take(rows, np.maximum(inverse, 0), axis=1)
    if (inverse >= 0).all():
        return output
    return nodes.where(nodes.const(inverse[:, None] >= 0), output, nodes.const(np.zeros(1, np.float32)))
