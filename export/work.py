"""How much of a model's work is attention: multiply-adds and bytes of the rewritten graph, and those of its sites.

Multiply-adds are those of matrix products, convolutions and our operators; what is computed element by element is not
counted, as usual. Bytes are what every operator reads and writes, each operand at each of its readers, weights in full;
views move nothing. So the share of the bytes is that of a runtime that fuses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import Node

from attn_deploy.export.forms import form_and_operands
from attn_deploy.export.graph import MOVEMENT, aten, concrete, constants, is_size, is_tensor, shape_of
from attn_deploy.export.rewrite import RewrittenModel

FREE = MOVEMENT | {aten.expand.default, aten.alias.default}
"""Views, and movement that a runtime may do without."""

CONVOLUTIONS = frozenset(
    {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
     aten.conv3d.padding, aten.convolution.default}
)  # fmt: skip
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input})
PRODUCTS = frozenset({aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default})
ADDED_PRODUCTS = frozenset({aten.addmm.default, aten.baddbmm.default})


@dataclass(frozen=True)
class Work:
    """Per sample: 2 x multiply-adds and bytes of the whole model, and of the operators of its sites."""

    flops: int
    bytes: int
    site_flops: int
    site_bytes: int


def count_work(rewritten: RewrittenModel) -> Work:
    graph = rewritten.program.graph
    known = constants(rewritten.program)
    samples = rewritten.captured.batch or rewritten.captured.inputs[0].shape[0]
    sites = {site.node for site in rewritten.sites}
    at_run_time = {n for n in graph.nodes if n.op == "placeholder" and n.name not in known}
    flops = moved = site_flops = site_bytes = 0
    for node in graph.nodes:
        if node.op != "call_function" or is_size(node) or at_run_time.isdisjoint(node.all_input_nodes):
            continue
        at_run_time.add(node)
        work, traffic = 2 * multiply_adds(node) // samples, _bytes(node, samples, at_run_time)
        flops, moved = flops + work, moved + traffic
        if node.name in sites:
            site_flops, site_bytes = site_flops + work, site_bytes + traffic
    return Work(flops, moved, site_flops, site_bytes)


def multiply_adds(node: Node) -> int:
    """Of one node at the example batch; 0 for what is neither a product nor one of our operators."""
    target = node.target
    if str(target).startswith("attn_deploy."):
        form, operands, attributes = form_and_operands(str(target).split(".")[1], node.args)
        return form.multiply_adds(*(shape_of(o) for o in operands), **attributes)
    shapes = [shape_of(n) for n in node.args if is_tensor(n)]
    if target is aten.einsum.default:
        return _einsum(node)
    if target is aten.scaled_dot_product_attention.default:
        query, key, value = shapes[:3]
        return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if target in TRANSPOSED:
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if target in CONVOLUTIONS:
        return math.prod(shape_of(node)) * math.prod(shapes[1][1:])
    if target in PRODUCTS:
        return math.prod(shape_of(node)) * shapes[0][-1]
    return math.prod(shape_of(node)) * shapes[1][-1] if target in ADDED_PRODUCTS else 0


def _einsum(node: Node) -> int:
    """All combinations of the indices; what an ellipsis stands for counts with the first operand."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    sizes: dict[str, int] = {}
    for term, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        assert isinstance(operand, Node)
        before, dots, after = term.partition("...")
        shape = shape_of(operand)
        sizes.update(zip(before, shape, strict=False))
        sizes.update(zip(reversed(after), reversed(shape), strict=False))
        if dots:
            sizes.setdefault("...", math.prod(shape[len(before) : len(shape) - len(after)]))
    return math.prod(sizes.values())


def _bytes(node: Node, samples: int, at_run_time: Collection[Node]) -> int:
    if node.target in FREE:
        return 0
    operands = [n for n in node.all_input_nodes if is_tensor(n)]
    read = sum(_size(n.meta["val"]) // (samples if n in at_run_time else 1) for n in operands)
    results = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    return read + sum(_size(r) for r in results if isinstance(r, torch.Tensor)) // samples


def _size(value: torch.Tensor) -> int:
    return math.prod(concrete(d) for d in value.shape) * value.element_size()
