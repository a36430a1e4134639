"""ChannelPool: mean and maximum of every channel's plane in one pass.

The squeeze of squeeze-and-excitation (Hu et al. 2018, equation 2); mean and maximum together in CBAM's channel
attention (Woo et al. 2018, equation 2).
"""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require


def _form(name: str, parts: tuple[str, ...]) -> Form:
    def infer_shapes(x: Shape) -> tuple[Shape, ...]:
        """x [batch, channels, height, width] -> [batch, channels, 1, 1] for each output."""
        require(len(x) == 4, f"x must be [batch, channels, height, width], got {x}")
        return tuple((*x[:2], 1, 1) for _ in parts)

    def reference(x: Array) -> tuple[Array, ...]:
        x = x.astype(np.float64)
        made = {"mean": lambda: x.mean((2, 3), keepdims=True), "maximum": lambda: x.max((2, 3), keepdims=True)}
        return tuple(made[part]() for part in parts)

    def multiply_adds(x: Shape) -> int:
        return math.prod(x) * len(parts)

    # GlobalAveragePool and not ReduceMean: it stays inside ONNX Runtime's blocked layout.
    bodies = {"mean": "mean = GlobalAveragePool (x)", "maximum": "maximum = GlobalMaxPool (x)"}
    return Form(
        operator="ChannelPool",
        name=name,
        inputs=(Input("x"),),
        outputs=parts,
        attributes={},
        body=lines(*(bodies[part] for part in parts)),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = (
    _form("ChannelPoolMean", ("mean",)),
    _form("ChannelPoolMax", ("maximum",)),
    _form("ChannelPoolMeanMax", ("mean", "maximum")),
)
