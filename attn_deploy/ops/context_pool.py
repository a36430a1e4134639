"""ContextPool: the mean of the values over the tokens, weighted by a softmax of one score per token.

values weighted by softmax(scores): the context modelling of global context networks (Cao et al., GCNet, 2019,
equation 4), the separable self-attention of MobileViTv2 (Mehta and Rastegari 2022, section 3.2) and additive, or soft,
attention pooling (Bahdanau et al. 2015, equation 5; with several rows of scores Lin et al., A Structured
Self-attentive Sentence Embedding, 2017, equation 6).

A group is one row of scores. In `ContextPool` all groups weight the same values, which are channels last; in
`ContextPoolChannelsFirst` every group has its own tokens, as the pixels of MobileViTv2's patches do.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require, softmax_float64


def infer_shapes(scores: Shape, values: Shape) -> tuple[Shape, ...]:
    """scores [batch, groups, tokens], values [batch, tokens, channels] -> [batch, groups, channels]."""
    require(len(scores) == 3, f"scores must be [batch, groups, tokens], got {scores}")
    fits = len(values) == 3 and values[:2] == scores[::2]
    require(fits, f"values must be [{scores[0]}, {scores[2]}, channels] for scores {scores}, got {values}")
    return ((scores[0], scores[1], values[2]),)


def infer_channels_first(scores: Shape, values: Shape) -> tuple[Shape, ...]:
    """scores [batch, groups, tokens], values [batch, channels, groups, tokens] -> [batch, channels, groups]."""
    require(len(scores) == 3, f"scores must be [batch, groups, tokens], got {scores}")
    fits = len(values) == 4 and (values[0], *values[2:]) == scores
    require(fits, f"values must be [batch, channels, groups, tokens] for scores {scores}, got {values}")
    return (values[:3],)


def multiply_adds(scores: Shape, values: Shape) -> int:
    batch, groups, tokens = scores
    channels = values[2] if len(values) == 3 else values[1]
    return batch * groups * tokens * channels


def _reference(scores: Array, values: Array) -> tuple[Array, ...]:
    return (softmax_float64(scores) @ values.astype(np.float64),)


def _channels_first_reference(scores: Array, values: Array) -> tuple[Array, ...]:
    weighted = values.astype(np.float64) * softmax_float64(scores)[:, None]
    return (weighted.sum(-1),)


_CHANNELS_LAST = Form(
    operator="ContextPool",
    name="ContextPool",
    inputs=(Input("scores"), Input("values")),
    outputs=("output",),
    attributes={},
    body=lines("weights = Softmax <axis: int = -1> (scores)", "output = MatMul (weights, values)"),
    reference=_reference,
    infer_shapes=infer_shapes,
    multiply_adds=multiply_adds,
)

_CHANNELS_FIRST = Form(
    operator="ContextPool",
    name="ContextPoolChannelsFirst",
    inputs=(Input("scores"), Input("values")),
    outputs=("output",),
    attributes={},
    body=lines(  # the transposition of one group moves nothing; a product and a sum would write values once more
        "last = Constant <value_ints: ints = [-1]> ()",
        "weights = Softmax <axis: int = -1> (scores)",
        "column = Unsqueeze (weights, last)",
        "grouped = Transpose <perm: ints = [0, 2, 1, 3]> (values)",
        "pooled = MatMul (grouped, column)",
        "by_group = Squeeze (pooled, last)",
        "output = Transpose <perm: ints = [0, 2, 1]> (by_group)",
    ),
    reference=_channels_first_reference,
    infer_shapes=infer_channels_first,
    multiply_adds=multiply_adds,
)

FORMS = (_CHANNELS_LAST, _CHANNELS_FIRST)
