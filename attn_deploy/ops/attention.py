"""Attention: softmax(scale * query key^T + bias) value, on separate tensors read in place.

Vaswani et al., Attention Is All You Need, 2017, equation 1.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require
from attn_deploy.ops.scores import Scores, all_scores


def infer_shapes(query: Shape, key: Shape, value: Shape, *extra: Shape, scale: float) -> tuple[Shape, ...]:
    """query [batch, query_len, heads, head_dim], key [batch, key_len, heads, head_dim],
    value [batch, key_len, heads, value_dim] -> [batch, query_len, heads, value_dim]."""
    require(len(query) == len(key) == len(value) == 4, f"rank 4 expected, got {query}, {key}, {value}")
    require(query[3] == key[3], f"head_dim differs: query {query}, key {key}")
    require(key[:3] == value[:3], f"key {key} and value {value} differ in batch, length or heads")
    require(query[0] == key[0] and query[2] == key[2], f"batch or heads differ: query {query}, key {key}")
    for shape in extra:
        full = (query[0], query[2], query[1], key[1])
        fits = len(shape) == 4 and all(s in (1, f) for s, f in zip(shape, full, strict=True))
        require(fits, f"bias or mask {shape} does not broadcast to {full}")
    return ((*query[:3], value[3]),)


def multiply_adds(query: Shape, key: Shape, value: Shape, *extra: Shape, scale: float) -> int:
    batch, query_len, heads, head_dim = query
    return batch * heads * query_len * key[1] * (head_dim + value[3])


def _form(scores: Scores) -> Form:
    def reference(query: Array, key: Array, value: Array, *extra: Array, scale: float) -> tuple[Array, ...]:
        q, k, v = (np.moveaxis(t.astype(np.float64), 2, 1) for t in (query, key, value))
        return (np.moveaxis(scores.reference(q, k, extra, scale) @ v, 1, 2),)

    return Form(
        operator="Attention",
        name="Attention" + scores.suffix,
        inputs=(Input("query"), Input("key"), Input("value"), *scores.inputs),
        outputs=("output",),
        attributes={"scale": float},
        body=lines(
            "q = Transpose <perm: ints = [0, 2, 1, 3]> (query)",
            "kt = Transpose <perm: ints = [0, 2, 3, 1]> (key)",
            "v = Transpose <perm: ints = [0, 2, 1, 3]> (value)",
        )
        + scores.body()
        + lines("o = MatMul (p, v)", "output = Transpose <perm: ints = [0, 2, 1, 3]> (o)"),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = tuple(_form(scores) for scores in all_scores())
