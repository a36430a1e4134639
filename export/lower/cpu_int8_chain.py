"""Chains of convolutions as the library's operators on 8-bit maps [batch, height, width, channels].

Nothing is left of QuantizeLinear and DequantizeLinear but where a chain begins and ends. Needs all kernels of the
chain: half of one would be slower than ONNX Runtime's own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attn_deploy.export.functions import attach_functions
from attn_deploy.export.lower.cuda_nodes import constant_of, dims
from attn_deploy.export.precision.collected import Statistics
from attn_deploy.export.precision.int8_chain import (
    ConvUnit,
    GateUnit,
    PoolUnit,
    Unit,
    WindowUnit,
    find_units,
    is_depthwise,
    layers_of,
)
from attn_deploy.export.precision.map_means import rounding_shift
from attn_deploy.export.precision.map_scales import STRENGTH, MapScale, map_scale
from attn_deploy.export.precision.plan import Exempt, multiply_adds, weighted_nodes
from attn_deploy.export.precision.quantize_weight import quantize_weight
from attn_deploy.export.precision.ranges import RangeMethod
from attn_deploy.ops import DOMAIN, VERSION, quantized_conv, quantized_gate
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.session import Array

KERNELS = frozenset(form.name for form in (*quantized_conv.FORMS, *quantized_gate.FORMS))

LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Channels last of channels first, and back."""

MIN_CONVOLUTIONS = 4
"""Fewer are a stem, for which two changes of layout do not pay."""

MIN_SHARE = 0.9
"""Of the multiply-adds that the plan has in 8 bits: with less, ONNX Runtime's own operators run all of them."""

ONLY_SLOWER = (Exempt.STEM, Exempt.DEPTHWISE)
"""Why `plan_int8` leaves convolutions out that are in their chain's way: in 8 bits ONNX Runtime's are no faster."""


def chain_layers(model: ir.Model, plan: PrecisionPlan, kernels: Collection[str]) -> frozenset[str]:
    """The convolutions that become a chain: those in 8 bits, and what the plan leaves out between them only because
    ONNX Runtime would gain nothing. Empty where kernels are missing or too much would be left to others."""
    asked = frozenset(plan.of(Scheme.STATIC))
    left_out = frozenset(p.layer for p in plan.layers if p.scheme is Scheme.FLOAT and p.reason in ONLY_SLOWER)
    if not KERNELS.issubset(kernels):
        return frozenset()
    done = layers_of(_beside(find_units(model, asked | left_out), asked))
    work = {str(n.name): multiply_adds(n) for n in weighted_nodes(model) if n.op_type == "Conv"}
    covered = sum(work[name] for name in done & asked)
    enough = len(done) >= MIN_CONVOLUTIONS and covered >= MIN_SHARE * sum(work[name] for name in asked & work.keys())
    return done if enough else frozenset()


def _beside(units: Sequence[Unit], asked: frozenset[str]) -> list[ConvUnit]:
    """The convolutions `asked` for, and those that read a map of such a one or write one for it."""
    writer: dict[ir.Value, set[ConvUnit]] = {}
    neighbours: dict[ConvUnit, set[ConvUnit]] = {}
    for unit in units:
        before = set().union(*(writer.get(value, set()) for value in unit.reads))
        if isinstance(unit, ConvUnit):
            neighbours[unit] = before
            for other in before:
                neighbours[other].add(unit)
        if not isinstance(unit, PoolUnit):
            writer[unit.output] = {unit} if isinstance(unit, ConvUnit) else before
    taken = {unit for unit in neighbours if str(unit.conv.name) in asked}
    reached = list(taken)
    while reached:
        found = {other for other in neighbours[reached.pop()] if other not in taken}
        taken |= found
        reached += found
    return [unit for unit in neighbours if unit in taken]


