"""HardAttention: the tokens with the highest scores, best first.

Deterministic hard attention: of the one-hot choice that stochastic hard attention samples (Xu et al., Show, Attend
and Tell, 2015, section 4.1) the most probable, for k = 1; the k best tokens, as token selection in vision transformers
does (Liang et al., EViT, 2022, section 3.2).
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require


def infer_shapes(scores: Shape, values: Shape, k: int) -> tuple[Shape, ...]:
    """scores [batch, tokens], values [batch, tokens, channels] -> [batch, k, channels]."""
    require(len(scores) == 2, f"scores must be [batch, tokens], got {scores}")
    require(len(values) == 3 and values[:2] == scores, f"values must be [*{scores}, channels], got {values}")
    require(1 <= k <= scores[1], f"k is {k}, of {scores[1]} tokens")
    return ((values[0], k, values[2]),)


def multiply_adds(scores: Shape, values: Shape, k: int) -> int:
    """None: scores are compared and values are moved."""
    return 0


def _reference(scores: Array, values: Array, k: int) -> tuple[Array, ...]:
    """Of equal scores the lower token comes first, as ONNX TopK has it."""
    best = np.argsort(-scores.astype(np.float64), axis=1, kind="stable")[:, :k]
    return (np.take_along_axis(values.astype(np.float64), best[:, :, None], axis=1),)


FORMS = (
    Form(
        operator="HardAttention",
        name="HardAttention",
        inputs=(Input("scores"), Input("values")),
        outputs=("output",),
        attributes={"k": int},
        body=lines(
            "k_value = Constant <value_int: int = @k> ()",
            "one = Constant <value_ints: ints = [1]> ()",
            "count = Reshape (k_value, one)",
            "best_scores, best = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (scores, count)",
            "last = Constant <value_ints: ints = [-1]> ()",
            "places = Unsqueeze (best, last)",
            "output = GatherND <batch_dims: int = 1> (values, places)",
        ),
        reference=_reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    ),
)
