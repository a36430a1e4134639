"""Query, key and value out of one packed tensor [batch, tokens, 3, heads, head_dim]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes, constant_of, static
from attn_deploy.ops.scores import NORM_EPS
from attn_deploy.session import Array


class Packed:
    """`head_scale` [heads] where scores are cosines: then query and key are divided by their lengths first, before
    anything gathers them, and the scale goes into the query."""

    def __init__(self, nodes: Nodes, qkv: ir.Value, head_scale: ir.Value | None) -> None:
        heads, head_dim = static(qkv, 3), static(qkv, 4)
        assert heads is not None
        assert head_dim is not None
        self.heads, self.head_dim, self.channels = heads, head_dim, heads * head_dim
        self._nodes, self._qkv, self._head_scale = nodes, qkv, head_scale
        self._parts: tuple[ir.Value, ...] | None = None
        self._flat: ir.Value | None = None

    def parts(self) -> tuple[ir.Value, ...]:
        """query, key and value [batch, tokens, heads * head_dim]: one copy."""
        if self._parts is None:
            query, key, value = self._nodes.thirds(self._qkv, axis=2)
            if self._head_scale is not None:
                query, key = unit(self._nodes, query, self._head_scale), unit(self._nodes, key)
            self._parts = tuple(self._nodes.reshape(p, 0, 0, self.channels) for p in (query, key, value))
        return self._parts

    def rows(self, part: int, numbers: Array) -> ir.Value:
        """Tokens of query (0), key (1) or value (2): [batch, *numbers.shape, heads * head_dim]. One copy, from the
        packed tensor where nothing has to be done to all tokens before."""
        if self._head_scale is not None:
            return self._nodes.take(self.parts()[part], numbers, axis=1)
        if self._flat is None:
            self._flat = self._nodes.reshape(self._qkv, 0, -1, self.channels)
        return self._nodes.take(self._flat, 3 * numbers + part, axis=1)

    def fill(self, part: int, fill: ir.Value) -> ir.Value:
        """What padding reads: [heads * head_dim], for a key at length 1 where scores are cosines."""
        array = constant_of(fill)
        chosen = self._nodes.const(array[part]) if array is not None else self._nodes.take(fill, np.array(part), axis=0)
        if part == 1 and self._head_scale is not None:
            chosen = unit(self._nodes, chosen)
        return self._nodes.reshape(chosen, self.channels)


def unit(nodes: Nodes, vectors: ir.Value, head_scale: ir.Value | None = None) -> ir.Value:
    """vectors [..., heads, head_dim] at length `head_scale` [heads], or 1; shorter ones than NORM_EPS stay short."""
    length = nodes.op("ReduceL2", [vectors, nodes.ints(-1)], dtype=FLOAT, keepdims=1, noop_with_empty_axes=0)
    divisor = nodes.op("Max", [length, nodes.const(np.float32(NORM_EPS).reshape(1))], dtype=FLOAT)
    if head_scale is None:
        return nodes.op("Div", [vectors, divisor], dtype=FLOAT)
    factor = nodes.op("Div", [nodes.reshape(head_scale, -1, 1), divisor], dtype=FLOAT)
    return nodes.op("Mul", [vectors, factor], dtype=FLOAT)
