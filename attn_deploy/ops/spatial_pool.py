"""SpatialPool: mean and maximum over the channels of every pixel in one pass.

The pool of CBAM's spatial attention (Woo et al. 2018, equation 3), which joins both along the channel axis: so does
the operator, in the order of its name (the paper writes the mean first, the authors' code the maximum).
"""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require


def _form(*parts: str) -> Form:
    """`parts` are "Mean" and "Max" in the order of the output's channels."""

    def infer_shapes(x: Shape) -> tuple[Shape, ...]:
        """x [batch, channels, height, width] -> [batch, parts, height, width]."""
        require(len(x) == 4, f"x must be [batch, channels, height, width], got {x}")
        return ((x[0], len(parts), *x[2:]),)

    def reference(x: Array) -> tuple[Array, ...]:
        x = x.astype(np.float64)
        made = {"Mean": lambda: x.mean(1, keepdims=True), "Max": lambda: x.max(1, keepdims=True)}
        return (np.concatenate([made[part]() for part in parts], axis=1),)

    def multiply_adds(x: Shape) -> int:
        return math.prod(x) * len(parts)

    names = [part.lower() for part in parts] if len(parts) > 1 else ["output"]
    return Form(
        operator="SpatialPool",
        name="SpatialPool" + "".join(parts),
        inputs=(Input("x"),),
        outputs=("output",),
        attributes={},
        body=lines(
            "channels = Constant <value_ints: ints = [1]> ()",
            *(f"{name} = Reduce{part} (x, channels)" for name, part in zip(names, parts, strict=True)),
            f"output = Concat <axis: int = 1> ({', '.join(names)})" if len(parts) > 1 else "",
        ),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = (_form("Mean"), _form("Max"), _form("Mean", "Max"), _form("Max", "Mean"))
