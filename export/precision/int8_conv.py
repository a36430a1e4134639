"""INT8 for convolutions: QuantizeLinear / DequantizeLinear pairs that ONNX Runtime turns into QLinearConv.

Weights symmetric per output channel, activations unsigned with calibrated ranges (U8S8: right on x86 with VNNI).
Whatever a quantized convolution writes is quantized at once, behind its ReLU where it has one; a value that something
else computes is quantized only for the convolutions that read it, so that residuals and gates stay in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.insert import Inserter
from attn_deploy.export.precision.quantize_weight import quantize_weight
from attn_deploy.export.precision.ranges import Range

LARGEST_BIAS = 2**30
"""Half of int32's range: the products are added to it."""


def written_value(conv: ir.Node) -> ir.Value:
    """What a quantized convolution writes: its output, or its ReLU's when that is the only reader."""
    output = conv.outputs[0]
    users = [u for u, _ in output.uses()]
    if len(users) == 1 and users[0].op_type == "Relu" and not output.is_graph_output():
        return users[0].outputs[0]
    return output


def values_to_calibrate(convs: Sequence[ir.Node]) -> list[str]:
    """Names of all values that get a range, each once."""
    names: dict[str, None] = {}
    for conv in convs:
        for value in (conv.inputs[0], written_value(conv)):
            assert value is not None
            assert value.name is not None
            names[value.name] = None
    return list(names)


def quantize_convs(model: ir.Model, convs: Sequence[ir.Node], ranges: Mapping[str, Range]) -> None:
    """Puts the pairs around the convolutions, in place."""
    dequantized: dict[str, ir.Value] = {}
    for conv in convs:
        value = written_value(conv)
        name = str(value.name)
        if name not in dequantized and not value.is_graph_output():
            dequantized[name] = _quantize_written(model, value, _useful(value, ranges[name]))
    for conv in convs:
        source = conv.inputs[0]
        assert source is not None
        key = _origin(source)
        if key not in dequantized:
            dequantized[key] = _pair(model, conv, source, ranges[key])
        conv.replace_input_with(0, dequantized[key])
        _quantize_parameters(model, conv, ranges[key])


NO_USE_BELOW = {"HardSwish": -3.0, "SiLU": -6.0}
"""Below this an activation's result is (nearly) nothing: HardSwish is 0 from -3 on, SiLU at most 0.015 from -6 on."""


def _useful(value: ir.Value, span: Range) -> Range:
    """The part of the range that the value's readers tell apart, when an activation is the only one to read it."""
    readers = {u.op_type for u, _ in value.uses()}
    activation = "SiLU" if readers == {"Sigmoid", "Mul"} else next(iter(readers)) if len(readers) == 1 else ""
    low = NO_USE_BELOW.get(activation)
    return span if low is None else Range(max(span.low, low), span.high)


def _origin(value: ir.Value) -> str:
    """The name under which a value was calibrated: behind a pair it is the value before the pair."""
    producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        quantize = producer.inputs[0].producer()  # type: ignore[union-attr]
        if quantize is not None:
            return str(quantize.inputs[0].name)  # type: ignore[union-attr]
    return str(value.name)


def scale_and_zero_point(span: Range) -> tuple[np.float32, np.uint8]:
    """The affine mapping of [low, high] (widened to hold 0) onto 0..255."""
    low, high = min(span.low, 0.0), max(span.high, 0.0)
    scale = max((high - low) / 255.0, 1e-12)
    return np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255))


def _pair(model: ir.Model, anchor: ir.Node, value: ir.Value, span: Range) -> ir.Value:
    """Quantizes and dequantizes a value in front of `anchor`."""
    scale, zero_point = scale_and_zero_point(span)
    insert = Inserter(model, anchor, "input")
    scale_value = insert.constant("scale", np.array(scale))
    zero_value = insert.constant("zero_point", np.array(zero_point))
    quantized = insert.op("QuantizeLinear", [value, scale_value, zero_value], dtype=ir.DataType.UINT8)
    return insert.op("DequantizeLinear", [quantized, scale_value, zero_value], dtype=ir.DataType.FLOAT)


def _quantize_written(model: ir.Model, value: ir.Value, span: Range) -> ir.Value:
    """A pair behind `value`; everything that read the value reads the pair."""
    producer = value.producer()
    assert producer is not None
    scale, zero_point = scale_and_zero_point(span)
    names = [f"{producer.name}/output_scale", f"{producer.name}/output_zero_point"]
    constants = []
    for name, array in zip(names, (np.array(scale), np.array(zero_point)), strict=True):
        constant = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(constant)
        constants.append(constant)
    quantized = ir.Value(name=f"{producer.name}/quantized", type=ir.TensorType(ir.DataType.UINT8))
    result = ir.Value(name=f"{producer.name}/dequantized", type=value.type, shape=value.shape)
    value.replace_all_uses_with(result)
    pair = [
        ir.Node("", "QuantizeLinear", [value, *constants], outputs=[quantized], name=f"{producer.name}/QuantizeLinear"),
        ir.Node("", "DequantizeLinear", [quantized, *constants], outputs=[result],
                name=f"{producer.name}/DequantizeLinear"),
    ]  # fmt: skip
    model.graph.insert_after(producer, pair)
    return result


def _quantize_parameters(model: ir.Model, conv: ir.Node, input_span: Range) -> None:
    """The weight as int8 per output channel, the bias as int32 in units of input scale times weight scale.

    A channel whose weights vanish beside its bias (a BatchNormalization that scales by nothing was folded into it)
    gets a scale in which the bias fits.
    """
    weight_value = conv.inputs[1]
    assert weight_value is not None
    assert weight_value.const_value is not None
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias_array = bias.const_value.numpy() if bias is not None and bias.const_value is not None else None
    input_scale, _ = scale_and_zero_point(input_span)
    least_scale = None if bias_array is None else np.abs(bias_array.astype(np.float64)) / (input_scale * LARGEST_BIAS)
    weight, weight_scale = quantize_weight(weight_value.const_value.numpy(), axis=0, least_scale=least_scale)
    insert = Inserter(model, conv, "parameters")
    scale_value = insert.constant("weight_scale", weight_scale)
    zeros = insert.constant("weight_zero_point", np.zeros(len(weight_scale), np.int8))
    conv.replace_input_with(
        1, insert.op("DequantizeLinear", [insert.constant("weight_int8", weight), scale_value, zeros], axis=0)
    )
    if bias_array is None:
        return
    bias_scale = (weight_scale * input_scale).astype(np.float32)
    # two tiny scales may multiply to 0 where there is no bias
    units = np.divide(bias_array, bias_scale, out=np.zeros(len(bias_scale)), where=bias_scale > 0, dtype=np.float64)
    bias_int = np.clip(np.rint(units), -LARGEST_BIAS, LARGEST_BIAS)
    inputs = [
        insert.constant("bias_int32", bias_int.astype(np.int32)),
        insert.constant("bias_scale", bias_scale),
        insert.constant("bias_zero_point", np.zeros(len(bias_scale), np.int32)),
    ]
    conv.replace_input_with(2, insert.op("DequantizeLinear", inputs, axis=0))
