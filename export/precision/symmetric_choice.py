"""Which symmetric range each activation gets, and which layers lose too much with any: by the loss of each layer alone.

Every layer is tried with every kind of range beside its FP32 form, on the reference's values and in one session. Its
loss is the relative noise of its tokens (of images for convolutions), as the root of their mean square. A plain sum
would cut off the few large tokens for the good of the many, but the next LayerNorm gives each the same weight.
vit_tiny with its trained weights, calibrated with 32 photographs, 64 others: 16.0 dB with the largest values for all
layers, 16.0 with the least squared error, 16.0 chosen by the mean of the tokens' noise, 19.3 by its maximum, 20.5 by
this; the one layer that makes the massive activations (12 dB alone) was FP32 in each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.append import observed_copy
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.plan import weight_of
from attn_deploy.export.precision.ranges import RangeMethod
from attn_deploy.export.precision.statistics import ValueStatistics
from attn_deploy.export.precision.symmetric_format import INT8, SymmetricFormat
from attn_deploy.session import Array

TRIAL_BATCHES = 8
"""Each costs as much as several of the model's own. On vit_tiny 4 gave 20.3 dB of the whole and 12 gave 20.5."""


@dataclass(frozen=True)
class LayerLoss:
    """A layer alone in 8 bits, reading `value`: relative noise (its power by the signal's) by kind of range."""

    layer: str
    value: str
    noise: dict[RangeMethod, float]

    def sqnr_db(self, method: RangeMethod) -> float:
        return float(-10 * np.log10(max(self.noise[method], 1e-20)))


def output_axis(node: ir.Node) -> int:
    """Of the weight: which axis counts the output channels."""
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    first = node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0))
    return 0 if first else len(weight.const_value.shape) - 1


def measure_layers(
    model: ir.Model,
    layers: Sequence[ir.Node],
    statistics: Mapping[str, ValueStatistics],
    batches: Callable[[], Iterable[Mapping[str, Array]]],
    open_model: OpenModel,
    form: SymmetricFormat = INT8,
) -> list[LayerLoss]:
    """The loss of each of `layers` (nodes of `model`) with each kind of range of the format for what it reads."""
    if not layers:
        return []
    methods = form.methods
    trial = _Trial(model, statistics, form)
    for node in layers:
        trial.add(node)
    run = open_model(trial.copy)
    totals = np.zeros((len(layers), len(methods)))
    count = 0
    for feeds in itertools.islice(batches(), TRIAL_BATCHES):
        sums = run(feeds)
        count += 1
        totals += [[float(sums[f"trial/{n}/{m.name}"]) for m in methods] for n in range(len(layers))]
    means = np.sqrt(totals / max(count, 1))
    return [
        LayerLoss(str(node.name), str(node.inputs[0].name), dict(zip(methods, map(float, row), strict=True)))  # type: ignore[union-attr]
        for node, row in zip(layers, means, strict=True)
    ]


def choose(losses: Sequence[LayerLoss]) -> dict[str, RangeMethod]:
    """By value name: the kind of range with which its readers lose least together."""
    totals: dict[str, dict[RangeMethod, float]] = {}
    for loss in losses:
        total = totals.setdefault(loss.value, dict.fromkeys(loss.noise, 0.0))
        for method, noise in loss.noise.items():
            total[method] += noise
    return {value: min(total, key=total.__getitem__) for value, total in totals.items()}


class _Trial:
    """A copy of the model with each layer's 8-bit forms beside it."""

    def __init__(self, model: ir.Model, statistics: Mapping[str, ValueStatistics], form: SymmetricFormat) -> None:
        self.copy, self._values = observed_copy(model)
        self._nodes = {str(n.name): n for n in self.copy.graph}
        self._statistics, self._form = statistics, form
        self._layers = 0

    def add(self, layer: ir.Node) -> None:
        node = self._nodes[str(layer.name)]
        weight = weight_of(node)
        assert weight is not None
        assert weight.const_value is not None
        axis = output_axis(node)
        array = weight.const_value.numpy()
        quantized, scale = self._form.quantize_weight(array, axis)
        rest = tuple(a for a in range(array.ndim) if a != axis)
        rounded = self._constant("weight", quantized.astype(np.float32) * np.expand_dims(scale, rest))
        axes = [1, 2, 3] if node.op_type == "Conv" else [-1]
        for method in self._form.methods:
            value = node.inputs[0]
            assert value is not None
            limit = self._statistics[str(value.name)].limit(method)
            steps = [self._constant(f"{method.name}/scale", self._form.activation_scale(limit)),
                     self._constant(f"{method.name}/zero", self._form.zero_point())]  # fmt: skip
            given = self._op("DequantizeLinear", [self._op("QuantizeLinear", [value, *steps]), *steps])
            inputs = [given, rounded, *node.inputs[2:]]
            result = self._op(node.op_type, inputs, attributes=list(node.attributes.values()))
            noise = self._power(self._op("Sub", [node.outputs[0], result]), axes)
            signal = self._power(node.outputs[0], axes)
            tiny = self._constant(f"{method.name}/tiny", np.array(1e-30, np.float32))
            ratio = self._op("Div", [noise, self._op("Max", [signal, tiny])])
            mean = self._op("ReduceMean", [self._op("Mul", [ratio, ratio])], keepdims=0)
            mean.name, mean.shape = f"trial/{self._layers}/{method.name}", ir.Shape([])
            mean.type = ir.TensorType(ir.DataType.FLOAT)
            self.copy.graph.outputs.append(mean)
        self._layers += 1

    def _power(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Sums of squares over the channels of a token, or over all of an image."""
        constant = self._constant(f"axes_{len(self.copy.graph)}", np.array(axes, np.int64))
        return self._op("ReduceSumSquare", [value, constant], keepdims=0)

    def _constant(self, label: str, array: Array) -> ir.Value:
        name = f"trial/{self._layers}/{label}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.copy.graph.register_initializer(value)
        return value

    def _op(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = (), **named: int
    ) -> ir.Value:
        number = len(self.copy.graph)
        node = ir.Node(
            "", operator, list(inputs), [*attributes, *(ir.AttrInt64(k, v) for k, v in named.items())],
            name=f"trial/{operator}_{number}",
        )  # fmt: skip
        node.outputs[0].name = f"trial/{operator}_{number}_output"
        self.copy.graph.append(node)
        return node.outputs[0]
