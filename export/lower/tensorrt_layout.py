"""Query, key and value of our attention operators as [batch, heads, length, head_dim], and the way back.

Windows (the indexed forms) are folded into the batch where they share one bias, else into the heads, whose bias is then
the constant [1, windows * heads, length, length]. So rank 4 stays, one Gather reads and one writes, and every shape is
a constant with at most one -1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.insert import Inserter
from attn_deploy.ops import FORMS
from attn_deploy.session import Array


@dataclass(frozen=True)
class Heads:
    """query [batch, heads, query_len, head_dim], key and value [batch, kv_heads, key_len, head_dim or value_dim].

    `bias` and `keep` broadcast to [batch, heads, query_len, key_len]; `keep` is bool, true where a query sees a key,
    and may leave a row without any (`may_see_none`). A length that is not known when the model is written is None;
    `square` says that both are the same all the same. `copies` counts the windows that became heads.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    query_len: int | None
    key_len: int | None
    square: bool
    bias: ir.Value | None = None
    keep: ir.Value | None = None
    may_see_none: bool = False
    causal: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    copies: int = 1


Restore = Callable[[ir.Value], ir.Value]
"""From the result [batch, heads, query_len, value_dim] to the operator's output."""


class Builder(Inserter):
    """Inserts what lowering an attention is made of."""

    def __init__(self, model: ir.Model, node: ir.Node) -> None:
        super().__init__(model, node)
        self._constants = 0

    def const(self, value: Array | np.generic | float) -> ir.Value:
        """An initializer; a plain number is float32."""
        self._constants += 1
        array = np.array(value, np.float32 if isinstance(value, float) else None, order="C")
        return self.constant(f"constant_{self._constants}", array)

    def transpose(self, x: ir.Value, *perm: int) -> ir.Value:
        """Two in a row are one, or none where the second undoes the first."""
        producer = x.producer()
        if producer is not None and producer.op_type == "Transpose" and not producer.domain:
            before = producer.attributes.get_ints("perm")
            source = producer.inputs[0]
            if before is not None and source is not None:
                x, perm = source, tuple(before[p] for p in perm)
        if perm == tuple(range(len(perm))):
            return x
        return self.op("Transpose", [x], dtype=x.dtype, perm=list(perm))

    def reshape(self, x: ir.Value, *dims: int) -> ir.Value:
        """0 keeps a dimension, -1 is what is left: the batch stays out of the shape."""
        return self.op("Reshape", [x, self.const(np.array(dims, np.int64))], dtype=x.dtype, allowzero=0)

    def axes(self, *axes: int) -> ir.Value:
        return self.const(np.array(axes, np.int64))

    def split3(self, x: ir.Value, axis: int) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Query, key and value of a packed tensor, with `axis` of length 1 left in."""
        name = f"{self._prefix}/Split"
        outputs = [ir.Value(name=f"{name}_{part}", type=x.type) for part in ("query", "key", "value")]
        node = ir.node("Split", [x], {"axis": axis, "num_outputs": 3}, outputs=outputs, name=name)
        self._model.graph.insert_before(self._anchor, node)
        query, key, value = outputs
        return query, key, value

    def gather(self, x: ir.Value, places: Array) -> ir.Value:
        """Tokens (axis 1) by number."""
        return self.op("Gather", [x, self.const(places.astype(np.int64))], dtype=x.dtype, axis=1)


# -- query, key and value from the operands --------------------------------------------------------------------------


def lay_out(build: Builder, node: ir.Node) -> tuple[Heads, Restore] | None:
    """None where heads, head size or index map are not known when the model is written; nothing is inserted then."""
    given = operands(node)
    if "query" in given:
        return _separate(build, given)
    return _windows(build, node, given) if "index" in given else _packed(build, given["qkv"])


def operands(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of an operator of ours by the names of its form."""
    names = [i.name for i in FORMS[node.op_type].inputs]
    return {name: value for name, value in zip(names, node.inputs, strict=True) if value is not None}


def _separate(build: Builder, given: dict[str, ir.Value]) -> tuple[Heads, Restore] | None:
    """query [batch, query_len, heads, head_dim], key and value [batch, key_len, kv_heads, ...]."""
    query, key, value = given["query"], given["key"], given["value"]
    heads, head_dim = static_dim(query, 2), static_dim(query, 3)
    kv_heads, value_dim = static_dim(key, 2), static_dim(value, 3)
    if heads is None or head_dim is None or kv_heads is None or value_dim is None:
        return None
    q, k, v = (build.transpose(x, 0, 2, 1, 3) for x in (query, key, value))
    assert query.shape is not None
    assert key.shape is not None
    laid_out = Heads(
        q, k, v, heads, kv_heads, head_dim, value_dim, static_dim(query, 1), static_dim(key, 1),
        square=query.shape[1] == key.shape[1],
    )  # fmt: skip
    return laid_out, lambda o: build.transpose(o, 0, 2, 1, 3)


