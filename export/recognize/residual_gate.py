"""Residual attention: (1 + M) * T (Wang et al., Residual Attention Network for Image Classification, 2017, equation 3),
also spelled T + M * T. M is a mask between 0 and 1 and T the trunk; both come from the same block's input.

The "1 +" or the sum with T itself is what tells it from a gated linear unit. Two halves of one projection are still
none, nor is T * (1 + scale) of a modulation (FiLM, adaptive normalization), whose scale is not bounded.
"""

from __future__ import annotations

from torch.fx import Node

from attn_deploy.export.graph import aten, movement_source, only_user
from attn_deploy.export.recognize.dependence import RAW, Dataflow, Product
from attn_deploy.export.recognize.spatial_gate import squashed


def mask_of(flow: Dataflow, product: Product, x: Node, gate: Node) -> Node | None:
    """M where the product, with the sum it is part of, is x * (1 + M); None where it is not."""
    mask = one_plus(gate)
    if mask is None:
        if not _adds_itself(product, x):
            return None
        mask = gate
    source = squashed(flow, mask)
    if source is None or movement_source(source) is movement_source(x):
        return None
    dependence = flow.dependence(x, mask)
    return None if dependence is not None and dependence.ways in RAW else mask


def one_plus(gate: Node) -> Node | None:
    """M of the node 1 + M."""
    if gate.target not in (aten.add.Tensor, aten.add.Scalar) or gate.kwargs:
        return None
    left, right = gate.args[:2]
    if isinstance(left, Node) and not isinstance(right, Node) and right == 1:
        return left
    return right if isinstance(right, Node) and not isinstance(left, Node) and left == 1 else None


def _adds_itself(product: Product, x: Node) -> bool:
    if product.addend is not None:
        return product.addend is x
    add = only_user(product.node)
    return add is not None and add.target is aten.add.Tensor and not add.kwargs and x in add.args[:2]
