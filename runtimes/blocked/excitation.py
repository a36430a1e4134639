"""The branch of channel attention between its pool and its gate, on the pooled vector in one operator.

Squeeze-and-excitation (Hu et al. 2018, equation 3): two 1x1 convolutions with an activation between and a sigmoid
after. Efficient channel attention (Wang et al. 2020, equation 6): a convolution along the channels and a sigmoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attn_deploy.runtimes.blocked.activations import activation
from attn_deploy.runtimes.blocked.graph import MICROSOFT, NCHWC, Graph, attribute, is_a
from attn_deploy.runtimes.blocked.layout import Layout, Map, conv_activation, is_pointwise, optional, plain_weight
from attn_deploy.session import Array

if TYPE_CHECKING:
    import onnx


def excite(layout: Layout) -> int:
    """BlockedPool -> nchwc.Conv -> activation -> nchwc.Conv(Sigmoid) becomes BlockedPool -> BlockedExcite...; the same
    for a convolution along the channels and BlockedEca."""
    replaced = 0
    for node in list(layout.graph.nodes):
        if is_pointwise(node) and conv_activation(node) in ("Sigmoid", "HardSigmoid"):
            replaced += _squeeze_excite(layout, node)
        elif is_a(node, MICROSOFT, "FusedConv") and attribute(node, "activation") == "Sigmoid":
            replaced += _channel_conv(layout, node)
    return replaced


def _squeeze_excite(layout: Layout, expand: onnx.NodeProto) -> int:
    """`expand` is the second convolution."""
    graph = layout.graph
    inner, reduce = _before(layout, expand.input[0])
    if reduce is None or inner is None or not is_pointwise(reduce) or optional(reduce, 3) or optional(expand, 3):
        return 0
    pooled = reduce.input[0]
    channels, squeezed = layout.channels(pooled), graph.shape(pooled)
    operator = f"BlockedExcite{inner}{conv_activation(expand)}"
    if channels is None or squeezed is None or squeezed[2:] != (1, 1) or operator not in layout.operators:
        return 0
    first, second = _dense(layout, reduce), _dense(layout, expand)
    if first is None or second is None or first[0].shape[1] != channels or second[0].shape[0] != channels:
        return 0
    hidden = second[0].shape[1]  # unpadded where the second convolution reads a plain vector
    weights = (first[0][:hidden], first[1][:hidden], second[0][:, : len(first[1][:hidden])], second[1])
    inputs = [pooled, *(graph.add_constant(w, f"{expand.name}/{operator}/{n}") for n, w in enumerate(weights))]
    gate = expand.output[0]
    (made,) = layout.add(operator, inputs, channels=channels, name=expand.name, shapes=[graph.shape(gate)])
    graph.replace(gate, made)
    graph.remove(expand)
    return 1


def _before(layout: Layout, value: str) -> tuple[str | None, onnx.NodeProto | None]:
    """(activation, convolution) that a pooled vector comes from, through the reorders that leave its bytes alone."""
    graph = layout.graph
    node = graph.producer(_through_reorders(graph, value))
    if node is None or any(graph.only_consumer(o) is None for o in node.output):
        return None, None
    if is_a(node, NCHWC, "Conv"):
        return conv_activation(node) or None, node
    inner = activation(node)
    if inner is None:
        return None, None
    conv = graph.producer(_through_reorders(graph, node.input[0]))
    if not is_a(conv, NCHWC, "Conv") or conv is None or conv_activation(conv) != "":
        return None, None
    return inner, conv


def _through_reorders(graph: Graph, value: str) -> str:
    while is_a(node := graph.producer(value), NCHWC, "ReorderOutput", "ReorderInput"):
        assert node is not None
        value = node.input[0]
    return value


def _dense(layout: Layout, conv: onnx.NodeProto) -> tuple[Array, Array] | None:
    """Its weight [out, in] and bias [out], padding included; None where they are no constants."""
    weight = layout.graph.constant(conv.input[1])
    if weight is None:
        return None
    bias = np.zeros(weight.shape[0], np.float32)
    if optional(conv, 2):
        given = layout.graph.constant(conv.input[2])
        if given is None:
            return None
        bias[: len(given)] = given
    return plain_weight(weight, layout.block), bias


def _channel_conv(layout: Layout, conv: onnx.NodeProto) -> int:
    """ReorderOutput -> Reshape -> FusedConv along the channels -> Reshape; the Reshapes are told by their shapes."""
    graph = layout.graph
    if "BlockedEca" not in layout.operators:
        return 0
    into, out = graph.producer(conv.input[0]), graph.only_consumer(conv.output[0])
    weight = graph.constant(conv.input[1])
    if not is_a(into, "", "Reshape") or not is_a(out, "", "Reshape", "Unsqueeze") or weight is None:
        return 0
    assert into is not None
    assert out is not None
    pooled, gate = layout.blocked(into.input[0]), graph.shape(out.output[0])
    width = weight.shape[-1]
    along = weight.shape == (1, 1, width) and width % 2 == 1 and not optional(conv, 2)
    same = attribute(conv, "pads", [0, 0]) == [width // 2] * 2 and attribute(conv, "strides", [1]) == [1]
    if pooled is None or not along or not same or attribute(conv, "dilations", [1]) != [1]:
        return 0
    line = graph.shape(conv.input[0])
    if line is None or line[1:] != (1, pooled.channels) or gate is None or gate[1:] != (pooled.channels, 1, 1):
        return 0
    kernel = graph.add_constant(weight.reshape(width), f"{conv.name}/BlockedEca/weight")
    (made,) = layout.add(
        "BlockedEca", [pooled.value, kernel], channels=pooled.channels, name=conv.name,
        shapes=[(gate[0], layout.padded(pooled.channels), 1, 1)],
    )  # fmt: skip
    plain = out.output[0]
    if plain in graph.outputs:
        return 0
    layout.settle(plain, Map(made, pooled.channels), out.name)
    graph.remove(out)
    return 1