def _packed(build: Builder, qkv: ir.Value) -> tuple[Heads, Restore] | None:
    """qkv [batch, tokens, 3, heads, head_dim] -> output [batch, tokens, heads * head_dim]."""
    tokens, heads, head_dim = static_dim(qkv, 1), static_dim(qkv, 3), static_dim(qkv, 4)
    if heads is None or head_dim is None:
        return None
    axis = build.axes(2)
    parts = [build.op("Squeeze", [part, axis], dtype=qkv.dtype) for part in build.split3(qkv, 2)]
    q, k, v = (build.transpose(part, 0, 2, 1, 3) for part in parts)

    def restore(o: ir.Value) -> ir.Value:
        return build.reshape(build.transpose(o, 0, 2, 1, 3), 0, 0, heads * head_dim)

    return Heads(q, k, v, heads, heads, head_dim, head_dim, tokens, tokens, square=True), restore


def _windows(build: Builder, node: ir.Node, given: dict[str, ir.Value]) -> tuple[Heads, Restore] | None:
    """qkv [batch, tokens, 3, heads, head_dim] read through index [windows, length]; -1 there is padding."""
    qkv, index = given["qkv"], constant_of(given["index"])
    heads, head_dim = static_dim(qkv, 3), static_dim(qkv, 4)
    bias = _window_bias(given)
    if index is None or heads is None or head_dim is None or ("bias_index" in given and bias is None):
        return None
    windows, length = index.shape
    into_heads = bias is not None and len(bias) > 1
    parts = build.split3(_gathered(build, qkv, index, given.get("fill")), 3)  # [batch, windows, length, 1, heads, dim]
    if into_heads:
        in_order = [build.transpose(part, 0, 1, 4, 3, 2, 5) for part in parts]
        q, k, v = (build.reshape(part, 0, windows * heads, length, head_dim) for part in in_order)
    else:
        in_order = [build.reshape(part, -1, length, heads, head_dim) for part in parts]
        q, k, v = (build.transpose(part, 0, 2, 1, 3) for part in in_order)

    def restore(o: ir.Value) -> ir.Value:
        if into_heads:
            o = build.transpose(build.reshape(o, 0, windows, heads, length, head_dim), 0, 1, 3, 2, 4)
            flat = build.reshape(o, 0, windows * length, heads * head_dim)
        else:
            flat = build.reshape(build.transpose(o, 0, 2, 1, 3), -1, windows * length, heads * head_dim)
        return _scattered(build, flat, index, node.attributes.get_int("tokens", 0))

    count = windows * heads if into_heads else heads
    copies = windows if into_heads else 1
    laid_out = Heads(q, k, v, count, count, head_dim, head_dim, length, length, square=True, copies=copies)
    if bias is not None:
        laid_out = replace(laid_out, bias=build.const(bias.reshape(1, count, length, length)))
    return laid_out, restore


def _window_bias(given: dict[str, ir.Value]) -> Array | None:
    """The bias of every window [windows, heads, length, length]; [1, heads, length, length] where all share one."""
    if "bias_index" not in given:
        return None
    distinct, index = constant_of(given["windows_bias"]), constant_of(given["bias_index"])
    if distinct is None or index is None:
        return None
    return distinct[index[:1]] if (index == index[0]).all() else distinct[index]


def _gathered(build: Builder, qkv: ir.Value, index: Array, fill: ir.Value | None) -> ir.Value:
    """[batch, windows, length, 3, heads, head_dim]; padding reads `fill` [3, heads, head_dim]."""
    windows, length = index.shape
    padding = index < 0
    in_order = np.array_equal(index.ravel(), np.arange(index.size)) and static_dim(qkv, 1) == index.size
    if in_order:
        heads, head_dim = static_dim(qkv, 3), static_dim(qkv, 4)
        assert heads is not None
        assert head_dim is not None
        return build.reshape(qkv, 0, windows, length, 3, heads, head_dim)
    gathered = build.gather(qkv, np.where(padding, 0, index))
    if not padding.any():
        return gathered
    assert fill is not None
    return build.op("Where", [build.const(padding[None, :, :, None, None, None]), fill, gathered], dtype=qkv.dtype)


def _scattered(build: Builder, flat: ir.Value, index: Array, tokens: int) -> ir.Value:
    """The rows of [batch, windows * length, channels] put back to their tokens; a token of no window gives 0."""
    places = index.ravel()
    inverse = np.full(tokens, -1, np.int64)
    written = places >= 0
    inverse[places[written]] = np.arange(places.size)[written]
    nowhere = inverse < 0
    if len(inverse) == places.size and np.array_equal(inverse, np.arange(tokens)):
        return flat
    output = build.gather(flat, np.where(nowhere, 0, inverse))
    if not nowhere.any():
        return output
    zero = build.const(np.zeros((), np.float32))
    return build.op("Where", [build.const(nowhere[None, :, None]), zero, output], dtype=flat.dtype)


def static_dim(value: ir.Value, axis: int) -> int | None:
    """The length of an axis, where it is known when the model is written."""
    if value.shape is None or axis >= len(value.shape):
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def constant_of(value: ir.Value) -> Array | None:
    return None if value.const_value is None else np.asarray(value.const_value.numpy())
