"""RotaryEmbedding: pairs of channels turned by an angle that grows with the token's position.

Su et al., RoFormer, 2021, equation 34: x * cos + rotated(x) * sin. cos and sin hold an entry for every channel, so that
a token that is not to be turned (a class token) has cos 1 and sin 0. In `RotaryEmbedding` channel i is paired with
channel i + head_dim / 2 (GPT-NeoX, Llama), in `RotaryEmbeddingInterleaved` with its neighbour, as in the paper.
"""

from __future__ import annotations

import math

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require


def infer_shapes(x: Shape, cos: Shape, sin: Shape) -> tuple[Shape, ...]:
    """x [batch, tokens, heads, head_dim], cos and sin [batch|1, tokens, head_dim] -> x's shape."""
    require(len(x) == 4 and x[3] % 2 == 0, f"x must be [batch, tokens, heads, even head_dim], got {x}")
    fits = len(cos) == 3 and cos[0] in (1, x[0]) and cos[1:] == (x[1], x[3])
    require(fits, f"cos must be [1 or {x[0]}, {x[1]}, {x[3]}] for x {x}, got {cos}")
    require(cos == sin, f"cos {cos} and sin {sin} differ")
    return (x,)


def multiply_adds(x: Shape, cos: Shape, sin: Shape) -> int:
    return 2 * math.prod(x)


def _form(interleaved: bool) -> Form:
    def reference(x: Array, cos: Array, sin: Array) -> tuple[Array, ...]:
        x = x.astype(np.float64)
        if interleaved:
            turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
        else:
            half = x.shape[-1] // 2
            turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return (x * cos.astype(np.float64)[:, :, None] + turned * sin.astype(np.float64)[:, :, None],)

    pairs = (
        "pair_shape = Constant <value_ints: ints = [0, 0, 0, -1, 2]> ()",
        "paired = Reshape (x, pair_shape)",
        "first, second = Split <axis: int = -1, num_outputs: int = 2> (paired)",
        "negative = Neg (second)",
        "turned_pairs = Concat <axis: int = -1> (negative, first)",
        "shape = Shape (x)",
        "turned = Reshape (turned_pairs, shape)",
    )
    halves = (
        "first, second = Split <axis: int = -1, num_outputs: int = 2> (x)",
        "negative = Neg (second)",
        "turned = Concat <axis: int = -1> (negative, first)",
    )
    return Form(
        operator="RotaryEmbedding",
        name="RotaryEmbedding" + ("Interleaved" if interleaved else ""),
        inputs=(Input("x"), Input("cos"), Input("sin")),
        outputs=("output",),
        attributes={},
        body=lines(
            "heads = Constant <value_ints: ints = [2]> ()",
            "cos_heads = Unsqueeze (cos, heads)",
            "sin_heads = Unsqueeze (sin, heads)",
            *(pairs if interleaved else halves),
            "straight = Mul (x, cos_heads)",
            "across = Mul (turned, sin_heads)",
            "output = Add (straight, across)",
        ),
        reference=reference,
        infer_shapes=infer_shapes,
        multiply_adds=multiply_adds,
    )


FORMS = (_form(interleaved=False), _form(interleaved=True))
