"""LayerNorm over the last axis, as a part of operators: (x - mean) / sqrt(variance + epsilon) * scale + bias.

Ba et al. 2016, equations 3 and 4.
"""

from __future__ import annotations

import numpy as np

from attn_deploy.ops.form import Array, Shape, require


def reference(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """x [..., channels], scale and bias [channels], in float64."""
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return centred / deviation * scale.astype(np.float64) + bias.astype(np.float64)


def check(x: Shape, scale: Shape, bias: Shape) -> None:
    fits = scale == bias == x[-1:]
    require(fits, f"norm_scale {scale} and norm_bias {bias} must be [{x[-1]}] for x {x}")


def statement(x: str, result: str) -> str:
    """Reads norm_scale, norm_bias and the attribute epsilon of the body that it stands in."""
    call = "LayerNormalization <axis: int = -1, epsilon: float = @epsilon>"
    return f"{result} = {call} ({x}, norm_scale, norm_bias)"
