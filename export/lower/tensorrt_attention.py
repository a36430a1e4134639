"""Attention in the forms that TensorRT fuses: the pattern MatMul, Add, Softmax, MatMul, or one Attention of opset 23.

Both read query, key and value as [batch, heads, length, head_dim] of rank 4. The scale stands on the query: TensorRT's
fused half-precision kernels ask for it before the first product ("Fused Attention" in NVIDIA's manual). Bias and mask
are one addition, so that nothing but it stands between product and softmax, and a row in which no key is seen is set to
0 behind the second product, where it does not break the pattern.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.tensorrt_layout import Builder, Heads, constant_of, lay_out, operands, static_dim
from attn_deploy.export.precision.insert import replace_node
from attn_deploy.ops.scores import LOWEST, NORM_EPS

OPERATORS = frozenset({"Attention", "PackedAttention"})
"""Families of forms (`Form.operator`) that are lowered here."""

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8
"""Head sizes for which TensorRT has fused kernels in FP16 and BF16 (facts/tensorrt.md)."""


class AttentionForm(StrEnum):
    """What an attention becomes."""

    PATTERN = "pattern"
    OPERATOR = "operator"


def lower_attention(model: ir.Model, node: ir.Node, form: AttentionForm) -> AttentionForm | None:
    """Puts the lowered form in place of an attention operator of ours, in place, and returns which one it was.

    `form` OPERATOR becomes PATTERN where TensorRT's Attention does not compute the same. None: nothing was done, since
    heads, head size or index map are not known when the model is written.
    """
    build = Builder(model, node)
    laid_out = lay_out(build, node)
    if laid_out is None:
        return None
    heads, restore = laid_out
    heads = _bounded_scores(build, _given_scores(build, node, heads))
    if form is AttentionForm.OPERATOR and not _operator_computes(heads):
        form = AttentionForm.PATTERN
    result = (_operator if form is AttentionForm.OPERATOR else _pattern)(build, heads)
    replace_node(model, node, restore(_zero_unseen_rows(build, heads, result)))
    return form


# -- scores ----------------------------------------------------------------------------------------------------------


def _given_scores(build: Builder, node: ir.Node, heads: Heads) -> Heads:
    """With what the form's name, inputs and attributes say of its scores (attn_deploy.ops.scores)."""
    given = operands(node)
    scale = node.attributes.get_float("scale", 1.0)
    heads = replace(
        heads,
        bias=given.get("bias", heads.bias),
        keep=given.get("mask"),
        may_see_none="mask" in given,
        causal="Causal" in node.op_type,
        scale=1.0 if scale is None else scale,
        softcap=node.attributes.get_float("softcap", 0.0) or 0.0,
    )
    if "head_scale" not in given:
        return heads
    query = _unit(build, heads.query)
    factor = _head_factor(build, given["head_scale"], heads)
    return replace(
        heads, query=build.op("Mul", [query, factor], dtype=query.dtype), key=_unit(build, heads.key), scale=1.0
    )


def _head_factor(build: Builder, head_scale: ir.Value, heads: Heads) -> ir.Value:
    """head_scale [heads] times the scale as [1, heads, 1, 1], repeated for windows that became heads."""
    known = constant_of(head_scale)
    if known is not None:
        factor = np.tile(known * np.float32(heads.scale), heads.copies)
        return build.const(factor.reshape(1, -1, 1, 1).astype(np.float32))
    scaled = build.op("Mul", [head_scale, build.const(heads.scale)], dtype=head_scale.dtype)
    column = build.reshape(scaled, 1, -1, 1, 1)
    if heads.copies == 1:
        return column
    repeats = build.const(np.array([1, heads.copies, 1, 1], np.int64))
    return build.op("Tile", [column, repeats], dtype=head_scale.dtype)


