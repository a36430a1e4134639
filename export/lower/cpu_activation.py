"""Activations as they stand in a graph, whole or written out, told by their values.

GELU by erf or by tanh, SiLU and HardSwish are written in many ways: 0.5 * x first or last, x / sqrt(2) or
x * 0.7071068, clip(x + 3, 0, 6) or a hard sigmoid. What stands behind a layer element by element is computed on points
of the whole range and compared with the activations that the operators have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import constant_of
from attn_deploy.ops.activation import ACTIVATIONS
from attn_deploy.session import Array

MOST_NODES = 12
"""GELU by tanh takes nine."""

_POINTS = np.concatenate([np.linspace(-12.0, 12.0, 385), [-100.0, -30.0, 30.0, 100.0]])
_TOLERANCE = 2e-6
"""Relative to 1 + |value|: constants are rounded to FP32. GELU and its tanh form are 5e-4 apart."""

_EXPECTED = {name: function(_POINTS) for name, function in ACTIVATIONS.items() if name}
_ERF = np.frompyfunc(math.erf, 1, 1)


@dataclass(frozen=True)
class Found:
    """`name` as in the operators' names; `nodes` in an order in which they can run, the last makes the result."""

    name: str
    nodes: tuple[ir.Node, ...]


def activation_behind(x: ir.Value) -> Found | None:
    """The activation that all that reads `x` belongs to; nothing else reads a value inside it."""
    values: dict[ir.Value, Array] = {x: _POINTS}
    nodes: list[ir.Node] = []
    while len(nodes) < MOST_NODES and not any(v.is_graph_output() for v in values):
        node = _next(values, nodes)
        if node is None:
            return None
        nodes.append(node)
        result = node.outputs[0]
        values[result] = _evaluate(node, values)
        name = _name(values[result]) if _all_inside(values, nodes, result) else None
        if name is not None:
            return Found(name, tuple(nodes))
    return None


def _next(values: dict[ir.Value, Array], nodes: list[ir.Node]) -> ir.Node | None:
    """A reader of known values that reads nothing else but single constants."""
    readers = (reader for value in values for reader, _ in value.uses() if reader not in nodes)
    return next((r for r in readers if r.op_type in _OPERATIONS and not r.domain and _known(r, values)), None)


def _known(node: ir.Node, values: dict[ir.Value, Array]) -> bool:
    return all(i is None or i in values or _number(i) is not None for i in node.inputs)


def _all_inside(values: dict[ir.Value, Array], nodes: list[ir.Node], result: ir.Value) -> bool:
    return all(reader in nodes for value in values if value is not result for reader, _ in value.uses())


def _number(value: ir.Value) -> float | None:
    array = constant_of(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.ndim < 2 else None


def _name(got: Array) -> str | None:
    for name, expected in _EXPECTED.items():
        if (np.abs(got - expected) <= _TOLERANCE * (1.0 + np.abs(expected))).all():
            return name
    return None


def _evaluate(node: ir.Node, values: dict[ir.Value, Array]) -> Array:
    operands = [None if i is None else values[i] if i in values else _number(i) for i in node.inputs]
    with np.errstate(all="ignore"):
        return np.asarray(_OPERATIONS[node.op_type](node, *operands), dtype=np.float64)


def _clip(node: ir.Node, x: Array, low: float | None = None, high: float | None = None) -> Array:
    return np.clip(x, -np.inf if low is None else low, np.inf if high is None else high)


def _hard_sigmoid(node: ir.Node, x: Array) -> Array:
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    assert alpha is not None
    assert beta is not None
    return np.clip(alpha * x + beta, 0.0, 1.0)


def _swish(node: ir.Node, x: Array) -> Array:
    alpha = node.attributes.get_float("alpha", 1.0)
    assert alpha is not None
    return x / (1.0 + np.exp(-alpha * x))


def _gelu(node: ir.Node, x: Array) -> Array:
    by_tanh = node.attributes.get_string("approximate", "none") == "tanh"
    return ACTIVATIONS["GeluTanh" if by_tanh else "Gelu"](x)


_OPERATIONS: dict[str, Callable[..., Array]] = {
    "Add": lambda _, a, b: a + b,
    "Clip": _clip,
    "Div": lambda _, a, b: a / b,
    "Erf": lambda _, x: np.asarray(_ERF(x), dtype=np.float64),
    "Exp": lambda _, x: np.exp(x),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda _, x: ACTIVATIONS["Hardswish"](x),
    "Max": lambda _, *x: np.maximum.reduce(np.broadcast_arrays(*x)),
    "Min": lambda _, *x: np.minimum.reduce(np.broadcast_arrays(*x)),
    "Mul": lambda _, a, b: a * b,
    "Neg": lambda _, x: -x,
    "Pow": lambda _, a, b: np.power(a, b),
    "Reciprocal": lambda _, x: 1.0 / x,
    "Relu": lambda _, x: np.maximum(x, 0.0),
    "Sigmoid": lambda _, x: 1.0 / (1.0 + np.exp(-x)),
    "Sub": lambda _, a, b: a - b,
    "Swish": _swish,
    "Tanh": lambda _, x: np.tanh(x),
}
"""Element by element, in float64: what activations are written with."""
