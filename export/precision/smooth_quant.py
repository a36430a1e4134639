"""SmoothQuant between a LayerNormalization and the linear layers that read it (Xiao et al. 2023, equation 4).

Channel j of the norm's output is divided by s_j = max|X_j|^strength / max|W_j|^(1 - strength) and the weights that read
it are multiplied by s_j: the same function, with less of the difference between channels in the activation. The norm's
scale and bias take the division, so nothing is computed that was not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.collected import dead_channels_note
from attn_deploy.export.precision.insert import set_constant
from attn_deploy.export.precision.observation import Wanted
from attn_deploy.export.precision.plan import weight_of
from attn_deploy.export.precision.statistics import Statistics
from attn_deploy.session import Array
from attn_deploy.target import nearest

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")

FACTORS = (1e-5, 1e5)
"""What a channel is divided by, at least and at most."""


@dataclass(frozen=True)
class SmoothableNorm:
    """A norm over the last axis, with constant scale and bias, that only `readers` read: linear layers with constant
    weights."""

    node: ir.Node
    readers: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def value(self) -> str:
        return str(self.node.outputs[0].name)


def smoothable_norms(model: ir.Model) -> list[SmoothableNorm]:
    """In graph order. A norm that a residual sum reads too (post-norm) has nowhere to put the division."""
    return [norm for node in model.graph if (norm := _smoothable(node)) is not None]


def norms_of(model: ir.Model, layers: Sequence[str] | None) -> Iterator[SmoothableNorm]:
    """The smoothable norms that one of `layers` reads (those in INT8; None: any)."""
    return (norm for norm in smoothable_norms(model) if _has_any(norm, layers))


def wanted_for_smoothing(model: ir.Model, layers: Sequence[str] | None = None) -> list[Wanted]:
    """What `smooth` asks of the statistics: extrema per channel of the output of each of `norms_of`."""
    return [Wanted(norm.value, channel_axis=-1) for norm in norms_of(model, layers)]


def smooth(model: ir.Model, strengths: Mapping[str, float], statistics: Statistics) -> tuple[str, ...]:
    """Applies `strengths` (the plan's `smoothing`: by norm's node) in place, exactly but for float32 rounding. Weights
    and scales that something else uses too are copied. What a norm writes gets a name of its own: it is no longer the
    value that statistics, or a block of the reference, have by that name. Returns a note where channels are always
    zero: they stay as they are.

    Raises UsageError for a name that is no such norm, or one that the statistics do not hold.
    """
    norms = {norm.name: norm for norm in smoothable_norms(model)}
    seen = {}
    for name, strength in strengths.items():
        if name not in norms:
            expected = nearest(name, norms) if norms else "a model with norms that only linear layers read"
            raise UsageError("the plan smooths what is no norm before linear layers", got=name, expected=expected)
        norm = norms[name]
        seen[name] = _channel_largest(norm, statistics)
        apply_factors(model, norm, smoothing_factors(norm, seen[name], strength))
        norm.node.outputs[0].name = f"{norm.value}/smoothed"
    return dead_channels_note(seen)


def smoothing_factors(norm: SmoothableNorm, largest: Array, strength: float) -> Array:
    """Equation 4, float32 [channels]: what each channel is divided by. `largest`: max |x|, [channels]. Several readers
    share the norm: the maximum over their weights. 1 for a channel that is always zero or that no weight reads."""
    weight = np.max([_input_largest(reader) for reader in norm.readers], axis=0)
    used = (largest > 0) & (weight > 0)
    safe_x, safe_w = np.where(used, largest, 1.0).astype(np.float64), np.where(used, weight, 1.0).astype(np.float64)
    factors = np.clip(safe_x**strength / safe_w ** (1.0 - strength), *FACTORS)
    return np.where(used, factors, 1.0).astype(np.float32)


def apply_factors(model: ir.Model, norm: SmoothableNorm, factors: Array) -> None:
    """Divides the norm's output channels by `factors`, float32 [channels], and multiplies its readers' weights."""
    for index in range(1, len(norm.node.inputs)):
        value = norm.node.inputs[index]
        if value is not None:
            assert value.const_value is not None
            set_constant(model, norm.node, index, (value.const_value.numpy() / factors).astype(np.float32))
    for reader in norm.readers:
        axis = input_axis(reader)
        weight = constant_of(reader)
        shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
        set_constant(model, reader, 1, (weight * factors.reshape(shape)).astype(np.float32))


def input_axis(layer: ir.Node) -> int:
    """Of a linear layer's weight: which axis counts the input channels."""
    return 1 if layer.op_type == "Gemm" and layer.attributes.get_int("transB", 0) else 0


def constant_of(layer: ir.Node) -> Array:
    """The weight, as it is stored."""
    weight = weight_of(layer)
    assert weight is not None
    assert weight.const_value is not None
    return weight.const_value.numpy()  # type: ignore[no-any-return]


def _channel_largest(norm: SmoothableNorm, statistics: Statistics) -> Array:
    value = statistics.values.get(norm.value)
    if value is None or value.channel_low is None:
        raise UsageError(
            "the statistics do not hold a norm that the plan smooths",
            where=norm.name,
            expected="statistics that were collected with this plan's model",
            next_step="calibrate again with --data",
        )
    return value.channel_largest()


def _input_largest(reader: ir.Node) -> Array:
    """max |w| by input channel, [channels]."""
    weight = constant_of(reader)
    axis = input_axis(reader)
    return np.asarray(np.abs(weight).max(axis=tuple(a for a in range(weight.ndim) if a != axis)))


def _smoothable(node: ir.Node) -> SmoothableNorm | None:
    if node.op_type not in NORMS or len(node.outputs) > 1 or node.outputs[0].is_graph_output():
        return None
    if not all(_is_vector(value) for value in node.inputs[1:]) or not _over_last_axis(node):
        return None
    readers = tuple(dict.fromkeys(user for user, _ in node.outputs[0].uses()))
    return SmoothableNorm(node, readers) if readers and all(_reads(r, node.outputs[0]) for r in readers) else None


def _over_last_axis(node: ir.Node) -> bool:
    axis, shape = node.attributes.get_int("axis", -1), node.outputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _is_vector(value: ir.Value | None) -> bool:
    return value is None or (
        value.const_value is not None and len(value.const_value.shape) == 1 and value.dtype == ir.DataType.FLOAT
    )


def _reads(reader: ir.Node, value: ir.Value) -> bool:
    """Whether `value` is the activation of this linear layer, and nothing else to it."""
    weight = weight_of(reader) if reader.op_type in ("MatMul", "Gemm") and not reader.domain else None
    return (
        weight is not None
        and weight.const_value is not None
        and weight.dtype == ir.DataType.FLOAT
        and len(weight.const_value.shape) == 2
        and not reader.attributes.get_int("transA", 0)
        and [i for i, given in enumerate(reader.inputs) if given is value] == [0]
    )


def _has_any(norm: SmoothableNorm, layers: Sequence[str] | None) -> bool:
    return layers is None or any(str(reader.name) in layers for reader in norm.readers)
