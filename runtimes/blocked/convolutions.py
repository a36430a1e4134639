"""Convolutions of our own where ONNX Runtime's cannot take what stands around them: a gate on either side, SiLU or GELU
behind, a pool over what they make.

Where it can (ReLU, HardSwish, a residual), its convolution stays: both reach the same share of the CPU's peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attn_deploy.runtimes.blocked.activations import ZERO_PRESERVING, activation
from attn_deploy.runtimes.blocked.graph import NCHWC, OURS, Dims, attribute, is_a
from attn_deploy.runtimes.blocked.layout import Layout, conv_activation, is_pointwise, optional

if TYPE_CHECKING:
    import onnx

MOST_TAPS = 15


def pool_before(layout: Layout) -> int:
    """The mean of a 1x1 convolution is the convolution of the mean: BlockedPool(Conv(z)) -> Conv(BlockedPool(z)).

    Nothing then reads the wide map but its gate, which `pointwise` takes into the convolution. Not where the weights,
    read once more, are larger than the map."""
    graph = layout.graph
    moved = 0
    for pool in list(graph.nodes):
        conv = graph.producer(pool.input[0]) if is_a(pool, OURS, "BlockedPool") else None
        if conv is None or not _is_ours_to_do(layout, conv) or optional(conv, 3) or conv_activation(conv) != "":
            continue
        channels, inner = layout.channels(conv.output[0]), layout.channels(conv.input[0])
        dims = graph.shape(conv.input[0])
        if channels is None or inner is None or dims is None or _output_gate(layout, conv, {id(pool)}) is None:
            continue
        height, width = dims[2:]
        if not isinstance(height, int) or not isinstance(width, int) or height * width <= inner:
            continue
        (narrow,) = layout.add(
            "BlockedPool", [conv.input[0]], channels=inner, name=pool.name,
            shapes=[layout.vector_shape(conv.input[0], inner)],
        )  # fmt: skip
        operator = "BlockedPointwise"
        (wide,) = layout.add(
            operator, [narrow, conv.input[1], _bias(layout, conv)], channels=channels, name=pool.name,
            shapes=[layout.vector_shape(narrow, channels)],
        )  # fmt: skip
        graph.replace(pool.output[0], wide)
        graph.remove(pool)
        moved += 1
    return moved


def pointwise(layout: Layout) -> int:
    """Gate -> 1x1 convolution -> gate, residual and activation, as far as they are there, in one operator."""
    replaced = 0
    for conv in list(layout.graph.nodes):
        if _is_ours_to_do(layout, conv):
            replaced += _pointwise(layout, conv)
    return replaced


@dataclass
class _Tail:
    """What follows a convolution: the nodes to merge, and what they bring."""

    nodes: list[onnx.NodeProto]
    gate: str = ""
    residual: str = ""
    suffix: str = ""


def _pointwise(layout: Layout, conv: onnx.NodeProto) -> int:
    graph = layout.graph
    before = graph.producer(conv.input[0])
    gated = before if is_a(before, OURS, "BlockedGate") and _per_channel(layout, before) else None
    if gated is not None and (graph.only_consumer(gated.output[0]) is None or not _pays(layout, conv)):
        gated = None
    tail = _tail(layout, conv)
    if gated is None and not tail.nodes:
        return 0
    gates = ("InputGate" if gated is not None else "") + ("OutputGate" if tail.gate else "")
    operator = f"BlockedPointwise{gates}{'Residual' if tail.residual else ''}{tail.suffix}"
    channels = layout.channels(conv.output[0])
    last = tail.nodes[-1] if tail.nodes else conv
    if operator not in layout.operators or channels is None or last.output[0] in graph.outputs:
        return 0
    inputs = [gated.input[0] if gated is not None else conv.input[0], conv.input[1], _bias(layout, conv)]
    inputs += [*([gated.input[1]] if gated is not None else []), *([tail.gate] if tail.gate else [])]
    inputs += [tail.residual] if tail.residual else []
    named = next((n for n in (*tail.nodes, gated) if n is not None and "Gate" in n.op_type), conv)
    (made,) = layout.add(operator, inputs, channels=channels, name=named.name, shapes=[graph.shape(last.output[0])])
    graph.replace(last.output[0], made)
    for node in (*reversed(tail.nodes), conv, *([gated] if gated is not None else [])):
        graph.remove(node)
    return 1


def _pays(layout: Layout, conv: onnx.NodeProto) -> bool:
    """Whether gating the input channels inside is less work than gating the map: it scales the weights, which are
    smaller than the map where there are more pixels than output channels. (EfficientNet-B0's 7x7 maps: 60 us against
    about 10.)"""
    dims, channels = layout.graph.shape(conv.input[0]), layout.channels(conv.output[0])
    if dims is None or channels is None:
        return False
    height, width = dims[2:]
    return isinstance(height, int) and isinstance(width, int) and height * width >= channels


def _tail(layout: Layout, conv: onnx.NodeProto) -> _Tail:
    graph = layout.graph
    residual, fused = optional(conv, 3), conv_activation(conv) or ""
    gate = _output_gate(layout, conv, set()) if not residual and not fused else None
    if gate is not None:
        rest = gate.op_type.removeprefix("BlockedGate")
        with_residual = rest.startswith("Residual")
        tail = _Tail([gate], gate.input[1], gate.input[2] if with_residual else "", rest.removeprefix("Residual"))
    else:
        tail = _Tail([], "", residual, fused)
    last = graph.only_consumer((tail.nodes[-1] if tail.nodes else conv).output[0])
    name = activation(last)
    if not tail.suffix and name in ZERO_PRESERVING and last is not None:
        tail.nodes.append(last)
        tail.suffix = name or ""
    return tail


def _output_gate(layout: Layout, conv: onnx.NodeProto, others: set[int]) -> onnx.NodeProto | None:
    """The gate that alone, beside `others`, reads what the convolution makes."""
    graph = layout.graph
    if conv.output[0] in graph.outputs:
        return None
    readers = [n for n in graph.consumers(conv.output[0]) if id(n) not in others]
    if len(readers) != 1 or readers[0].domain != OURS or not readers[0].op_type.startswith("BlockedGate"):
        return None
    gate = readers[0]
    return gate if gate.input[0] == conv.output[0] and list(gate.input).count(conv.output[0]) == 1 and _per_channel(
        layout, gate
    ) else None  # fmt: skip


def _per_channel(layout: Layout, gate: onnx.NodeProto | None) -> bool:
    """Whether a gate is one number for each channel of each sample."""
    if gate is None:
        return False
    dims, of = layout.graph.shape(gate.input[1]), layout.graph.shape(gate.input[0])
    return dims is not None and of is not None and dims[:2] == of[:2] and dims[2:] == (1, 1)


def _is_ours_to_do(layout: Layout, conv: onnx.NodeProto) -> bool:
    """A 1x1 convolution of a blocked map with constant weights and an activation that we have."""
    if not is_pointwise(conv) or conv_activation(conv) not in ("", *ZERO_PRESERVING):
        return False
    weight = layout.graph.constant_shape(conv.input[1])
    return weight is not None and weight[1] % layout.block == 0 and layout.channels(conv.input[0]) is not None


def _bias(layout: Layout, conv: onnx.NodeProto) -> str:
    """The bias, or zeros."""
    if optional(conv, 2):
        return conv.input[2]
    weight = layout.graph.constant_shape(conv.input[1])
    assert weight is not None
    return layout.graph.add_constant(np.zeros(weight[0], np.float32), f"{conv.name}/bias")


def depthwise(layout: Layout) -> int:
    """Depthwise convolution -> activation -> pool in one operator of one or two results; with the 1x1 convolution in
    front of it, where nothing else reads that: the expanded map then never leaves the cache."""
    replaced = 0
    for conv in list(layout.graph.nodes):
        if is_a(conv, NCHWC, "Conv") and _is_depthwise(layout, conv):
            replaced += _depthwise(layout, conv)
    return replaced


def _depthwise(layout: Layout, conv: onnx.NodeProto) -> int:
    graph = layout.graph
    nodes, suffix = [conv], conv_activation(conv)
    following = graph.only_consumer(conv.output[0])
    if suffix == "" and activation(following) in ZERO_PRESERVING and following is not None:
        nodes.append(following)
        suffix = activation(following)
    result = nodes[-1].output[0]
    pool = next((n for n in graph.consumers(result) if is_a(n, OURS, "BlockedPool")), None)
    expand = _expansion(layout, conv, suffix or "")
    operator = f"Blocked{'Expand' if expand is not None else ''}Depthwise{'Pool' if pool is not None else ''}{suffix}"
    channels = layout.channels(conv.output[0])
    if operator not in layout.operators or channels is None or result in graph.outputs:
        return 0
    if expand is not None:
        inputs = [expand.input[0], expand.input[1], _bias(layout, expand), conv.input[1], _bias(layout, conv)]
    else:
        inputs = [conv.input[0], conv.input[1], _bias(layout, conv)]
    top, left, bottom, right = attribute(conv, "pads", [0] * 4)
    shapes: list[Dims | None] = [graph.shape(result)]
    if pool is not None:
        shapes.append(graph.shape(pool.output[0]))
    made = layout.add(
        operator, inputs, channels=channels, name=conv.name, shapes=shapes,
        attributes={"stride": attribute(conv, "strides", [1, 1])[0], "pad_top": top, "pad_left": left,
                    "pad_bottom": bottom, "pad_right": right},
    )  # fmt: skip
    graph.replace(result, made[0])
    if pool is not None:
        graph.replace(pool.output[0], made[1])
        graph.remove(pool)
    for node in reversed(nodes):
        graph.remove(node)
    return 1


def _expansion(layout: Layout, conv: onnx.NodeProto, suffix: str) -> onnx.NodeProto | None:
    """The 1x1 convolution in front, when it has the same activation in it and no other reader."""
    graph = layout.graph
    before = graph.producer(conv.input[0])
    if before is None or graph.only_consumer(conv.input[0]) is None or not suffix:
        return None
    if is_a(before, OURS, f"BlockedPointwise{suffix}"):
        return before
    plain = _is_ours_to_do(layout, before) and not optional(before, 3) and conv_activation(before) == suffix
    return before if plain else None


def _is_depthwise(layout: Layout, conv: onnx.NodeProto) -> bool:
    weight = layout.graph.constant_shape(conv.input[1])
    if weight is None or attribute(conv, "group", 1) != weight[0] or weight[1] != 1 or optional(conv, 3):
        return False
    square = weight[2] == weight[3] and 1 < weight[2] <= MOST_TAPS
    strides = attribute(conv, "strides", [1, 1])
    even = strides[0] == strides[1] and strides[0] in (1, 2) and set(attribute(conv, "dilations", [1, 1])) == {1}
    return square and even and conv_activation(conv) is not None and layout.channels(conv.input[0]) == weight[0]
