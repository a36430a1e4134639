"""What is added to the scores of an attention: bias, mask and causality as the one bias that fused kernels read.

A masked key gets MASKED. Kernels differ in what a row without any key gives (a mean of the values, or NaN); by our
contract it gives 0, so such rows are cut where there may be some.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import BOOL, FLOAT, INT32, Nodes, constant_of, static
from attn_deploy.session import Array

MASKED = -1e30
"""Added where a query does not see a key. Kernels multiply it by log2(e), after which the lowest FP32 and BF16 would be
-inf, and -inf - -inf NaN; FP16 clamps it to its lowest number, which is far from that."""


@dataclass(frozen=True)
class Added:
    """`bias` [batch|1, heads|1, query_len, key_len + extra keys] or None; `causal`: what the operator has to cut yet;
    `seen` [batch|1, query_len|1, heads|1, 1], bool, false for a row without any key, or None where there is none."""

    bias: ir.Value | None
    causal: bool
    seen: ir.Value | None


@dataclass(frozen=True)
class Lengths:
    """query_len and key_len, None where they are symbols; `extra` keys follow that nobody may see."""

    query: int | None
    key: int | None
    extra: int = 0

    @property
    def known(self) -> bool:
        return self.query is not None and self.key is not None

    def triangle(self) -> Array:
        """[query_len, key_len], true at and below the diagonal."""
        assert self.query is not None
        assert self.key is not None
        return np.tri(self.query, self.key, dtype=bool)


class ScoreBias:
    """Made once for sites that share their mask and bias, as the layers of a text model do."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Added] = {}

    def added(
        self, nodes: Nodes, bias: ir.Value | None, mask: ir.Value | None, causal: bool, lengths: Lengths,
        query: ir.Value, *, fold_causal: bool,
    ) -> Added:  # fmt: skip
        """`query` [batch, query_len, ...]: where a length is a symbol it is taken from there. `fold_causal`: causality
        goes into the bias also without a mask; asked for lengths that are numbers only."""
        if mask is None and not (causal and fold_causal):
            return Added(None if bias is None else padded_bias(nodes, bias, lengths), causal, None)
        key = (mask, bias, causal, lengths, query if lengths.query is None else None)
        if key not in self._made:
            self._made[key] = _masked(nodes, bias, mask, causal, lengths, query)
        return self._made[key]


def padded_bias(nodes: Nodes, bias: ir.Value, lengths: Lengths) -> ir.Value:
    """`bias` with MASKED for the extra keys."""
    if not lengths.extra:
        return bias
    assert lengths.key is not None
    array = constant_of(bias)
    if array is not None:
        return nodes.const(padded_array(array, lengths.extra))
    longer = nodes.take(bias, _with_extra(lengths.key, lengths.extra), axis=3)
    return nodes.where(nodes.const(_is_real(lengths)), longer, nodes.const(np.float32(MASKED).reshape(1)))


def padded_array(bias: Array, extra: int) -> Array:
    """[..., key_len] -> [..., key_len + extra]."""
    width = [(0, 0)] * (bias.ndim - 1) + [(0, extra)]
    return np.pad(bias.astype(np.float32), width, constant_values=np.float32(MASKED))


def _with_extra(length: int, extra: int) -> Array:
    """The extra keys repeat the first."""
    return np.concatenate([np.arange(length), np.zeros(extra, np.int64)])


def _is_real(lengths: Lengths) -> Array:
    assert lengths.key is not None
    return np.arange(lengths.key + lengths.extra) < lengths.key


def _masked(
    nodes: Nodes, bias: ir.Value | None, mask: ir.Value | None, causal: bool, lengths: Lengths, query: ir.Value
) -> Added:
    known: Array | None = np.ones((1, 1, 1, 1), bool) if mask is None else constant_of(mask)
    if known is not None and (not causal or lengths.known):
        known = known & lengths.triangle() if causal else known
        if lengths.extra:
            known = np.pad(known, [(0, 0)] * 3 + [(0, lengths.extra)], constant_values=False)
        keep = nodes.const(known)
        rows: Array = np.asarray(known.any(-1, keepdims=True))
        seen = None if rows.all() else nodes.const(np.moveaxis(rows, 1, 2))
        return Added(_where_kept(nodes, keep, bias, lengths, query), False, seen)
    assert mask is not None
    keep = mask
    if causal:
        keep = nodes.op("And", [mask, _triangle(nodes, mask, lengths, query)], dtype=BOOL)
    if lengths.extra:
        assert lengths.key is not None
        longer = nodes.take(keep, _with_extra(lengths.key, lengths.extra), axis=3)
        keep = nodes.op("And", [longer, nodes.const(_is_real(lengths))], dtype=BOOL)
    counted = nodes.op(
        "ReduceMax", [nodes.cast(keep, INT32), nodes.ints(-1)], dtype=INT32, keepdims=1, noop_with_empty_axes=0
    )  # no kernel takes a maximum of bool
    seen = nodes.transpose(nodes.cast(counted, BOOL), 0, 2, 1, 3)
    return Added(_where_kept(nodes, keep, bias, lengths, query), False, seen)


def _where_kept(nodes: Nodes, keep: ir.Value, bias: ir.Value | None, lengths: Lengths, query: ir.Value) -> ir.Value:
    """Kernels broadcast the batch and the heads of a bias, but not its rows: the other operand has all of them."""
    if bias is None:
        other = _zero_rows(nodes, lengths, query)
    elif lengths.extra:
        assert lengths.key is not None
        other = nodes.take(bias, _with_extra(lengths.key, lengths.extra), axis=3)
    else:
        other = bias
    return nodes.where(keep, other, nodes.const(np.float32(MASKED).reshape(1)))


def _zero_rows(nodes: Nodes, lengths: Lengths, query: ir.Value) -> ir.Value:
    """[1, 1, query_len, 1]."""
    if lengths.query is not None:
        return nodes.const(np.zeros((1, 1, lengths.query, 1), np.float32))
    one = nodes.ints(1)
    shape = nodes.op("Concat", [one, one, _length(nodes, query), one], dtype=ir.DataType.INT64, axis=0)
    return nodes.op("Expand", [nodes.const(np.zeros(1, np.float32)), shape], dtype=FLOAT)


def _triangle(nodes: Nodes, mask: ir.Value, lengths: Lengths, query: ir.Value) -> ir.Value:
    """[query_len, key_len], true at and below the diagonal."""
    if lengths.known:
        return nodes.const(lengths.triangle())
    key_len = nodes.op("Shape", [mask], dtype=ir.DataType.INT64, start=3)
    shape = nodes.op("Concat", [_length(nodes, query), key_len], dtype=ir.DataType.INT64, axis=0)
    ones = nodes.op("Expand", [nodes.const(np.ones(1, np.int32)), shape], dtype=INT32)
    return nodes.cast(nodes.op("Trilu", [ones], dtype=INT32, upper=0), BOOL)


def _length(nodes: Nodes, query: ir.Value) -> ir.Value:
    return nodes.op("Shape", [query], dtype=ir.DataType.INT64, start=1, end=2)


def rows_are_given(mask: ir.Value) -> bool:
    """The mask has rank 4 and its last dimension is the keys: fused kernels do not broadcast it."""
    return mask.shape is not None and len(mask.shape) == 4 and static(mask, 3) != 1
