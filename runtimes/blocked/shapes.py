"""Shapes of values that ONNX Runtime saves without: those in its blocked layout, and sums of maps of symbolic batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attn_deploy.runtimes.blocked.graph import MICROSOFT, NCHWC, Dims, Graph, attribute, is_a
from attn_deploy.session import Array

if TYPE_CHECKING:
    import onnx

_SAME = ("Relu", "HardSwish", "HardSigmoid", "Sigmoid", "Gelu", "Add", "Mul")


def infer_shapes(graph: Graph, block: int) -> None:
    """Fills in what is missing, in the order of the nodes. What cannot be told stays unknown."""
    for node in graph.nodes:
        if len(node.output) == 1 and graph.shape(node.output[0]) is None:
            dims = _shape(graph, node, block)
            if dims is not None:
                graph.set_shape(node.output[0], dims)


def _shape(graph: Graph, node: onnx.NodeProto, block: int) -> Dims | None:
    first = graph.shape(node.input[0]) if node.input else None
    if first is None:
        return None
    if is_a(node, MICROSOFT, "QuickGelu") or is_a(node, "", *_SAME):
        return _broadcast([graph.shape(value) for value in node.input])
    if is_a(node, "", "Reshape"):
        return _reshaped(first, graph.constant(node.input[1]))
    if is_a(node, NCHWC, "Conv") or is_a(node, MICROSOFT, "FusedConv"):
        weight = graph.shape(node.input[1])
        return None if weight is None else (first[0], weight[0], *_plane(node, first, weight[2:]))
    if len(first) != 4:
        return None
    if is_a(node, NCHWC, "ReorderInput") and isinstance(first[1], int):
        return (first[0], -(-first[1] // block) * block, *first[2:])
    if is_a(node, NCHWC, "ReorderOutput"):
        return (first[0], int(attribute(node, "channels")), *first[2:])
    if is_a(node, NCHWC, "GlobalAveragePool", "GlobalMaxPool") or is_a(node, "", "GlobalAveragePool"):
        return (*first[:2], 1, 1)
    if is_a(node, NCHWC, "MaxPool", "AveragePool"):
        return (*first[:2], *_plane(node, first, tuple(attribute(node, "kernel_shape"))))
    return None


def _broadcast(shapes: list[Dims | None]) -> Dims | None:
    """Of operands of one rank; a dim of 1 gives way."""
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes) or len({len(s) for s in known}) > 1:
        return None
    return tuple(next((d for d in dims if d != 1), 1) for dims in zip(*known, strict=True))


def _reshaped(dims: Dims, target: Array | None) -> Dims | None:
    """With the dims that the target copies (0); one that it leaves to be computed (-1) is not told."""
    if target is None or any(size == 0 and axis >= len(dims) for axis, size in enumerate(target)):
        return None
    return tuple(dims[axis] if size == 0 else int(size) if size > 0 else "?" for axis, size in enumerate(target))


def _plane(node: onnx.NodeProto, dims: Dims, kernel: Dims) -> tuple[int | str, ...]:
    """The dims behind [batch, channels] of what a convolution or pool makes of `dims`."""
    count = len(kernel)
    pads, strides = attribute(node, "pads", [0] * 2 * count), attribute(node, "strides", [1] * count)
    dilations = attribute(node, "dilations", [1] * count)
    plane: list[int | str] = []
    for axis, (size, taps) in enumerate(zip(dims[2:], kernel, strict=True)):
        if not isinstance(size, int) or not isinstance(taps, int):
            plane.append("?")
            continue
        room = size + pads[axis] + pads[axis + count] - dilations[axis] * (taps - 1) - 1
        plane.append((-(-room // strides[axis]) if attribute(node, "ceil_mode", 0) else room // strides[axis]) + 1)
    return tuple(plane)
