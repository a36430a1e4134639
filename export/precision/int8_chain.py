"""Chains of convolutions that can stay in 8 bits: what a model has of them, and what calibration must see.

A map is an activation [batch, channels, height, width] that a convolution, a gate or a pool writes for others of these
to read. Between two maps nothing is computed in floating point: activation and residual sum belong to the convolution
or gate before them, the gate's own vector is float32.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.lower.cpu_activation import activation_behind
from attn_deploy.export.lower.cpu_global_pool import is_plane_mean
from attn_deploy.export.lower.cuda_nodes import constant_of, dims
from attn_deploy.export.precision.observation import Wanted
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.ops.quantized_conv import FORM_ACTIVATIONS, MOST_TAPS, STRIDES

_NOT_SET = ("NOTSET", "")
_GATES = ("Gate", "GateRelu", "GateSilu", "GateResidual", "GateResidualRelu", "GateResidualSilu")


@dataclass(frozen=True)
class ConvUnit:
    """activation(conv(x) + residual). `nodes` in graph order; the last one writes `output`."""

    conv: ir.Node
    nodes: tuple[ir.Node, ...]
    x: ir.Value
    residual: ir.Value | None
    activation: str
    output: ir.Value

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass(frozen=True)
class GateUnit:
    """activation(x * gate + residual), gate [batch, channels, 1, 1]."""

    node: ir.Node
    x: ir.Value
    gate: ir.Value
    residual: ir.Value | None
    activation: str
    output: ir.Value

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.node,)

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass(frozen=True)
class PoolUnit:
    """The mean of each channel, in float32: where a chain ends, or its gate begins."""

    node: ir.Node
    x: ir.Value
    keeps_dims: bool

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.node,)

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return (self.x,)


@dataclass(frozen=True)
class WindowUnit:
    """MaxPool, which keeps levels as they are, or AveragePool, which is a depthwise convolution of equal weights."""

    node: ir.Node
    x: ir.Value
    output: ir.Value

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.node,)

    @property
    def reads(self) -> tuple[ir.Value, ...]:
        return (self.x,)


Unit = ConvUnit | GateUnit | PoolUnit | WindowUnit


def find_units(model: ir.Model, layers: Collection[str]) -> list[Unit]:
    """All that the chains are made of, in an order in which it can run. `layers`: names of the convolutions in INT8.

    Gates and pools belong to a chain where what they read does; convolutions always do, alone if need be.
    """
    order = {node: number for number, node in enumerate(model.graph)}
    maps: set[ir.Value] = set()
    taken: set[ir.Node] = set()
    units: list[Unit] = []
    for node in model.graph:
        unit = _unit(node, layers, maps, taken)
        if unit is None:
            continue
        units.append(unit)
        taken.update(unit.nodes)
        if not isinstance(unit, PoolUnit):
            maps.add(unit.output)
    return sorted(units, key=lambda unit: max(order[n] for n in unit.nodes))


def layers_of(units: Collection[Unit]) -> frozenset[str]:
    """The convolutions that the units hold."""
    return frozenset(str(unit.conv.name) for unit in units if isinstance(unit, ConvUnit))


def wanted_for_chain(model: ir.Model, layers: Collection[str]) -> list[Wanted]:
    """What the scales of the maps are made from: of every map, and of what enters a chain, the extrema of its channels
    and a histogram."""
    names: dict[str, None] = {}
    for unit in find_units(model, layers):
        for value in (*unit.reads, *([] if isinstance(unit, PoolUnit) else [unit.output])):
            names[str(value.name)] = None
    return [Wanted(name, histogram=True, channel_axis=1) for name in names]


def read_by_convolutions(model: ir.Model, layers: Collection[str]) -> list[str]:
    """Names of the values that the chains' convolutions read, each once."""
    found = [unit for unit in find_units(model, layers) if isinstance(unit, ConvUnit)]
    return list(dict.fromkeys(str(unit.x.name) for unit in found))


def is_depthwise(conv: ir.Node) -> bool:
    weight = constant_of(conv.inputs[1])
    groups = conv.attributes.get_int("group", 1)
    return weight is not None and groups == weight.shape[0] and weight.shape[1] == 1 and groups > 1


