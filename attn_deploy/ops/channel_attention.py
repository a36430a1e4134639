"""ChannelAttention: attention between the channels of a head over all tokens, on packed query, key and value.

Cross-covariance attention (El-Nouby et al., XCiT, 2021, equation 3): every channel of query and key is a vector over
the tokens, scaled to length 1, and a head's scores are its [head_dim, head_dim] products times a temperature. The
unscaled forms leave the lengths as they are: the channel group attention of DaViT (Ding et al. 2022, equation 5).
Channels first is the layout of a convolution's query, key and value (Zamir et al., Restormer, 2022, equation 1).
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from attn_deploy.ops.form import Array, Form, Input, Shape, lines, require, softmax_float64

MIN_LENGTH = "1e-12"
"""A shorter vector is divided by this, as in torch.nn.functional.normalize."""


def infer_shapes(qkv: Shape, temperature: Shape) -> tuple[Shape, ...]:
    """qkv [batch, tokens, 3, heads, head_dim], temperature [heads] -> [batch, tokens, heads * head_dim]."""
    require(len(qkv) == 5 and qkv[2] == 3, f"qkv must be [batch, tokens, 3, heads, head_dim], got {qkv}")
    require(temperature == qkv[3:4], f"temperature must be [{qkv[3]}] for qkv {qkv}, got {temperature}")
    return ((qkv[0], qkv[1], qkv[3] * qkv[4]),)


def infer_channels_first(qkv: Shape, temperature: Shape) -> tuple[Shape, ...]:
    """qkv [batch, 3, heads, head_dim, tokens], temperature [heads] -> [batch, heads * head_dim, tokens]."""
    require(len(qkv) == 5 and qkv[1] == 3, f"qkv must be [batch, 3, heads, head_dim, tokens], got {qkv}")
    require(temperature == qkv[2:3], f"temperature must be [{qkv[2]}] for qkv {qkv}, got {temperature}")
    return ((qkv[0], qkv[2] * qkv[3], qkv[4]),)


def _form(unscaled: bool, channels_first: bool) -> Form:
    def reference(qkv: Array, temperature: Array) -> tuple[Array, ...]:
        qkv = qkv.astype(np.float64)
        parts = np.moveaxis(qkv, 1, 0) if channels_first else np.moveaxis(qkv, (2, 1), (0, -1))
        query, key, value = parts  # [batch, heads, head_dim, tokens]
        if not unscaled:
            query, key = _unit(query), _unit(key)
        scores = query @ key.swapaxes(-1, -2) * temperature.astype(np.float64)[:, None, None]
        out = (softmax_float64(scores) @ value).reshape(len(qkv), -1, value.shape[-1])
        return (out if channels_first else out.swapaxes(1, 2),)

    def multiply_adds(qkv: Shape, temperature: Shape) -> int:
        head_dim = qkv[3] if channels_first else qkv[4]
        return 2 * math.prod(qkv) // 3 * head_dim

    return Form(
        operator="ChannelAttention",
        name="ChannelAttention" + ("Unscaled" if unscaled else "") + ("ChannelsFirst" if channels_first else ""),
        inputs=(Input("qkv"), Input("temperature")),
        outputs=("output",),
        attributes={},
        body=_body(unscaled, channels_first),
        reference=reference,
        infer_shapes=infer_channels_first if channels_first else infer_shapes,
        multiply_adds=multiply_adds,
    )


def _body(unscaled: bool, channels_first: bool) -> str:
    """From qkv to query, key and value [batch, heads, head_dim, tokens], to the product with value and back."""
    query, key = ("q", "kt") if unscaled else ("q_channels", "kt_channels")
    layout: tuple[str, ...]
    merge: tuple[str, ...]
    if channels_first:
        layout = (
            f"{query} = Squeeze (query, parts)",
            "k_channels_first = Squeeze (key, parts)",
            f"{key} = Transpose <perm: ints = [0, 1, 3, 2]> (k_channels_first)",
            "v = Squeeze (value, parts)",
        )
        merge = (
            "shape = Shape (o)",
            "batch, heads, head_dim, tokens = Split <axis: int = 0, num_outputs: int = 4> (shape)",
            "all = Constant <value_ints: ints = [-1]> ()",
            "merged = Concat <axis: int = 0> (batch, all, tokens)",
            "output = Reshape (o, merged)",
        )
    else:
        layout = (
            "q_tokens = Squeeze (query, parts)",
            "k_tokens = Squeeze (key, parts)",
            "v_tokens = Squeeze (value, parts)",
            f"{query} = Transpose <perm: ints = [0, 2, 3, 1]> (q_tokens)",
            f"{key} = Transpose <perm: ints = [0, 2, 1, 3]> (k_tokens)",
            "v = Transpose <perm: ints = [0, 2, 3, 1]> (v_tokens)",
        )
        merge = (
            "o_tokens = Transpose <perm: ints = [0, 3, 1, 2]> (o)",
            "merged = Constant <value_ints: ints = [0, 0, -1]> ()",
            "output = Reshape (o_tokens, merged)",
        )
    axis = 1 if channels_first else 2
    return lines(
        f"query, key, value = Split <axis: int = {axis}, num_outputs: int = 3> (qkv)",
        f"parts = Constant <value_ints: ints = [{axis}]> ()",
        *layout,
        *(() if unscaled else _unit_statements()),
        "products = MatMul (q, kt)",
        "matrix = Constant <value_ints: ints = [1, 2]> ()",
        "factor = Unsqueeze (temperature, matrix)",
        "scores = Mul (products, factor)",
        "p = Softmax <axis: int = -1> (scores)",
        "o = MatMul (p, v)",
        *merge,
    )


def _unit(x: Array) -> Array:
    """Vectors along the last axis at length 1; zero stays zero."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), float(MIN_LENGTH)))


def _unit_statements() -> tuple[str, ...]:
    """Before the product and not after it: products of whole maps pass the range of float16."""
    return (
        "row = Constant <value_ints: ints = [-1]> ()",
        "column = Constant <value_ints: ints = [-2]> ()",
        f"least = Constant <value_float: float = {MIN_LENGTH}> ()",
        "q_length = ReduceL2 (q_channels, row)",
        "k_length = ReduceL2 (kt_channels, column)",
        "q_divisor = Max (q_length, least)",
        "k_divisor = Max (k_length, least)",
        "q = Div (q_channels, q_divisor)",
        "kt = Div (kt_channels, k_divisor)",
    )


FORMS = tuple(_form(*flags) for flags in itertools.product((False, True), repeat=2))