def lower_chain(
    model: ir.Model,
    layers: Collection[str],
    statistics: Statistics,
    means: Mapping[str, Array] | None = None,
    *,
    strength: float = STRENGTH,
    method: RangeMethod = RangeMethod.MIN_MAX,
) -> None:
    """Puts the convolutions named `layers`, and what stands between them, into 8-bit maps, in place. `statistics` of
    `wanted_for_chain`; `means` of `read_by_convolutions`, with which biases take back what the rounding of weights adds
    to the mean. The names of what runs start with those of the nodes that it stands for."""
    units = find_units(model, layers)
    emitter = _Emitter(model, _scales(units, statistics, strength, method), means or {})
    for unit in units:
        emitter.emit(unit)
    emitter.leave()
    RemoveUnusedNodesPass()(model)
    attach_functions(model)


def _scales(
    units: Sequence[Unit], statistics: Statistics, strength: float, method: RangeMethod
) -> dict[ir.Value, MapScale]:
    """Of every value that is a map. A MaxPool writes the levels that it reads."""
    by_channel: dict[ir.Value, bool] = {}
    same: dict[ir.Value, ir.Value] = {}
    for unit in units:
        mixes = isinstance(unit, ConvUnit) and not is_depthwise(unit.conv)
        by_channel[unit.reads[0]] = by_channel.get(unit.reads[0], True) and not mixes
        for value in unit.reads[1:]:
            by_channel.setdefault(value, True)
        if not isinstance(unit, PoolUnit):
            by_channel.setdefault(unit.output, True)
        if isinstance(unit, WindowUnit) and unit.node.op_type == "MaxPool":
            same[unit.output] = unit.x
    for output, x in same.items():
        by_channel[x] = by_channel[x] and by_channel[output]
    scales = {
        value: map_scale(statistics.values[str(value.name)], 1.0 if alone else strength, method)
        for value, alone in by_channel.items()
    }
    for output, x in same.items():
        scales[output] = scales[x]
    return scales


