"""Activations between and behind linear layers: in float64, and as statements of a function body.

SiLU, GELU and its tanh approximation: Hendrycks and Gimpel 2016, section 2; HardSwish: Howard et al., MobileNetV3,
2019, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from attn_deploy.ops.form import Array

_ERFC = np.frompyfunc(math.erfc, 1, 1)
_TANH_CUBIC = 0.044715


def _at_minus_infinity(x: Array, factor: Array) -> Array:
    """x * factor, where a factor of 0 at -inf gives the limit 0 and not NaN."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(x), -0.0, x * factor)


def silu(x: Array) -> Array:
    """x * sigmoid(x) without cancellation for large negative x; 0 at -inf."""
    small = np.exp(-np.abs(x))
    return _at_minus_infinity(x, np.where(x < 0, small, 1.0) / (1.0 + small))


def gelu(x: Array) -> Array:
    """x times the normal distribution's cumulative probability, by erfc: no cancellation for large negative x."""
    return _at_minus_infinity(x, 0.5 * np.asarray(_ERFC(-x / math.sqrt(2.0)), dtype=np.float64))


def gelu_tanh(x: Array) -> Array:
    """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))); 1 + tanh(t) is 2 / (1 + exp(-2t))."""
    t = math.sqrt(2.0 / math.pi) * (x + _TANH_CUBIC * x**3)
    with np.errstate(over="ignore"):
        return _at_minus_infinity(x, 1.0 / (1.0 + np.exp(-2.0 * t)))


def hard_swish(x: Array) -> Array:
    return _at_minus_infinity(x, np.clip(x / 6.0 + 0.5, 0.0, 1.0))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "": lambda x: x,
    "Relu": lambda x: np.maximum(x, 0.0),
    "Silu": silu,
    "Gelu": gelu,
    "GeluTanh": gelu_tanh,
    "Hardswish": hard_swish,
}
"""By the part of an operator's name that asks for it."""


def statements(activation: str, x: str, result: str) -> tuple[str, ...]:
    """ONNX statements that make `result` of `x`."""
    if activation == "Silu":
        return (f"{result}_sigmoid = Sigmoid ({x})", f"{result} = Mul ({x}, {result}_sigmoid)")
    call = {
        "": "Identity",
        "Relu": "Relu",
        "Gelu": "Gelu",
        "GeluTanh": 'Gelu <approximate: string = "tanh">',
        "Hardswish": "HardSwish",
    }[activation]
    return (f"{result} = {call} ({x})",)
