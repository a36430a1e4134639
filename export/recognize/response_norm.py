"""Global response normalization: x * N(x), N = G / mean of G over the channels, G the L2 norm of every channel's plane
(Woo et al., ConvNeXt V2, 2023, equations 1 to 3), in any layout; with the scale, the shift and the sum with x behind.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attn_deploy.export.graph import aten, evaluate, only_user, shape_of
from attn_deploy.export.recognize.dependence import Dataflow, Dependence, Product


@dataclass(frozen=True)
class ResponseNormMatch:
    """x * (scale * response + identity) + shift.

    `response` is N; it broadcasts to x. `scale` and `shift` are nodes of constants, or None; `shift_value` is what
    `shift` holds. `identity` says that x itself is added.
    """

    x: Node
    response: Node
    scale: Node | None
    shift: Node | None
    shift_value: Tensor | None
    identity: bool
    product: Node
    result: Node


def is_response(flow: Dataflow, x: Node, dependence: Dependence) -> bool:
    """True when the value is the formula's N, seen by running both."""
    shape, gate_shape = shape_of(x), shape_of(dependence.value)
    if len(gate_shape) != len(shape):
        return False
    kept = [axis for axis in range(1, len(shape)) if gate_shape[axis] != 1]
    if len(kept) != 1 or gate_shape != tuple(d if axis in (0, *kept) else 1 for axis, d in enumerate(shape)):
        return False
    plane = [axis for axis in range(1, len(shape)) if axis not in kept]
    values, got = flow.probe(dependence, x), flow.probe(dependence, dependence.value)
    if values is None or got is None:
        return False
    norm = torch.linalg.vector_norm(values, dim=plane, keepdim=True)
    return torch.allclose(got, norm / norm.mean(kept, keepdim=True), rtol=1e-3)


def match(flow: Dataflow, product: Product, x: Node, response: Node) -> ResponseNormMatch:
    """Takes in the constants that scale and shift the product, and the sum with x (the product's addend, if any)."""
    scale = shift = None
    identity = product.addend is not None
    result = product.node
    while (user := only_user(result)) is not None:
        constant = [n for n in user.all_input_nodes if n is not result and not flow.is_runtime(n)]
        is_sum = user.target is aten.add.Tensor and not user.kwargs
        unscaled = scale is None and shift is None and not identity
        if unscaled and user.target is aten.addcmul.default and not user.kwargs:
            factors = [n for n in user.args[1:3] if n is not result]
            if len(constant) != 2 or not _fits(factors, response):
                break
            shift, scale = user.args[0], factors[0]
        elif unscaled and user.target is aten.mul.Tensor and _fits(constant, response):
            scale = constant[0]
        elif is_sum and shift is None and len(constant) == 1:
            shift = constant[0]
        elif is_sum and not identity and x in user.args[:2]:
            identity = True
        else:
            break
        result = user
    value = None if shift is None else evaluate(shift, flow.known)
    return ResponseNormMatch(x, response, scale, shift, value, identity, product.node, result)


def _fits(constant: list[Node], response: Node) -> bool:
    """True when it is one constant, and multiplying the response by it keeps the response's shape."""
    if len(constant) != 1 or not isinstance(constant[0], Node):
        return False
    shape, kept = shape_of(constant[0]), shape_of(response)
    return len(shape) <= len(kept) and all(a in (1, b) for a, b in zip(shape[::-1], kept[::-1], strict=False))
