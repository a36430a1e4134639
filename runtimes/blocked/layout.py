"""ONNX Runtime's blocked layout (NCHWc) in a graph that it saved: which values are in it, and how they leave it.

A blocked map is a tensor [batch, padded, height, width] whose bytes are [batch, padded / block, height, width, block];
`padded` is the number of channels rounded up to the block, and what is beyond the channels is 0. Of a map of one pixel
the bytes are the plain ones. nchwc.ReorderInput takes a plain map there, nchwc.ReorderOutput back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from attn_deploy.runtimes.blocked.graph import MICROSOFT, NCHWC, OURS, Dims, Graph, attribute, is_a
from attn_deploy.session import Array

if TYPE_CHECKING:
    import onnx


OPERATORS_PREFIX = "Blocked"
REORDERED_CHANNELS = 4
"""nchwc.ReorderInput takes multiples of this many channels."""

_MAKERS = ("Conv", "ReorderInput", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool", "Upsample")
_ELEMENTWISE = ("Relu", "HardSwish", "Gelu", "Sigmoid", "HardSigmoid", "Add", "Concat")


@dataclass(frozen=True)
class Map:
    """A blocked value and its number of channels without the padding."""

    value: str
    channels: int


class Layout:
    """The graph, the block of ONNX Runtime's layout on this CPU, and the operators that may be used."""

    def __init__(self, graph: Graph, block: int, operators: frozenset[str]) -> None:
        self.graph = graph
        self.block = block
        self.operators = operators

    def padded(self, channels: int) -> int:
        return -(-channels // self.block) * self.block

    def attributes(self, channels: int) -> dict[str, int]:
        """What each of our blocked operators is told."""
        return {"block": self.block, "channels": channels}

    def blocked(self, plain: str) -> Map | None:
        """The blocked map that a plain value was made from; None where it comes from elsewhere."""
        node = self.graph.producer(plain)
        if not is_a(node, NCHWC, "ReorderOutput") or attribute(node, "channels_last", 0):
            return None
        assert node is not None
        return Map(node.input[0], int(attribute(node, "channels")))

    def channels(self, value: str) -> int | None:
        """Padded channels of a value that is a blocked map; None for any other value.

        Elementwise nodes of ONNX Runtime stay in the layout where their operands are."""
        node = self.graph.producer(value)
        made = is_a(node, NCHWC, *_MAKERS) or _is_ours(node)
        if not made:
            inside = is_a(node, MICROSOFT, "QuickGelu") or is_a(node, "", *_ELEMENTWISE)
            if node is None or not inside or any(self.channels(i) is None for i in node.input):
                return None
        dims = self.graph.shape(value)
        return dims[1] if dims is not None and len(dims) == 4 and isinstance(dims[1], int) else None

    def enter(self, plain: str, channels: int, name: str) -> Map | None:
        """The plain value [batch, channels, height, width] in the layout, reordered where it was not made there; None
        where ONNX Runtime's reorder does not take that number of channels."""
        found = self.blocked(plain)
        if found is not None:
            return found
        for node in self.graph.consumers(plain):
            if is_a(node, NCHWC, "ReorderInput") and not attribute(node, "channels_last", 0):
                return Map(node.output[0], channels)
        if channels % REORDERED_CHANNELS:
            return None
        (value,) = self.graph.add(
            "ReorderInput", [plain], name=name, domain=NCHWC, shapes=[self.shape_of(plain, channels)],
            attributes={"channels_last": 0},
        )  # fmt: skip
        return Map(value, channels)

    def settle(self, plain: str, made: Map, name: str) -> None:
        """Whoever reads `plain` reads what was made in the layout: as it is where a ReorderInput stands between."""
        graph = self.graph
        for node in graph.consumers(plain):
            if is_a(node, NCHWC, "ReorderInput") and not attribute(node, "channels_last", 0):
                graph.replace(node.output[0], made.value)
                graph.remove(node)
        if not graph.consumers(plain):
            return
        (left,) = graph.add(
            "ReorderOutput", [made.value], name=name, domain=NCHWC, shapes=[graph.shape(plain)],
            attributes={"channels": made.channels, "channels_last": 0},
        )  # fmt: skip
        graph.replace(plain, left)

    def add(
        self, operator: str, inputs: list[str], *, channels: int, name: str, shapes: list[Dims | None],
        attributes: dict[str, int] | None = None,
    ) -> tuple[str, ...]:  # fmt: skip
        """One of our operators; its outputs."""
        return self.graph.add(
            operator, inputs, name=name, domain=OURS, shapes=shapes,
            attributes={**self.attributes(channels), **(attributes or {})},
        )  # fmt: skip

    def shape_of(self, plain: str, channels: int) -> Dims | None:
        """Of the blocked map of a plain value."""
        dims = self.graph.shape(plain)
        return None if dims is None or len(dims) != 4 else (dims[0], self.padded(channels), *dims[2:])

    def vector_shape(self, value: str, channels: int) -> Dims:
        """[batch, padded, 1, 1] for the batch of a 4-dimensional value."""
        dims = self.graph.shape(value)
        return (dims[0] if dims else "?", self.padded(channels), 1, 1)


def plain_weight(weight: Array, block: int) -> Array:
    """The weight of a blocked 1x1 convolution, group 1, back in [out, in], padding included.

    ONNX Runtime keeps [out, in, 1, 1] with the bytes [out / block, in / block, block in, block out]; where the
    convolution reads a plain map (fewer channels than a block), [out / block, in, block out].
    """
    out, inner = weight.shape[:2]
    if inner % block:
        return np.ascontiguousarray(weight.reshape(out // block, inner, block).transpose(0, 2, 1).reshape(out, inner))
    tiles = weight.reshape(out // block, inner // block, block, block)
    return np.ascontiguousarray(tiles.transpose(0, 3, 1, 2).reshape(out, inner))


def is_pointwise(node: onnx.NodeProto | None) -> bool:
    """A blocked convolution of one pixel, dense, stride 1."""
    if not is_a(node, NCHWC, "Conv"):
        return False
    assert node is not None
    ones = all(v == 1 for n in ("kernel_shape", "strides") for v in attribute(node, n, [1, 1]))
    return ones and attribute(node, "group", 1) == 1 and not any(attribute(node, "pads", [0]))


def optional(node: onnx.NodeProto, index: int) -> str:
    """An input, "" where it is absent."""
    return node.input[index] if len(node.input) > index else ""


def _is_ours(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.domain == OURS and node.op_type.startswith(OPERATORS_PREFIX)


HARD_SIGMOID = (1 / 6, 0.5)


def conv_activation(node: onnx.NodeProto) -> str | None:
    """Our suffix for the activation that is fused into a blocked convolution: "", Relu, ...; None for one of others."""
    name = attribute(node, "activation", "")
    if name == "HardSigmoid":
        params = attribute(node, "activation_params", [0.2, 0.5])
        return "HardSigmoid" if np.allclose(params, HARD_SIGMOID, rtol=1e-6) else None
    return {"": "", "Relu": "Relu", "Sigmoid": "Sigmoid", "HardSwish": "Hardswish"}.get(name)
