"""Sequential bias correction (Nagel et al. 2019, section 4.2, with data): the mean error of each convolution goes.

Rounding shifts the mean of a channel, and what follows amplifies the shift. Layer by layer in the order in which they
run, the mean of each output channel with all layers before it quantized and corrected is set beside its mean in the
float model, and the bias takes the difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.calibration import Batches, OpenModel
from attn_deploy.export.precision.insert import Inserter, set_constant
from attn_deploy.export.precision.map_means import channel_means_of
from attn_deploy.export.precision.stretches import Stretches
from attn_deploy.session import Array

LARGEST_BIAS = 2**30
"""Half of int32's range: the products are added to it."""

CORRECTION_BATCHES = 4
"""They are held, and both means are of the same images, so few are enough. Of 8 images each, under our initializer,
with 0, 1, 2 and 4 of them: mobilenetv3_large_100 18.9, 19.1, 19.2, 19.6 dB; efficientnet_b0 21.6, 22.0, 22.0, 22.3;
seresnet50 29.9, 33.7, 33.8, 33.9."""


def correct_biases(
    quantized: ir.Model, reference: ir.Model, layers: Sequence[str], batches: Batches, open_model: OpenModel
) -> dict[str, Array]:
    """Corrects the biases of the convolutions `layers` (names of nodes in both models) in `quantized`, in place, so
    that the mean of every output channel is the one in `reference`, the float model that it was quantized from.

    A bias may be a float initializer, one in int32 behind DequantizeLinear, or not there. Returns what was added,
    float32 [channels] by layer. Raises AttnDeployError without calibration data.
    """
    nodes = [node for node in quantized.graph if node.name in set(layers)]
    if not nodes:
        return {}
    few = list(itertools.islice(batches(), CORRECTION_BATCHES))
    expected = _means(reference, {str(node.name) for node in nodes}, few, open_model)
    stretches = Stretches(quantized, few, open_model)
    added = {}
    for node in nodes:
        found = stretches.run_to(node.outputs[0])
        got = np.average(
            [f.mean(axis=(0, 2, 3), dtype=np.float64) for f in found], axis=0, weights=list(map(len, found))
        )
        name = str(node.name)
        added[name] = _add_to_bias(quantized, node, expected[name] - got)
        stretches.replace(node.outputs[0], [f + added[name][:, None, None] for f in found])
    return added


def _means(
    model: ir.Model, layers: Collection[str], batches: Sequence[Mapping[str, Array]], open_model: OpenModel
) -> dict[str, Array]:
    """Mean of each output channel over samples and pixels, float64 [channels] by layer."""
    outputs = {str(node.name): str(node.outputs[0].name) for node in model.graph if node.name in layers}
    means = channel_means_of(model, list(outputs.values())[::-1], lambda: batches, open_model)
    return {layer: means[value] for layer, value in outputs.items()}


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
