"""BranchPool: several maps summed with weights that a softmax over the maps gives.

The select step of selective kernel networks (Li et al. 2019, equations 5 and 6) and the split attention of ResNeSt
(Zhang et al. 2020, equations 1 and 2).
"""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require, softmax_float64


def infer_shapes(x: Shape, scores: Shape) -> tuple[Shape, ...]:
    """x [batch, branches, channels, height, width], scores [batch, branches, channels|1, height|1, width|1]
    -> [batch, channels, height, width]."""
    require(len(x) == 5, f"x must be [batch, branches, channels, height, width], got {x}")
    fits = len(scores) == 5 and scores[:2] == x[:2] and all(s in (1, d) for s, d in zip(scores, x, strict=True))
    require(fits, f"scores {scores} do not broadcast to x {x} with a score for every branch")
    return ((x[0], *x[2:]),)


def multiply_adds(x: Shape, scores: Shape) -> int:
    return math.prod(x)


def _reference(x: Array, scores: Array) -> tuple[Array, ...]:
    weights = np.moveaxis(softmax_float64(np.moveaxis(scores, 1, -1)), -1, 1)
    return ((x.astype(np.float64) * weights).sum(1),)


FORMS = (
    Form(
        operator="BranchPool",
        name="BranchPool",
        inputs=(Input("x"), Input("scores")),
        outputs=("output",),
        attributes={},
        body=lines(
            "branches = Constant <value_ints: ints = [1]> ()",
            "weights = Softmax <axis: int = 1> (scores)",
            "weighted = Mul (x, weights)",
            "output = ReduceSum <keepdims: int = 0> (weighted, branches)",
        ),
        reference=_reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    ),
)
