"""Inputs, references and tolerances of QuantizedFeedForward and QuantizedAttentionBlock, for their tests.

The references do the definition's steps in float64. Where a number lies so near to the middle of two levels that
float32 may take the other one, results differ by that level: rows of inputs are drawn again until none has such a
number, or, where that cannot be had, the rows that have one get a bound of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from kernel_runner import Case
from linear_cases import ACTIVATION_NUMBERS, EPSILON, assert_close, random, rows_of, with_stride

from attn_deploy.ops import FORMS, layer_norm, quantized
from attn_deploy.ops.activation import ACTIVATIONS

Array = np.ndarray

NEAR_X, NEAR_HIDDEN, NEAR_ATTENDED = 1e-4, 4e-4, 1e-3
"""Parts of a level by which float32 may be off: by LayerNorm, by the product before, by the softmax before."""


@dataclass(frozen=True)
class QuantizedRows:
    """Rows [rows, columns] as products read them, their scales [rows, 1], and where the level may be the next one."""

    values: Array
    scale: Array
    unsure: Array

    @property
    def sure_rows(self) -> Array:
        return ~self.unsure.any(axis=1)


def quantize_rows(rows: Array, near: float) -> QuantizedRows:
    """`near`: how near to the middle between two levels is unsure, in levels. A zero point that is unsure moves levels
    that are cut off at the last one."""
    low = np.minimum(rows.min(axis=1, keepdims=True), 0.0)
    scale = (np.maximum(rows.max(axis=1, keepdims=True), 0.0) - low) / quantized.LEVELS
    steps = np.where(scale > 0, scale, 1.0)
    unsure = _is_near_tie(rows / steps, near) | (_is_near_tie(low / steps, near) & (rows != 0))
    return QuantizedRows(quantized.rows_of_levels(rows), scale, unsure)


def _is_near_tie(values: Array, near: float) -> Array:
    return np.abs(values - np.floor(values) - 0.5) < near


def quantize_weight(weight: Array) -> tuple[Array, Array]:
    """[in, out] -> the levels that operators take, and their scales [out]."""
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-30) / 127
    return quantized.stored(np.clip(np.round(weight / scale), -127, 127)), scale.astype(np.float32)


def redrawn(draw: Callable[[int], Array], is_sure: Callable[[Array], Array], rows: int) -> Array:
    """Rows that are all sure: draw(count) gives rows, is_sure(rows) says which of them may stay."""
    x = draw(rows)
    for _ in range(400):
        again = np.flatnonzero(~is_sure(x))
        if again.size == 0:
            return x
        x[again] = draw(again.size)
    raise AssertionError(f"{again.size} of {rows} rows lie near the middle of two levels whatever is drawn")


@dataclass(frozen=True)
class QuantizedFeedForward:
    """A call of the kernel. Strides of 0 are the rows' own length."""

    rows: int
    channels: int
    hidden: int
    groups: int = 1
    activation: str = "Gelu"
    x_stride: int = 0
    y_stride: int = 0
    misalignments: Sequence[int] = (0,) * 9
    mean: float = 0.0
    """Of the rows of x, whose spread is 1."""

    @property
    def form(self) -> str:
        return "QuantizedFeedForward" + self.activation

    def weights(self) -> list[Array]:
        """norm_scale, norm_bias, weight1, its scale, bias1, weight2, its scale, bias2."""
        rng = np.random.default_rng(self.channels * 31 + self.hidden)
        weight1 = random(rng, self.channels, self.hidden) / np.float32(np.sqrt(self.channels))
        weight2 = random(rng, self.hidden, self.channels) / np.float32(np.sqrt(self.hidden))
        norm = [1 + random(rng, self.channels) / 4, random(rng, self.channels) / 4]
        first = [*quantize_weight(weight1), random(rng, self.hidden)]
        return [*norm, *first, *quantize_weight(weight2), random(rng, self.channels)]

    def arrays(self) -> list[Array]:
        """The operator's inputs in its order; no row of x lies near the middle of two levels."""
        rng = np.random.default_rng(self.rows * 7919 + self.channels * 31 + self.hidden)
        weights = self.weights()

        def draw(count: int) -> Array:
            return random(rng, count, self.channels) + np.float32(self.mean)

        return [redrawn(draw, lambda x: self._sure_rows(x, weights), self.rows), *weights]

    def case(self, arrays: Sequence[Array]) -> Case:
        x, *weights = arrays
        x_stride, y_stride = self.x_stride or self.channels, self.y_stride or self.channels
        sizes = [self.rows, self.channels, self.hidden, self.groups, x_stride, y_stride]
        ints = [ACTIVATION_NUMBERS[self.activation], *sizes]
        given = [with_stride(x, x_stride), *weights]
        return Case("quantized_feed_forward", given, ints, [EPSILON], self.misalignments)

    def expected(self, arrays: Sequence[Array]) -> Array:
        return FORMS[self.form].reference(*arrays, epsilon=EPSILON, groups=self.groups)[0]

    def _sure_rows(self, x: Array, weights: Sequence[Array]) -> Array:
        norm_scale, norm_bias, weight1, scale1, bias1, *_ = weights
        if x.shape[0] == 0:
            return np.ones(0, bool)
        rows = layer_norm.reference(x, norm_scale, norm_bias, EPSILON)
        first = quantized.product(rows, weight1, scale1) + bias1.astype(np.float64)
        groups = np.split(ACTIVATIONS[self.activation](first), self.groups, axis=1)
        levels = [quantize_rows(rows, NEAR_X), *(quantize_rows(group, NEAR_HIDDEN) for group in groups)]
        return np.logical_and.reduce([part.sure_rows for part in levels])

    def check(self, output: Array, arrays: Sequence[Array]) -> None:
        y = rows_of(output, self.rows, self.channels, self.y_stride or self.channels)
        assert_close(y, self.expected(arrays), 4.0, self.channels + self.hidden)