@dataclass
class _Emitter:
    """`maps`: by the float value that it stands for, the uint8 value."""

    model: ir.Model
    scales: Mapping[ir.Value, MapScale]
    means: Mapping[str, Array]
    maps: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _replaced: set[ir.Node] = field(default_factory=set)

    def emit(self, unit: Unit) -> None:
        """In front of the last of the unit's nodes."""
        anchor = unit.nodes[-1]
        read = [self._map(value, anchor) for value in unit.reads]
        if isinstance(unit, ConvUnit):
            self.maps[unit.output] = self._conv(unit, anchor, read)
        elif isinstance(unit, GateUnit):
            self.maps[unit.output] = self._gate(unit, anchor, read)
        elif isinstance(unit, PoolUnit):
            self._pool(unit, anchor, read[0])
        elif unit.node.op_type == "MaxPool":
            self.maps[unit.output] = self._max_pool(unit, anchor, read[0])
        else:
            self.maps[unit.output] = self._average_pool(unit, anchor, read[0])
        self._replaced.update(unit.nodes)

    def leave(self) -> None:
        """What reads a map in floating point gets it back, channels first and by its name: blocks and sites of a model
        are cut between values of one name."""
        for value, levels in self.maps.items():
            outside = [use for use in value.uses() if use.node not in self._replaced and not _is_ours(use.node)]
            if value.producer() not in self._replaced or not (outside or value.is_graph_output()):
                continue
            producer = levels.producer()
            assert producer is not None
            name = _aside(producer, "output")
            first = ir.node("Transpose", [levels], {"perm": FIRST}, name=f"{name}/Transpose")
            inputs = [first.outputs[0], *self._levels(name, self.scales[value], zeros=True)]
            real = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{name}/DequantizeLinear")
            real.outputs[0].type, real.outputs[0].shape = value.type, value.shape
            real.outputs[0].name, value.name = value.name, f"{value.name}/replaced"
            self.model.graph.insert_after(producer, [first, real])
            for use in outside:
                use.node.replace_input_with(use.idx, real.outputs[0])

    def _map(self, value: ir.Value, anchor: ir.Node) -> ir.Value:
        """The levels of a value; where it is computed in floating point, they begin here."""
        if value not in self.maps:
            name = f"{_aside(anchor, 'input')}/{value.name}"
            inputs = [value, *self._levels(name, self.scales[value], zeros=True)]
            levels = self._before(anchor, "QuantizeLinear", inputs, f"{name}/QuantizeLinear", {"axis": 1})
            self.maps[value] = self._before(anchor, "Transpose", [levels], f"{name}/Transpose", {"perm": LAST})
        return self.maps[value]

    def _conv(self, unit: ConvUnit, anchor: ir.Node, read: Sequence[ir.Value]) -> ir.Value:
        conv = unit.conv
        weight = constant_of(conv.inputs[1])
        assert weight is not None
        given = constant_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
        bias = np.zeros(len(weight), np.float32) if given is None else given
        depthwise = is_depthwise(conv)
        pads = list(conv.attributes.get_ints("pads", (0, 0, 0, 0)) or (0, 0, 0, 0))
        stride = int((conv.attributes.get_ints("strides", (1, 1)) or (1, 1))[0])
        attributes = dict(zip(quantized_conv.PADS, map(int, pads), strict=True))
        form = quantized_conv.name_of(
            depthwise=depthwise, stride=stride, residual=unit.residual is not None, activation=unit.activation
        )
        operands = self._conv_operands(str(conv.name), unit.x, weight, bias, depthwise)
        if depthwise:
            attributes["channels"] = len(weight)
        inputs = [read[0], *operands, *self._levels(f"{conv.name}/y", self.scales[unit.output])]
        if unit.residual is not None:
            inputs += [read[1], *self._levels(f"{conv.name}/residual", self.scales[unit.residual])]
        return self._ours(anchor, form, inputs, str(conv.name), attributes, unit.output)

    def _conv_operands(
        self, name: str, x: ir.Value, weight: Array, bias: Array, depthwise: bool
    ) -> tuple[ir.Value, ...]:
        """weight, weight_scale, bias, x_scale, x_zero. The scales of several input channels become part of the weight,
        which leaves 1 of them."""
        scale = self.scales[x]
        x_scale, in_weight = scale.scale, np.ones(1, np.float32)
        if not depthwise and x_scale.size > 1:
            x_scale, in_weight = in_weight, x_scale
        quantized, weight_scale = quantize_weight(weight * in_weight[:, None, None], axis=0)
        if str(x.name) in self.means:
            rounded = quantized * weight_scale[:, None, None, None] / in_weight[:, None, None]
            bias = bias - rounding_shift(weight, rounded, self.means[str(x.name)])
        stored = (quantized.astype(np.int16) + 128).astype(np.uint8).transpose(0, 2, 3, 1)
        return (
            self._constant(f"{name}/weight", stored),
            self._constant(f"{name}/weight_scale", weight_scale),
            self._constant(f"{name}/bias", bias.astype(np.float32)),
            *self._levels(f"{name}/x", MapScale(x_scale, scale.zero)),
        )

    def _gate(self, unit: GateUnit, anchor: ir.Node, read: Sequence[ir.Value]) -> ir.Value:
        name = str(unit.node.name)
        form = quantized_gate.name_of(residual=unit.residual is not None, activation=unit.activation)
        inputs = [read[0], unit.gate, *self._levels(f"{name}/x", self.scales[unit.x])]
        inputs += self._levels(f"{name}/y", self.scales[unit.output])
        if unit.residual is not None:
            inputs += [read[1], *self._levels(f"{name}/residual", self.scales[unit.residual])]
        return self._ours(anchor, form, inputs, name, {"channels": _channels(unit.x)}, unit.output)

    def _pool(self, unit: PoolUnit, anchor: ir.Node, x: ir.Value) -> None:
        name, (old,) = str(unit.node.name), unit.node.outputs
        inputs = [x, *self._levels(f"{name}/x", self.scales[unit.x])]
        mean = self._ours(anchor, "QuantizedChannelPool", inputs, name, {"channels": _channels(unit.x)}, None)
        shape = old.shape
        if not unit.keeps_dims:
            mean = self._before(anchor, "Flatten", [mean], f"{name}/Flatten", {"axis": 1})
        mean.type, mean.shape = old.type, shape
        old.replace_all_uses_with(mean)

    def _max_pool(self, unit: WindowUnit, anchor: ir.Node, x: ir.Value) -> ir.Value:
        """On levels, between two changes of layout: ONNX Runtime makes one operator on channels last of the three."""
        name = str(unit.node.name)
        first = self._before(anchor, "Transpose", [x], f"{name}/first", {"perm": FIRST})
        pooled = ir.node("MaxPool", [first], name=f"{name}/MaxPool")
        pooled.attributes.update({n: a for n, a in unit.node.attributes.items()})
        self.model.graph.insert_before(anchor, pooled)
        return self._before(anchor, "Transpose", pooled.outputs, f"{name}/last", {"perm": LAST})

    def _average_pool(self, unit: WindowUnit, anchor: ir.Node, x: ir.Value) -> ir.Value:
        name, channels = str(unit.node.name), _channels(unit.x)
        attributes = unit.node.attributes
        size = int((attributes.get_ints("kernel_shape") or (1,))[0])
        stride = int((attributes.get_ints("strides", (1, 1)) or (1, 1))[0])
        weight = np.full((channels, 1, size, size), 1.0 / (size * size), np.float32)
        operands = self._conv_operands(name, unit.x, weight, np.zeros(channels, np.float32), depthwise=True)
        form = quantized_conv.name_of(depthwise=True, stride=stride, residual=False, activation="")
        inputs = [x, *operands, *self._levels(f"{name}/y", self.scales[unit.output])]
        made = {**dict.fromkeys(quantized_conv.PADS, 0), "channels": channels}
        return self._ours(anchor, form, inputs, name, made, unit.output)

    def _ours(
        self, anchor: ir.Node, form: str, inputs: Sequence[ir.Value], name: str, attributes: Mapping[str, int],
        of: ir.Value | None,
    ) -> ir.Value:  # fmt: skip
        """An operator of ours. `of`: the value whose levels it writes, None where it writes float32."""
        node = ir.node(form, list(inputs), dict(attributes), domain=DOMAIN, name=f"{name}/{form}")
        self.model.opset_imports.setdefault(DOMAIN, VERSION)
        output = node.outputs[0]
        output.name = f"{name}/{form}_output"
        if of is not None:
            output.type = ir.TensorType(ir.DataType.UINT8)
            if of.shape is not None:
                output.shape = ir.Shape([of.shape[axis] for axis in LAST])
        self.model.graph.insert_before(anchor, node)
        return output

    def _before(
        self, anchor: ir.Node, operator: str, inputs: Sequence[ir.Value], name: str, attributes: Mapping[str, object]
    ) -> ir.Value:
        node = ir.node(operator, list(inputs), dict(attributes), name=name)  # type: ignore[arg-type]
        node.outputs[0].name = f"{name}_output"
        self.model.graph.insert_before(anchor, node)
        return node.outputs[0]

    def _levels(self, name: str, scale: MapScale, *, zeros: bool = False) -> list[ir.Value]:
        """Scale and zero point as constants; `zeros`: one for each scale, as QuantizeLinear has them."""
        zero = np.full(scale.scale.size if zeros else 1, scale.zero, np.uint8)
        return [self._constant(f"{name}_scale", scale.scale), self._constant(f"{name}_zero", zero)]

    def _constant(self, name: str, array: Array) -> ir.Value:
        array = np.ascontiguousarray(array)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.model.graph.register_initializer(value)
        return value


def _aside(node: ir.Node, label: str) -> str:
    """A name in the node's module that does not start with the node's own: a change of form is no part of a site."""
    module, _, rest = str(node.name).partition("/")
    return f"{module}/{label}/{rest}"


def _is_ours(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type in KERNELS


def _channels(value: ir.Value) -> int:
    channels = dims(value)[1]
    assert isinstance(channels, int)
    return channels
