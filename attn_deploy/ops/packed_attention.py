"""PackedAttention: attention on one packed tensor of query, key and value, optionally window by window.

qkv is [batch, tokens, 3, heads, head_dim]; the output is [batch, tokens, heads * head_dim].
The indexed forms take an index map [windows, length] of token numbers: window w attends within tokens index[w] and
writes its result back to them, so that partition, shift and their inverse are addresses and not copies (Swin:
Liu et al. 2021, section 3.2; MaxViT: Tu et al. 2022, section 3.2). In the indexed forms every token stands in one
window. In the padded ones -1 is padding: it reads `fill` [3, heads, head_dim] (the projection's bias, since a zero
token projects to it) and is not written back; a token in no window gives 0. Bias comes as its distinct windows
[distinct, heads, length, length] and an index [windows] into them, since a shifted Swin layer has 64 windows and 4
distinct masks.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require
from attn_deploy.ops.scores import Scores, all_scores


def multiply_adds(qkv: Shape, *extra: Shape, scale: float, softcap: float = 0.0, tokens: int | None = None) -> int:
    batch, length, _, heads, head_dim = qkv
    windows = 1
    if tokens is not None:
        windows, length = extra[0]
    return 2 * batch * windows * heads * length * length * head_dim


def _check_qkv(qkv: Shape) -> None:
    require(len(qkv) == 5 and qkv[2] == 3, f"qkv must be [batch, tokens, 3, heads, head_dim], got {qkv}")


def _plain(scores: Scores) -> Form:
    def infer_shapes(qkv: Shape, *extra: Shape, scale: float, softcap: float = 0.0) -> tuple[Shape, ...]:
        """[batch, tokens, 3, heads, head_dim] -> [batch, tokens, heads * head_dim]."""
        _check_qkv(qkv)
        scores.check(extra, (qkv[0], qkv[3], qkv[1], qkv[1]))
        return ((qkv[0], qkv[1], qkv[3] * qkv[4]),)

    def reference(qkv: Array, *extra: Array, scale: float, softcap: float = 0.0) -> tuple[Array, ...]:
        q, k, v = np.moveaxis(qkv.astype(np.float64), (2, 3), (0, 2))
        out = np.moveaxis(scores.reference(q, k, extra, scale, softcap) @ v, 1, 2)
        return (out.reshape(*out.shape[:2], -1),)

    return Form(
        operator="PackedAttention",
        name="PackedAttention" + scores.suffix,
        inputs=(Input("qkv"), *scores.inputs),
        outputs=("output",),
        attributes=scores.attributes,
        body=lines(
            "query, key, value = Split <axis: int = 2, num_outputs: int = 3> (qkv)",
            "parts = Constant <value_ints: ints = [2]> ()",
            "q_tokens = Squeeze (query, parts)",
            "k_tokens = Squeeze (key, parts)",
            "v_tokens = Squeeze (value, parts)",
            "q = Transpose <perm: ints = [0, 2, 1, 3]> (q_tokens)",
            "kt = Transpose <perm: ints = [0, 2, 3, 1]> (k_tokens)",
            "v = Transpose <perm: ints = [0, 2, 1, 3]> (v_tokens)",
        )
        + scores.body()
        + lines(
            "o = MatMul (p, v)",
            "o_tokens = Transpose <perm: ints = [0, 2, 1, 3]> (o)",
            "merged = Constant <value_ints: ints = [0, 0, -1]> ()",
            "output = Reshape (o_tokens, merged)",
        ),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


def _indexed(scores: Scores, padded: bool) -> Form:
    def infer_shapes(qkv: Shape, index: Shape, *extra: Shape, scale: float, tokens: int) -> tuple[Shape, ...]:
        """qkv [batch, tokens, 3, heads, head_dim], index [windows, length] -> [batch, tokens, heads * head_dim]."""
        _check_qkv(qkv)
        require(tokens == qkv[1], f"tokens is {tokens}, qkv is {qkv}")
        require(len(index) == 2, f"index must be [windows, length], got {index}")
        if padded:
            fill, *extra = extra  # type: ignore[assignment]
            require(fill == qkv[2:], f"fill must be {qkv[2:]}, got {fill}")
        else:
            require(index[0] * index[1] == tokens, f"index {index} does not hold {tokens} tokens once each")
        if scores.cosine:
            require(extra[0] == qkv[3:4], f"head_scale {extra[0]} is not {qkv[3:4]}")
        if scores.bias:
            bias, bias_index = extra[-2:]
            require(bias[1:] == (qkv[3], index[1], index[1]), f"bias {bias} does not fit index {index}")
            require(bias_index == index[:1], f"bias_index {bias_index} does not fit index {index}")
        return ((qkv[0], qkv[1], qkv[3] * qkv[4]),)

    def reference(qkv: Array, index: Array, *extra: Array, scale: float, tokens: int) -> tuple[Array, ...]:
        batch, _, _, heads, head_dim = qkv.shape
        fill = extra[0] if padded else np.zeros((3, heads, head_dim))
        extra = extra[int(padded) :]
        row = np.broadcast_to(fill.astype(np.float64), (batch, 1, *fill.shape))
        windows = np.concatenate([qkv.astype(np.float64), row], axis=1)[:, index]  # -1 is the row of fill
        q, k, v = np.moveaxis(windows, (3, 4), (0, 3))
        if scores.bias:
            extra = (*extra[:-2], extra[-2][extra[-1]])
        out = np.moveaxis(scores.reference(q, k, extra, scale) @ v, 2, 3)
        result = np.zeros((batch, tokens + 1, heads * head_dim))
        result[:, index.ravel()] = out.reshape(batch, -1, heads * head_dim)
        return (result[:, :tokens],)

    gather_bias = "bias = Gather <axis: int = 0> (windows_bias, bias_index)" if scores.bias else ""
    inputs = [Input("qkv"), Input("index", "int64")]
    inputs += [Input("fill")] if padded else []
    inputs += [Input("head_scale")] if scores.cosine else []
    inputs += [Input("windows_bias"), Input("bias_index", "int64")] if scores.bias else []
    gather, scatter = (_gather_padded(), _scatter_padded()) if padded else (_gather(), _scatter())
    return Form(
        operator="PackedAttention",
        name="PackedAttentionIndexed" + ("Padded" if padded else "") + scores.suffix,
        inputs=tuple(inputs),
        outputs=("output",),
        attributes={"scale": float, "tokens": int},
        body=gather + _SPLIT + lines(gather_bias) + scores.body() + _MERGE + scatter,
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


# From `gathered` [batch, windows, length, 3, heads, head_dim] to q, v [batch, windows, heads, length, head_dim] and kt.
_SPLIT = lines(
    "query, key, value = Split <axis: int = 3, num_outputs: int = 3> (gathered)",
    "parts = Constant <value_ints: ints = [3]> ()",
    "q_tokens = Squeeze (query, parts)",
    "k_tokens = Squeeze (key, parts)",
    "v_tokens = Squeeze (value, parts)",
    "q = Transpose <perm: ints = [0, 1, 3, 2, 4]> (q_tokens)",
    "kt = Transpose <perm: ints = [0, 1, 3, 4, 2]> (k_tokens)",
    "v = Transpose <perm: ints = [0, 1, 3, 2, 4]> (v_tokens)",
)

# From the weights to `o_flat` [batch, windows * length, heads * head_dim] in window order.
_MERGE = lines(
    "o = MatMul (p, v)",
    "o_tokens = Transpose <perm: ints = [0, 1, 3, 2, 4]> (o)",
    "heads_dim = Shape <start: int = 3> (o_tokens)",
    "channels = ReduceProd <keepdims: int = 1> (heads_dim)",
    "samples = Shape <end: int = 1> (qkv)",
    "all = Constant <value_ints: ints = [-1]> ()",
    "flat_shape = Concat <axis: int = 0> (samples, all, channels)",
    "o_flat = Reshape (o_tokens, flat_shape)",
)


def _gather() -> str:
    return lines("gathered = Gather <axis: int = 1> (qkv, index)")


def _scatter() -> str:
    """The inverse of the index map, which the runtime folds, reads the rows of every token."""
    return lines(
        "places = Reshape (index, all)",
        "nought = Constant <value_int: int = 0> ()",
        "step = Constant <value_int: int = 1> ()",
        "count = Constant <value_int: int = @tokens> ()",
        "numbers = Range (nought, count, step)",
        "inverse = ScatterElements <axis: int = 0> (numbers, places, numbers)",
        "output = Gather <axis: int = 1> (o_flat, inverse)",
    )


def _gather_padded() -> str:
    """Padding reads a row of fill behind the last token."""
    return lines(
        "batch = Shape <end: int = 1> (qkv)",
        "one = Constant <value_ints: ints = [1]> ()",
        "inner = Shape (fill)",
        "row_shape = Concat <axis: int = 0> (batch, one, inner)",
        "row = Expand (fill, row_shape)",
        "rows = Concat <axis: int = 1> (qkv, row)",
        "last = Constant <value_int: int = @tokens> ()",
        "nought = Constant <value_int: int = 0> ()",
        "padding = Less (index, nought)",
        "safe = Where (padding, last, index)",
        "gathered = Gather <axis: int = 1> (rows, safe)",
    )


def _scatter_padded() -> str:
    """The inverse map points tokens of no window at a row of zeros."""
    return lines(
        "zero_shape = Concat <axis: int = 0> (batch, one, channels)",
        "zero_row = ConstantOfShape <value: tensor = float[1] z {0.0}> (zero_shape)",
        "o_rows = Concat <axis: int = 1> (o_flat, zero_row)",
        "places = Reshape (safe, all)",
        "window_count = Size (places)",
        "step = Constant <value_int: int = 1> ()",
        "numbers = Range (nought, window_count, step)",
        "table_len = Add (last, step)",
        "table_shape = Reshape (table_len, one)",
        "nowhere = Expand (window_count, table_shape)",
        "table = ScatterElements <axis: int = 0> (nowhere, places, numbers)",
        "start = Constant <value_ints: ints = [0]> ()",
        "end = Reshape (last, one)",
        "inverse = Slice (table, start, end)",
        "output = Gather <axis: int = 1> (o_rows, inverse)",
    )


# A window's mask is folded into its bias: the indexed forms need no mask of their own.
FORMS = tuple(_plain(s) for s in all_scores()) + tuple(
    _indexed(Scores(bias=bias, cosine=cosine), padded)
    for padded in (False, True)
    for bias in (False, True)
    for cosine in (False, True)
)
