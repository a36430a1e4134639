"""Cross-layer equalization (Nagel et al. 2019, section 4.1): channels between two convolutions are scaled alike.

Behind a convolution, channel c is divided by s_c where everything up to the next convolutions passes a positive factor
on: ReLU, pools, a product with a gate, no activation at all. The next convolutions' weights take the factor, those
inside a gate that pools the value too: the same function.

The paper makes the weights' ranges equal, since it has one scale per weight tensor. Here weights have a scale for each
output channel and activations one for all, so what is balanced is the activation's range against the weights that read
it: s_c = sqrt(range of x_c / range of w_c), where w_c is a share of its output channel's largest weight. A depthwise
convolution has a scale for each channel anyway: before it s_c is the range of x_c alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.collected import dead_channels_note
from attn_deploy.export.precision.insert import set_constant
from attn_deploy.export.precision.observation import Wanted
from attn_deploy.export.precision.plan import weight_of
from attn_deploy.export.precision.statistics import Statistics
from attn_deploy.ops import DOMAIN
from attn_deploy.session import Array

PASSED_ON = frozenset(
    {"Relu", "LeakyRelu", "Identity", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool",
     "ChannelPoolMean", "ChannelPoolMax"}
)  # fmt: skip
"""f(s * x) = s * f(x) for s > 0, channel by channel."""

GATES = ("Gate", "GateRelu")
"""activation(x * gate): passes a factor of x on, not of the gate. With a residual there is more to scale."""

GREATEST_FACTOR = 32.0
"""A channel that was nearly dead on the calibration data must not be blown up on others."""


@dataclass(frozen=True)
class Chain:
    """Whatever channels `producer` writes times a factor, the `values` up to its `readers` are times that factor.
    `read`: by value name the readers."""

    producer: ir.Node
    values: tuple[ir.Value, ...]
    read: dict[str, tuple[ir.Node, ...]]

    @property
    def readers(self) -> tuple[ir.Node, ...]:
        return tuple(dict.fromkeys(reader for readers in self.read.values() for reader in readers))


def chains(model: ir.Model) -> list[Chain]:
    """In graph order."""
    return [chain for node in model.graph if (chain := _chain(node)) is not None]


def wanted_for_equalization(model: ir.Model, layers: Collection[str] | None = None) -> list[Wanted]:
    """What `equalize` asks of the statistics: extrema per channel of what the readers of chains read."""
    names = {value: None for chain in chains(model) if _matters(chain, layers) for value in chain.read}
    return [Wanted(name, channel_axis=1) for name in names]


def equalize(model: ir.Model, statistics: Statistics, layers: Collection[str] | None = None) -> tuple[str, ...]:
    """Scales the channels of every chain that touches one of `layers` (those in INT8; None: all), in place and exactly
    but for float32 rounding. Values that change get names of their own: statistics of the old ones are not theirs. A
    note says where channels are always zero.

    Raises UsageError where the statistics do not hold what a chain reads.
    """
    seen = {}
    for chain in chains(model):
        if not _matters(chain, layers):
            continue
        largest = seen[str(chain.producer.name)] = _channel_largest(chain, statistics)
        factors = equalization_factors(chain, largest)
        _divide_outputs(model, chain.producer, factors)
        for reader in chain.readers:
            _multiply_inputs(model, reader, factors)
        for value in chain.values:
            value.name = f"{value.name}/equalized"
    return dead_channels_note(seen)


def equalization_factors(chain: Chain, largest: Array) -> Array:
    """float32 [channels]: what each channel is divided by. `largest`: max |x|, [channels]. A channel that is always
    zero, or that no weight reads, gets the factor that shrinks nothing."""
    readers = [r for r in chain.readers if not _is_depthwise(r) and _is_map(r)]
    used = largest > 0
    factors = np.where(used, largest, 1.0).astype(np.float64)
    if readers:
        weight = np.max([_input_shares(reader) for reader in readers], axis=0)
        used &= weight > 0
        factors = np.sqrt(factors / np.where(used, weight, 1.0))
    if not used.any():
        return np.ones(len(largest), np.float32)
    factors = np.where(used, factors / factors[used].max(), 1.0)
    factors = np.maximum(factors, 1.0 / GREATEST_FACTOR)
    return np.asarray(factors / np.exp(np.log(factors).mean()), np.float32)


def _chain(producer: ir.Node) -> Chain | None:
    if not _is_conv(producer) or weight_of(producer) is None or not _constant_bias(producer):
        return None
    values = _scaled_values(producer.outputs[0])
    if values is None:
        return None
    read = {str(v.name): tuple(dict.fromkeys(u for u, _ in v.uses() if _is_conv(u))) for v in values}
    chain = Chain(producer, tuple(values), {name: readers for name, readers in read.items() if readers})
    return chain if chain.read else None


def _scaled_values(value: ir.Value) -> list[ir.Value] | None:
    """The value and all that a factor of its channels reaches before the next convolutions; None where it reaches
    something else."""
    if value.is_graph_output():
        return None
    found = [value]
    for user, index in value.uses():
        if _is_conv(user) and index == 0 and weight_of(user) is not None:
            continue
        passes = user.op_type in PASSED_ON and user.domain in ("", DOMAIN)
        gates = user.op_type in GATES and user.domain == DOMAIN and index == 0 and user.inputs[1] is not value
        further = _scaled_values(user.outputs[0]) if (passes or gates) and len(user.outputs) == 1 else None
        if further is None:
            return None
        found += further
    return found


def _matters(chain: Chain, layers: Collection[str] | None) -> bool:
    if not any(map(_is_map, chain.readers)):
        return False
    return layers is None or any(str(node.name) in layers for node in (chain.producer, *chain.readers))


def _channel_largest(chain: Chain, statistics: Statistics) -> Array:
    """Over all that maps of the chain are read as; a pooled value is as large as its map at most."""
    found = []
    for name, readers in chain.read.items():
        if any(map(_is_map, readers)):
            value = statistics.values.get(name)
            if value is None or value.channel_low is None:
                raise UsageError(
                    "the statistics do not hold what a chain of convolutions reads",
                    where=name,
                    expected="statistics that were collected with this model",
                    next_step="calibrate again with --data",
                )
            found.append(value.channel_largest())
    weight = weight_of(chain.producer)
    assert weight is not None
    assert weight.const_value is not None
    return np.max(found, axis=0) if found else np.zeros(int(weight.const_value.shape[0]), np.float32)


def _is_conv(node: ir.Node) -> bool:
    return node.op_type == "Conv" and not node.domain


def _is_map(conv: ir.Node) -> bool:
    """Whether it reads more than one pixel: not what a pool gives."""
    value = conv.inputs[0]
    shape = value.shape if value is not None else None
    return shape is None or any(dim != 1 for dim in shape[2:])


def _weight(conv: ir.Node) -> Array:
    weight = weight_of(conv)
    assert weight is not None
    assert weight.const_value is not None
    return weight.const_value.numpy()  # type: ignore[no-any-return]


def _is_depthwise(conv: ir.Node) -> bool:
    return _weight(conv).shape[1] == 1 and conv.attributes.get_int("group", 1) > 1


def _constant_bias(conv: ir.Node) -> bool:
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    return bias is None or bias.const_value is not None


def _by_input(conv: ir.Node, weight: Array) -> Array:
    """[groups, outputs of a group, inputs of a group, kernel...]"""
    groups = conv.attributes.get_int("group", 1)
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _input_shares(conv: ir.Node) -> Array:
    """By input channel the largest |w|, as a share of the largest of its output channel, [channels]."""
    weight = np.abs(_by_input(conv, _weight(conv)))
    largest = weight.max(axis=tuple(range(3, weight.ndim)))  # [groups, outputs, inputs]
    rows = largest.max(axis=2, keepdims=True)
    shares = np.divide(largest, rows, out=np.zeros_like(largest), where=rows > 0)
    return np.asarray(shares.max(axis=1).reshape(-1))


def _divide_outputs(model: ir.Model, conv: ir.Node, factors: Array) -> None:
    weight = _weight(conv)
    set_constant(model, conv, 1, weight / factors.reshape(-1, *[1] * (weight.ndim - 1)))
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is not None:
        assert bias.const_value is not None
        set_constant(model, conv, 2, bias.const_value.numpy() / factors)


def _multiply_inputs(model: ir.Model, conv: ir.Node, factors: Array) -> None:
    weight = _weight(conv)
    by_input = _by_input(conv, weight)
    shaped = factors.reshape(by_input.shape[0], 1, by_input.shape[2], *[1] * (by_input.ndim - 3))
    set_constant(model, conv, 1, (by_input * shaped).reshape(weight.shape))
