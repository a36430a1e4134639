"""Sequential bias correction (Nagel et al. 2019, section 4.2, with data): the mean error of each convolution goes.

Rounding shifts the mean of a channel, and what follows amplifies the shift. Layer by layer in the order in which they
run, the mean of each output channel with all layers before it quantized and corrected is set beside its mean in the
float model, and the bias takes the difference. Only sums leave the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.precision.append import Appender, observed_copy
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.insert import Inserter, set_constant
from attn_deploy.session import Array

Batches = Callable[[], Iterable[Mapping[str, Array]]]

LARGEST_BIAS = 2**30
"""Half of int32's range: the products are added to it."""

CORRECTION_BATCHES = 4
"""A mean over the pixels of a few images is exact enough, and every layer asks for a run of all that is before it."""


def correct_biases(
    quantized: ir.Model, reference: ir.Model, layers: Sequence[str], batches: Batches, open_model: OpenModel
) -> dict[str, Array]:
    """Corrects the biases of the convolutions `layers` (names of nodes in both models) in `quantized`, in place, so
    that the mean of every output channel is the one in `reference`, the float model that it was quantized from.

    A bias may be a float initializer, one in int32 behind DequantizeLinear, or not there. Returns what was added,
    float32 [channels] by layer. Raises AttnDeployError without calibration data.
    """
    nodes = {str(node.name): node for node in quantized.graph}
    ordered = [str(node.name) for node in quantized.graph if str(node.name) in set(layers)]
    if not ordered:
        return {}
    expected = channel_means(reference, ordered, batches, open_model)
    added = {}
    for name in ordered:
        got = channel_means(quantized, [name], batches, open_model)[name]
        added[name] = _add_to_bias(quantized, nodes[name], expected[name] - got)
    return added


def channel_means(model: ir.Model, layers: Sequence[str], batches: Batches, open_model: OpenModel) -> dict[str, Array]:
    """Mean of each output channel over samples and pixels, float64 [channels] by layer. Only what the layers need is
    run."""
    copy, _ = observed_copy(model)
    nodes = {str(node.name): node for node in copy.graph}
    append = Appender(copy, "means")
    axes = append.constant("axes", np.array([0, 2, 3], np.int64))
    for name in layers:
        append.output(f"means/{name}", append.op("ReduceMean", nodes[name].outputs[0], axes, keepdims=0))
    _drop_unneeded(copy)
    run = open_model(copy)
    names = {str(value.name) for value in copy.graph.inputs}
    sums: dict[str, Array] = {}
    samples = 0
    for feeds in itertools.islice(batches(), CORRECTION_BATCHES):
        count = len(next(iter(feeds.values())))
        outputs = run({name: value for name, value in feeds.items() if name in names})
        samples += count
        for name in layers:
            sums[name] = sums.get(name, 0.0) + count * outputs[f"means/{name}"].astype(np.float64)
    if not samples:
        raise AttnDeployError("calibration saw no sample", got=0, expected="at least 1")
    return {name: total / samples for name, total in sums.items()}


def _drop_unneeded(model: ir.Model) -> None:
    """Nodes and weights from which no output follows."""
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]


def _add_to_bias(model: ir.Model, conv: ir.Node, difference: Array) -> Array:
    """What could be added of the difference: an int32 bias takes whole units."""
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    producer = bias.producer() if bias is not None else None
    if bias is not None and producer is None:
        set_constant(model, conv, 2, (_constant(bias) + difference).astype(np.float32))
        return np.asarray(difference, np.float32)
    if producer is None:
        return _give_bias(model, conv, difference)
    levels, scale = _constant(producer.inputs[0]), _constant(producer.inputs[1])
    corrected = levels + _units(difference, scale)
    set_constant(model, producer, 0, np.clip(corrected, -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32))
    return np.asarray(_units(difference, scale) * scale, np.float32)


def _give_bias(model: ir.Model, conv: ir.Node, difference: Array) -> Array:
    """To a convolution without one: in int32 where its operands are quantized, in units of their scales' product."""
    operands = [value.producer() if value is not None else None for value in conv.inputs[:2]]
    if any(node is None or node.op_type != "DequantizeLinear" for node in operands):
        set_constant(model, conv, 2, difference.astype(np.float32))
        return np.asarray(difference, np.float32)
    scales = [_constant(node.inputs[1]) for node in operands if node is not None]
    scale = (scales[0] * scales[1]).astype(np.float32)
    insert = Inserter(model, conv, "correction")
    inputs = [
        insert.constant("bias_int32", np.clip(_units(difference, scale), -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)),
        insert.constant("bias_scale", scale),
        insert.constant("bias_zero_point", np.zeros(len(scale), np.int32)),
    ]
    if len(conv.inputs) < 3:
        conv.resize_inputs(3)
    conv.replace_input_with(2, insert.op("DequantizeLinear", inputs, axis=0))
    return np.asarray(_units(difference, scale) * scale, np.float32)


def _units(difference: Array, scale: Array) -> Array:
    return np.asarray(np.rint(np.divide(difference, scale, out=np.zeros(len(difference)), where=scale > 0)))


def _constant(value: ir.Value | None) -> Array:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()  # type: ignore[no-any-return]