@dataclass(frozen=True)
class BlockSizes:
    batch: int
    windows: int
    length: int
    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class QuantizedAttentionBlock:
    """A call of a form over an index map. `padding`: places of no token, and as many tokens of no window."""

    suffix: str
    sizes: BlockSizes
    padding: int = 2

    @property
    def form(self) -> str:
        return "QuantizedAttentionBlock" + self.suffix

    @property
    def empty_places(self) -> int:
        places = self.sizes.windows * self.sizes.length
        return min(self.padding, places - 1) if "Padded" in self.suffix else 0

    @property
    def tokens(self) -> int:
        outside = self.empty_places
        return self.sizes.windows * self.sizes.length - self.empty_places + outside

    @property
    def attributes(self) -> dict[str, float | int]:
        return {"epsilon": 1e-5, "heads": self.sizes.heads, "scale": 0.3, "tokens": self.tokens}

    def feeds(self, seed: int = 0) -> dict[str, Array]:
        """The operator's inputs in its order; no normalized row of x lies near the middle of two levels."""
        rng, s, c = np.random.default_rng(seed), self.sizes, self.sizes.channels
        weight_qkv, scale_qkv = quantize_weight(random(rng, c, 3 * c) * c**-0.5)
        weight_out, scale_out = quantize_weight(random(rng, c, c) * c**-0.5)
        places = s.windows * s.length
        index = np.full(places, -1)
        index[rng.permutation(places)[: places - self.empty_places]] = rng.permutation(self.tokens)[
            : places - self.empty_places
        ]
        norm_scale, norm_bias = 1 + random(rng, c) / 5, random(rng, c) / 5

        def is_sure(rows: Array) -> Array:
            return quantize_rows(layer_norm.reference(rows, norm_scale, norm_bias, 1e-5), NEAR_X).sure_rows

        x = redrawn(lambda count: 3 + random(rng, count, c), is_sure, s.batch * self.tokens)
        feeds = {
            "x": x.reshape(s.batch, self.tokens, c),
            "norm_scale": norm_scale,
            "norm_bias": norm_bias,
            "weight_qkv": weight_qkv,
            "weight_qkv_scale": scale_qkv,
            "bias_qkv": random(rng, 3 * c) / 3,
            "weight_out": weight_out,
            "weight_out_scale": scale_out,
            "bias_out": random(rng, c) / 3,
            "index": index.reshape(s.windows, s.length).astype(np.int64),
        }
        extra = {
            "Padded": {"fill": random(rng, 3, s.heads, s.head_dim)},
            "Cosine": {"head_scale": 2 + np.abs(random(rng, s.heads))},
            "Bias": {
                "windows_bias": random(rng, 2, s.heads, s.length, s.length),
                "bias_index": rng.integers(0, 2, s.windows),
            },
        }
        for part, arrays in extra.items():
            feeds |= arrays if part in self.suffix else {}
        return feeds

    def case(self, feeds: dict[str, Array], together: int) -> Case:
        flags = [int(word in self.suffix) for word in ("Padded", "Cosine", "Bias")]
        return Case(
            "quantized_attention_block",
            list(feeds.values()),
            ints=[*flags, self.sizes.heads, together],
            floats=[self.attributes["epsilon"], self.attributes["scale"]],
            misalignments=[0 if v.dtype == np.int64 else 1 for v in feeds.values()],
        )

    def check(self, output: Array, feeds: dict[str, Array]) -> None:
        """A token whose attended row has numbers near the middle of two levels may be off by these levels."""
        (expected,) = FORMS[self.form].reference(*feeds.values(), **self.attributes)
        assert output.shape == expected.shape
        assert output.dtype == np.float32
        allowed = 2e-5 * np.abs(expected).max() + self.unsure(feeds)
        worst = np.max(np.abs(output - expected) / allowed)
        assert worst <= 1, f"off by {worst:.2f} of what is allowed"

    def unsure(self, feeds: dict[str, Array]) -> Array:
        """By how much each number of the output may differ for levels that may be the next one."""
        x, s = feeds["x"], self.sizes
        rows = layer_norm.reference(x, feeds["norm_scale"], feeds["norm_bias"], 1e-5)
        qkv = quantized.product(rows, feeds["weight_qkv"], feeds["weight_qkv_scale"]) + feeds["bias_qkv"]
        inner = FORMS["PackedAttention" + self.suffix]
        packed = qkv.reshape(s.batch, self.tokens, 3, s.heads, s.head_dim)
        extra = [feeds[i.name] for i in inner.inputs[1:]]
        (attended,) = inner.reference(packed, *extra, **{n: self.attributes[n] for n in inner.attributes})
        levels = quantize_rows(attended.reshape(-1, s.channels), NEAR_ATTENDED)
        weight_out = np.abs(quantized.weights(feeds["weight_out"], feeds["weight_out_scale"]))
        return ((levels.unsure * levels.scale) @ weight_out).reshape(x.shape)
