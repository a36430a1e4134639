"""Pixel attention: x * sigmoid(f(x)), with f a convolution or a linear layer and no pool (Zhao et al., Efficient Image
Super-Resolution Using Pixel Attention, 2020, section 3.2).

Three rules keep other products out. The gate lies between 0 and 1 whatever comes in: VAN's x * conv(x) is none. It
mixes channels or pixels of x: SiLU and hard-swish, which see one element, are activations. It is computed from x and
from nothing else: the two halves of a GLU or SwiGLU come from one projection, but neither from the other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import evaluate, shape_of
from attn_deploy.export.recognize.dependence import Dataflow, Way, packet

_SQUASHING = frozenset({
    "sigmoid", "hardsigmoid", "tanh", "hardtanh", "relu", "relu6", "clamp", "clamp_min", "clamp_max", "exp",
    "reciprocal", "neg", "add", "sub", "rsub", "mul", "div", "expand", "reshape", "permute", "transpose", "squeeze",
    "unsqueeze", "view", "_to_copy", "to",
})  # fmt: skip
_LONGEST_SQUASH = 8
"""1 / (1 + exp(-x)) with casts and an expansion behind it."""


def is_self_gate(flow: Dataflow, x: Node, gate: Node) -> bool:
    """True when x * gate is pixel attention."""
    dependence = flow.dependence(x, gate)
    if dependence is None or Way.MIXED not in dependence.ways or Way.OTHER in dependence.ways:
        return False
    return squashed(flow, gate) is not None


def squashed(flow: Dataflow, gate: Node) -> Node | None:
    """What the gate brings between 0 and 1, element by element: found by running the end of its computation on a ramp,
    so that it does not matter how sigmoid or hard sigmoid is spelled. None for a gate that is not so bounded."""
    source = gate
    for _ in range(_LONGEST_SQUASH):
        runtime = [n for n in source.all_input_nodes if flow.is_runtime(n)]
        if packet(source) not in _SQUASHING or len(runtime) != 1:
            return None
        source = runtime[0]
        if _is_bounded(flow, gate, source):
            return source
    return None


def _is_bounded(flow: Dataflow, gate: Node, source: Node) -> bool:
    shape, dtype = shape_of(source), source.meta["val"].dtype
    count = math.prod(shape)
    if count < 2 or not dtype.is_floating_point:
        return False
    ramp = torch.linspace(-50.0, 50.0, count, dtype=dtype).reshape(shape)
    try:
        value: Tensor = evaluate(gate, {**flow.known, source.name: ramp})
    except (RuntimeError, TypeError, ValueError):
        return False
    low, high = float(value.min()), float(value.max())
    return low >= -1e-4 and high <= 1 + 1e-4 and high - low > 0.5