def _unit(build: Builder, x: ir.Value) -> ir.Value:
    """Vectors along head_dim at length 1, as in torch.nn.functional.normalize."""
    norm = build.op("ReduceL2", [x, build.axes(-1)], dtype=x.dtype, keepdims=1)
    length = build.op("Max", [norm, build.const(NORM_EPS)], dtype=x.dtype)
    return build.op("Div", [x, length], dtype=x.dtype)


def _bounded_scores(build: Builder, heads: Heads) -> Heads:
    """Causality joins the mask where there is a bias or mask, since TensorRT takes the one or the other, and where
    queries and keys differ in number, since a flag does not say to which end of the keys the triangle is aligned."""
    if not heads.causal or (heads.bias is None and heads.keep is None and heads.square):
        return heads
    triangle = _triangle(build, heads)
    keep = triangle if heads.keep is None else _both(build, triangle, heads.keep)
    return replace(heads, keep=keep, causal=False)


def _both(build: Builder, first: ir.Value, second: ir.Value) -> ir.Value:
    known = constant_of(first), constant_of(second)
    if known[0] is not None and known[1] is not None:
        return build.const(np.logical_and(known[0], known[1]))
    return build.op("And", [first, second], dtype=ir.DataType.BOOL)


def _triangle(build: Builder, heads: Heads) -> ir.Value:
    """Token i sees keys 0..i: bool [1, 1, query_len, key_len]."""
    if heads.query_len is not None and heads.key_len is not None:
        return build.const(np.tri(heads.query_len, heads.key_len, dtype=bool)[None, None])
    lengths = [build.op("Shape", [x], dtype=ir.DataType.INT64, start=2, end=3) for x in (heads.query, heads.key)]
    one = build.const(np.ones(1, np.int64))
    shape = build.op("Concat", [one, one, *lengths], dtype=ir.DataType.INT64, axis=0)
    ones = build.op("Expand", [build.const(np.ones((1, 1, 1, 1), np.float32)), shape], dtype=ir.DataType.FLOAT)
    lower = build.op("Trilu", [ones], dtype=ir.DataType.FLOAT, upper=0)
    return build.op("Cast", [lower], dtype=ir.DataType.BOOL, to=int(ir.DataType.BOOL))


def _added(build: Builder, heads: Heads) -> ir.Value | None:
    """Bias and mask as one addition to the scores; a constant where both are."""
    keep = heads.keep
    if heads.causal:
        keep = _triangle(build, heads)
    if keep is None:
        return heads.bias
    lowest = np.float32(LOWEST)
    known_keep = constant_of(keep)
    known_bias = np.float32(0.0) if heads.bias is None else constant_of(heads.bias)
    if known_keep is not None and known_bias is not None:
        return build.const(np.where(known_keep, known_bias, lowest))
    bias = build.const(0.0) if heads.bias is None else heads.bias
    return build.op("Where", [keep, bias, build.const(lowest)], dtype=ir.DataType.FLOAT)


def _zero_unseen_rows(build: Builder, heads: Heads, result: ir.Value) -> ir.Value:
    """0 in the rows of a mask that see no key. Causality alone leaves every row its first key."""
    if heads.keep is None or not heads.may_see_none:
        return result
    zero = build.const(0.0)
    known = constant_of(heads.keep)
    if known is not None:
        seen = known.any(-1, keepdims=True)
        if seen.all():
            return result
        return build.op("Where", [build.const(seen), result, zero], dtype=result.dtype)
    numbers = build.op("Cast", [heads.keep], dtype=ir.DataType.INT32, to=int(ir.DataType.INT32))
    most = build.op("ReduceMax", [numbers, build.axes(-1)], dtype=ir.DataType.INT32, keepdims=1)
    seen_rows = build.op("Cast", [most], dtype=ir.DataType.BOOL, to=int(ir.DataType.BOOL))
    return build.op("Where", [seen_rows, result, zero], dtype=result.dtype)


# -- the two forms ---------------------------------------------------------------------------------------------------


