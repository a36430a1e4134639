"""Attention: softmax(scale * query key^T + bias) value, on separate tensors read in place.

Vaswani et al., Attention Is All You Need, 2017, equation 1. In the grouped forms each key and value head serves
heads / kv_heads query heads in a row (Ainslie et al., GQA, 2023).
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require
from attn_deploy.ops.scores import Scores, all_scores


def multiply_adds(query: Shape, key: Shape, value: Shape, *extra: Shape, scale: float, softcap: float = 0.0) -> int:
    batch, query_len, heads, head_dim = query
    return batch * heads * query_len * key[1] * (head_dim + value[3])


# Key and value heads one by one, each repeated for the query heads that it serves.
_REPEATED = lines(
    "group_axis = Constant <value_ints: ints = [3]> ()",
    "one = Constant <value_ints: ints = [1]> ()",
    "heads = Shape <start: int = 2, end: int = 3> (query)",
    "kv_heads = Shape <start: int = 2, end: int = 3> (key)",
    "group = Div (heads, kv_heads)",
    "repeats = Concat <axis: int = 0> (one, one, one, group, one)",
    "kept = Constant <value_ints: ints = [0, 0]> ()",
    "rest = Constant <value_ints: ints = [-1]> ()",
    "repeated_shape = Concat <axis: int = 0> (kept, heads, rest)",
    "key_5d = Unsqueeze (key, group_axis)",
    "key_groups = Expand (key_5d, repeats)",
    "k = Reshape (key_groups, repeated_shape)",
    "value_5d = Unsqueeze (value, group_axis)",
    "value_groups = Expand (value_5d, repeats)",
    "v_tokens = Reshape (value_groups, repeated_shape)",
)


def _form(scores: Scores, grouped: bool) -> Form:
    def infer_shapes(
        query: Shape, key: Shape, value: Shape, *extra: Shape, scale: float, softcap: float = 0.0
    ) -> tuple[Shape, ...]:
        """query [batch, query_len, heads, head_dim], key [batch, key_len, heads, head_dim],
        value [batch, key_len, heads, value_dim] -> [batch, query_len, heads, value_dim]; key and value of the
        grouped forms have kv_heads heads, a divisor of heads."""
        require(len(query) == len(key) == len(value) == 4, f"rank 4 expected, got {query}, {key}, {value}")
        require(query[3] == key[3], f"head_dim differs: query {query}, key {key}")
        require(key[:3] == value[:3], f"key {key} and value {value} differ in batch, length or heads")
        fits = query[2] % key[2] == 0 if grouped else query[2] == key[2]
        require(query[0] == key[0] and fits, f"batch or heads differ: query {query}, key {key}")
        scores.check(extra, (query[0], query[2], query[1], key[1]))
        return ((*query[:3], value[3]),)

    def reference(
        query: Array, key: Array, value: Array, *extra: Array, scale: float, softcap: float = 0.0
    ) -> tuple[Array, ...]:
        q, k, v = (np.moveaxis(t.astype(np.float64), 2, 1) for t in (query, key, value))
        k, v = (np.repeat(t, q.shape[1] // t.shape[1], axis=1) for t in (k, v))
        return (np.moveaxis(scores.reference(q, k, extra, scale, softcap) @ v, 1, 2),)

    k, v = ("k", "v_tokens") if grouped else ("key", "value")
    return Form(
        operator="Attention",
        name="Attention" + ("Grouped" if grouped else "") + scores.suffix,
        inputs=(Input("query"), Input("key"), Input("value"), *scores.inputs),
        outputs=("output",),
        attributes=scores.attributes,
        body=(_REPEATED if grouped else "")
        + lines(
            "q = Transpose <perm: ints = [0, 2, 1, 3]> (query)",
            f"kt = Transpose <perm: ints = [0, 2, 3, 1]> ({k})",
            f"v = Transpose <perm: ints = [0, 2, 1, 3]> ({v})",
        )
        + scores.body()
        + lines("o = MatMul (p, v)", "output = Transpose <perm: ints = [0, 2, 1, 3]> (o)"),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = tuple(_form(scores, False) for scores in all_scores()) + tuple(
    _form(scores, True) for scores in all_scores() if not scores.cosine
)