def _unit(node: ir.Node, layers: Collection[str], maps: set[ir.Value], taken: set[ir.Node]) -> Unit | None:
    if node in taken:
        return None
    if node.op_type == "Conv" and not node.domain:
        return _conv(node, taken) if str(node.name) in layers else None
    x = node.inputs[0] if node.inputs else None
    if x is None or x not in maps or node.outputs[0].is_graph_output():
        return None
    if node.domain == DOMAIN and node.op_type in _GATES:
        return _gate(node)
    if (node.op_type == "ChannelPoolMean" and node.domain == DOMAIN) or _is_global_pool(node):
        return PoolUnit(node, x, keeps_dims=len(node.outputs[0].shape or ()) == 4)
    if node.op_type in ("MaxPool", "AveragePool") and _has_plain_window(node):
        return WindowUnit(node, x, node.outputs[0])
    return None


def _conv(conv: ir.Node, taken: set[ir.Node]) -> ConvUnit | None:
    x = conv.inputs[0]
    if x is None or not has_kernel(conv):
        return None
    nodes, value, residual = [conv], conv.outputs[0], None
    add = _residual_sum(value)
    if add is not None and add not in taken and _stride(conv) == 1:
        residual = next(i for i in add.inputs if i is not value)
        nodes, value = [*nodes, add], add.outputs[0]
    found = None if value.is_graph_output() else activation_behind(value)
    activation = ""
    if found is not None and found.name in FORM_ACTIVATIONS and not taken.intersection(found.nodes):
        activation, nodes, value = found.name, [*nodes, *found.nodes], found.nodes[-1].outputs[0]
    if value.is_graph_output():
        return None
    return ConvUnit(conv, tuple(nodes), x, residual, activation, value)


def has_kernel(conv: ir.Node) -> bool:
    """Whether the operators on maps have what this convolution does."""
    weight, output = constant_of(conv.inputs[1]), dims(conv.outputs[0])
    if weight is None or weight.ndim != 4 or len(output) != 4:
        return False
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    attributes = conv.attributes
    plain = (
        (bias is None or constant_of(bias) is not None)
        and attributes.get_string("auto_pad", "NOTSET") in _NOT_SET
        and all(d == 1 for d in attributes.get_ints("dilations", (1, 1)) or ())
        and _stride(conv) in STRIDES
    )
    one_pixel = all(d == 1 for d in dims(conv.inputs[0])[2:]) if conv.inputs[0] is not None else True
    height, width = weight.shape[2:]
    if attributes.get_int("group", 1) != 1:
        return plain and is_depthwise(conv) and height == width and height <= MOST_TAPS and not one_pixel
    return plain and not one_pixel


def _stride(node: ir.Node) -> int:
    """0 where the two differ."""
    strides = list(node.attributes.get_ints("strides", (1, 1)) or (1, 1))
    return int(strides[0]) if strides[0] == strides[1] else 0


def _residual_sum(value: ir.Value) -> ir.Node | None:
    """The Add that alone reads the value, of two maps of one shape."""
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    add = users[0].node
    if add.op_type != "Add" or add.domain or len(add.inputs) != 2:
        return None
    other = next((i for i in add.inputs if i is not value), None)
    if other is None or constant_of(other) is not None or other.is_initializer():
        return None
    return add if len(dims(other)) == 4 and list(dims(other)) == list(dims(value)) else None


def _gate(node: ir.Node) -> GateUnit | None:
    x, gate = node.inputs[0], node.inputs[1]
    assert x is not None
    assert gate is not None
    shape = dims(gate)
    if len(shape) != 4 or list(shape[2:]) != [1, 1] or shape[1] != dims(x)[1]:
        return None
    residual = node.inputs[2] if len(FORMS[node.op_type].inputs) > 2 else None
    activation = node.op_type.removeprefix("Gate").removeprefix("Residual")
    return GateUnit(node, x, gate, residual, activation, node.outputs[0])


def _is_global_pool(node: ir.Node) -> bool:
    return node.op_type == "GlobalAveragePool" or is_plane_mean(node)


def _has_plain_window(node: ir.Node) -> bool:
    """MaxPool of any window; AveragePool of a square one, without padding and without a part of a window at the end."""
    attributes = node.attributes
    if attributes.get_string("auto_pad", "NOTSET") not in _NOT_SET or len(node.outputs) != 1:
        return False
    if node.op_type == "MaxPool":
        return True
    kernel = list(attributes.get_ints("kernel_shape", ()) or ())
    pads = list(attributes.get_ints("pads", ()) or ())
    sizes = dims(node.inputs[0])[2:] if node.inputs[0] is not None else ()
    whole = not attributes.get_int("ceil_mode", 0) or all(
        isinstance(size, int) and (size - k) % _stride(node) == 0 for size, k in zip(sizes, kernel, strict=False)
    )
    return not any(pads) and len(set(kernel)) == 1 and kernel[0] <= MOST_TAPS and _stride(node) in STRIDES and whole
