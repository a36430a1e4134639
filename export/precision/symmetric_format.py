"""The 8-bit types that TensorRT multiplies in: signed integers, and E4M3.

Both are symmetric: a scale and no zero point. E4M3 has 4 bits of exponent, 3 of mantissa and no infinity (Micikevicius
et al., FP8 Formats for Deep Learning, 2022, section 3): what lies beyond its largest value is cut off there, as
QuantizeLinear does with `saturate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.quantize_weight import quantize_weight
from attn_deploy.export.precision.ranges import SMALLEST_SCALE, RangeMethod
from attn_deploy.precision_plan import Scheme
from attn_deploy.session import Array
from attn_deploy.target import Precision


@dataclass(frozen=True)
class SymmetricFormat:
    """`largest` is the value of the last level on each side of zero. `methods` are the ranges worth trying: levels of
    E4M3 stand as dense around every value as around any other, so nothing is gained by cutting the largest off."""

    dtype: ir.DataType
    largest: float
    scheme: Scheme
    methods: tuple[RangeMethod, ...]

    def zero_point(self, count: int | None = None) -> Array:
        """[] or [count]."""
        return np.zeros(() if count is None else (count,), self.dtype.numpy())

    def activation_scale(self, limit: float) -> Array:
        """The scale, float32 [], with which the last level stands for |x| = `limit`."""
        return np.array(max(limit / self.largest, SMALLEST_SCALE), np.float32)

    def quantize_weight(self, weight: Array, axis: int) -> tuple[Array, Array]:
        """weight -> (levels of the same shape, float32 scale [channels]), a scale per channel of `axis`."""
        if self.dtype is ir.DataType.INT8:
            return quantize_weight(weight, axis)
        rest = tuple(a for a in range(weight.ndim) if a != axis)
        # a scale that FP16 holds whole costs E4M3 nothing: a smaller weight has another exponent
        scale = np.maximum(np.abs(weight).max(axis=rest) / self.largest, SMALLEST_SCALE).astype(np.float32)
        levels = np.clip(weight / np.expand_dims(scale, rest), -self.largest, self.largest)
        return levels.astype(self.dtype.numpy()), scale


INT8 = SymmetricFormat(
    ir.DataType.INT8, 127.0, Scheme.STATIC, (RangeMethod.MIN_MAX, RangeMethod.PERCENTILE, RangeMethod.MSE)
)
FP8 = SymmetricFormat(ir.DataType.FLOAT8E4M3FN, 448.0, Scheme.FP8, (RangeMethod.MIN_MAX,))

FORMATS: Mapping[Precision, SymmetricFormat] = MappingProxyType({Precision.INT8: INT8, Precision.FP8: FP8})


def format_of(precision: Precision) -> SymmetricFormat:
    """Raises UsageError for a precision that is not quantized."""
    found = FORMATS.get(precision)
    if found is None:
        raise UsageError("a symmetric format is INT8 or FP8", got=precision, expected="int8 or fp8")
    return found