def _pattern(build: Builder, heads: Heads) -> ir.Value:
    """MatMul, Add, Softmax, MatMul with the scale on the query; a soft cap stands between and is not fused."""
    scale = heads.scale / (heads.softcap or 1.0)
    query = heads.query
    if scale != 1.0:
        query = build.op("Mul", [query, build.const(scale)], dtype=query.dtype)
    key = _repeated(build, heads, heads.key, heads.head_dim)
    value = _repeated(build, heads, heads.value, heads.value_dim)
    scores = build.op("MatMul", [query, build.transpose(key, 0, 1, 3, 2)], dtype=query.dtype)
    if heads.softcap:
        bent = build.op("Tanh", [scores], dtype=query.dtype)
        scores = build.op("Mul", [bent, build.const(heads.softcap)], dtype=query.dtype)
    added = _added(build, heads)
    if added is not None:
        scores = build.op("Add", [scores, added], dtype=query.dtype)
    weights = build.op("Softmax", [scores], dtype=query.dtype, axis=-1)
    return build.op("MatMul", [weights, value], dtype=query.dtype)


def _repeated(build: Builder, heads: Heads, x: ir.Value, dim: int) -> ir.Value:
    """[batch, kv_heads, length, dim] -> [batch, heads, length, dim]: each head for the queries that it serves."""
    if heads.kv_heads == heads.heads:
        return x
    group = heads.heads // heads.kv_heads
    by_group = build.op("Unsqueeze", [x, build.axes(2)], dtype=x.dtype)
    shape = build.const(np.array([1, 1, group, 1, 1], np.int64))
    repeated = build.op("Expand", [by_group, shape], dtype=x.dtype)
    if heads.key_len is not None:
        return build.reshape(repeated, 0, heads.heads, heads.key_len, dim)
    tokens_first = build.transpose(repeated, 0, 3, 1, 2, 4)  # the length moves to where Reshape can copy it
    return build.transpose(build.reshape(tokens_first, 0, 0, heads.heads, dim), 0, 2, 1, 3)


def _operator_computes(heads: Heads) -> bool:
    """True where TensorRT's Attention computes the same, from a scale that it can take the square root of."""
    fits = MIN_HEAD_DIM <= heads.head_dim <= MAX_HEAD_DIM and heads.head_dim % HEAD_DIM_STEP == 0
    return fits and heads.value_dim == heads.head_dim and not heads.softcap and heads.scale > 0


def _operator(build: Builder, heads: Heads) -> ir.Value:
    inputs: list[ir.Value | None] = [heads.query, heads.key, heads.value]
    parts = [v for v in (heads.bias, heads.keep) if v is not None]
    if parts:
        mask = heads.keep if heads.bias is None else _added(build, heads)
        assert mask is not None
        inputs.append(_full_matrix(build, heads, mask, parts))
    return build.op("Attention", inputs, dtype=heads.query.dtype, scale=heads.scale, is_causal=int(heads.causal))


def _full_matrix(build: Builder, heads: Heads, mask: ir.Value, parts: list[ir.Value]) -> ir.Value:
    """`mask`, made of `parts`, as [batch|1, heads|1, query_len, key_len]: TensorRT broadcasts it over batch and heads,
    not over queries, and a last dimension that is too short means keys that nobody sees."""
    lengths = ((2, heads.query_len, heads.query), (3, heads.key_len, heads.key))
    short = [axis for axis, length, _ in lengths if length != 1 and all(static_dim(p, axis) == 1 for p in parts)]
    if not short:
        return mask
    one = build.const(np.ones(1, np.int64))
    dims = [
        one
        if axis not in short
        else build.const(np.array([length], np.int64))
        if length is not None
        else build.op("Shape", [source], dtype=ir.DataType.INT64, start=2, end=3)
        for axis, length, source in lengths
    ]
    known = [constant_of(dim) for dim in dims]
    if all(k is not None for k in known):
        shape = build.const(np.concatenate([np.ones(2, np.int64), *known]))
    else:
        shape = build.op("Concat", [one, one, *dims], dtype=ir.DataType.INT64, axis=0)
    return build.op("Expand", [mask, shape], dtype=mask.dtype)
