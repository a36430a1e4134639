"""INT8 for TensorRT and CUDA: QuantizeLinear / DequantizeLinear pairs, signed, symmetric, zero point 0.

TensorRT takes INT8 from such pairs alone (its calibrators went with version 11), and UINT8 for network inputs only.
Weights are int8 constants with a scale per output channel behind a DequantizeLinear; activations have one static scale
each; biases stay float. The graph is not bound to a batch size.

Together with half: first this, on the FP32 graph, then `to_half`, which makes the scales and the float rest half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.insert import Inserter, drop_unused_initializers
from attn_deploy.export.precision.int8_linear import quantize_weight
from attn_deploy.export.precision.plan import (
    MAX_EXEMPT_SHARE,
    Exempt,
    PrecisionPlan,
    Scheme,
    multiply_adds,
    plan_int8,
    weight_of,
    weighted_nodes,
)
from attn_deploy.export.precision.symmetric_choice import LayerLoss, choose, measure_layers, output_axis
from attn_deploy.export.precision.symmetric_ranges import (
    RangeMethod,
    activation_scale,
    collect_histograms,
    collect_largest,
)
from attn_deploy.session import Array

ATTENTION_RANGE = RangeMethod.MSE
"""Of query, key, value and result where attention is quantized: all three leave 13 dB on vit_tiny, its attentions
alone quantized and nothing else."""

SOFTMAX_LIMIT = 1.0
"""Weights of an attention: 1/127 a level, whatever the data says."""

LAYER_MIN_SQNR_DB = 15.0
"""Of a layer alone: below it, it stays float as far as the promised share of INT8 allows. On vit_tiny the layer that
makes the massive activations has 9 dB, the next one 20."""

Batches = Callable[[], Iterable[Mapping[str, Array]]]


def plan_symmetric(model: ir.Model, exclude: Sequence[str] = ()) -> PrecisionPlan:
    """The layers of `plan_int8`, with the same exemptions, all with static ranges. `model`: the canonical one, whose
    operators tell gates. Raises UsageError as `plan_int8` does."""
    plan = plan_int8(model, exclude)
    return PrecisionPlan(
        tuple(p if p.scheme is Scheme.FLOAT else replace(p, scheme=Scheme.STATIC_PER_TENSOR) for p in plan.layers)
    )


@dataclass(frozen=True)
class AttentionProducts:
    """The two products of an attention that is written out: scores = first(query, key), result = second(weights,
    value)."""

    first: ir.Node
    second: ir.Node


_TO_SCORES = frozenset({"Add", "Mul", "Div", "Where", "Tanh", "Identity"})


def attention_products(model: ir.Model) -> list[AttentionProducts]:
    """Every MatMul - Softmax - MatMul whose products have no constant operand."""
    found = []
    for node in model.graph:
        if node.op_type == "Softmax":
            first, second = _before(node), _behind(node)
            if first is not None and second is not None:
                found.append(AttentionProducts(first, second))
    return found


def _before(softmax: ir.Node) -> ir.Node | None:
    pending = [softmax]
    seen: set[ir.Node] = set()
    while pending:
        for value in pending.pop(0).inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in seen:
                continue
            seen.add(producer)
            if producer.op_type == "MatMul" and weight_of(producer) is None:
                return producer
            if producer.op_type in _TO_SCORES:
                pending.append(producer)
    return None


def _behind(softmax: ir.Node) -> ir.Node | None:
    value = softmax.outputs[0]
    for _ in range(3):
        readers = [user for user, _ in value.uses() if user.op_type in ("MatMul", "Where", "Identity")]
        if len(readers) != 1:
            return None
        if readers[0].op_type == "MatMul":
            return readers[0] if readers[0].inputs[0] is value else None
        value = readers[0].outputs[0]
    return None


def values_to_calibrate(model: ir.Model, plan: PrecisionPlan, *, attention: bool = False) -> list[str]:
    """Names of all activations that get a range, each once."""
    names: dict[str, None] = {}
    for node in _planned(model, plan):
        names[_name(node.inputs[0])] = None
    for products in attention_products(model) if attention else ():
        for value in (*products.first.inputs, products.second.inputs[1], products.second.outputs[0]):
            names[_name(value)] = None
    return list(names)


def int8_symmetric(
    model: ir.Model,
    plan: PrecisionPlan,
    batches: Batches,
    open_model: OpenModel,
    *,
    attention: bool = False,
    method: RangeMethod | None = None,
) -> PrecisionPlan:
    """Quantizes the layers of `plan` in place, with ranges from calibration data, and returns the plan as it was done.

    The kind of range is chosen for each activation by what its readers lose, unless `method` says one for all. Layers
    that lose too much with any stay float, the worst first, as far as the promised share of INT8 allows. `attention`:
    also both products of each attention, where TensorRT's INT8 attention fusion wants the pairs: before the first
    product, behind the softmax, before and behind the second. Calibration data is read three times. Raises
    AttnDeployError where an activation is not finite, or without calibration data.
    """
    names = values_to_calibrate(model, plan, attention=attention)
    if not names:
        return plan
    largest = collect_largest(model, names, batches(), open_model)
    histograms = collect_histograms(model, largest, batches(), open_model)
    losses = measure_layers(model, list(_planned(model, plan)), histograms, batches, open_model)
    chosen = choose(losses) if method is None else {}
    plan = _without_lossy(model, plan, losses, chosen, method)
    default = method or ATTENTION_RANGE
    limits = {name: histograms[name].limit(chosen.get(name, default)) for name in names}
    quantize_symmetric(model, plan, limits, attention=attention)
    return plan


def _without_lossy(
    model: ir.Model, plan: PrecisionPlan, losses: Sequence[LayerLoss], chosen: Mapping[str, RangeMethod],
    method: RangeMethod | None,
) -> PrecisionPlan:  # fmt: skip
    """The plan with the worst layers in FP32, as far as there is room for them."""
    work = {str(n.name): multiply_adds(n) for n in weighted_nodes(model)}
    exempt = sum(work.get(p.layer, 0) for p in plan.layers if p.scheme is Scheme.FLOAT)
    room = MAX_EXEMPT_SHARE * sum(work.values()) - exempt
    lossy = {}
    for sqnr_db, loss in sorted(((x.sqnr_db(method or chosen[x.value]), x) for x in losses), key=lambda x: x[0]):
        if sqnr_db < LAYER_MIN_SQNR_DB and work[loss.layer] <= room:
            room -= work[loss.layer]
            lossy[loss.layer] = f"{Exempt.LOSS} ({sqnr_db:.1f} dB alone)"
    return PrecisionPlan(
        tuple(replace(p, scheme=Scheme.FLOAT, reason=lossy[p.layer]) if p.layer in lossy else p for p in plan.layers)
    )


def quantize_symmetric(
    model: ir.Model, plan: PrecisionPlan, limits: Mapping[str, float], *, attention: bool = False
) -> None:
    """Puts the pairs into the graph, in place. `limits`: the |x| of the last level by value name."""
    products = attention_products(model) if attention else []
    pairs: dict[ir.Value, ir.Value] = {}
    for node in _planned(model, plan):
        _quantize_input(model, node, 0, limits, pairs)
        _quantize_weight(model, node)
    for each in products:
        fixed = {_name(each.second.inputs[0]): SOFTMAX_LIMIT}
        for node in (each.first, each.second):
            for index in (0, 1):
                _quantize_input(model, node, index, {**limits, **fixed}, pairs)
    for each in products:
        _quantize_output(model, each.second, limits, pairs)
    drop_unused_initializers(model)


def _planned(model: ir.Model, plan: PrecisionPlan) -> Iterator[ir.Node]:
    static = {p.layer for p in plan.layers if p.scheme is Scheme.STATIC_PER_TENSOR}
    return (node for node in weighted_nodes(model) if str(node.name) in static)


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _quantize_input(
    model: ir.Model, node: ir.Node, index: int, limits: Mapping[str, float], pairs: dict[ir.Value, ir.Value]
) -> None:
    """A value that several layers read has one pair."""
    value = node.inputs[index]
    assert value is not None
    if value not in pairs:
        insert = Inserter(model, node, f"input_{index}" if index else "input")
        pairs[value] = _pair(insert, value, limits[_name(value)])
    node.replace_input_with(index, pairs[value])


def _pair(insert: Inserter, value: ir.Value, limit: float) -> ir.Value:
    scale, zero = insert.constant("scale", activation_scale(limit)), insert.constant("zero_point", np.array(0, np.int8))
    quantized = insert.op("QuantizeLinear", [value, scale, zero], dtype=ir.DataType.INT8)
    result = insert.op("DequantizeLinear", [quantized, scale, zero], dtype=ir.DataType.FLOAT)
    quantized.shape = result.shape = value.shape
    return result


def _quantize_output(
    model: ir.Model, node: ir.Node, limits: Mapping[str, float], pairs: Mapping[ir.Value, ir.Value]
) -> None:
    """A pair behind the node, for all that read it."""
    value = node.outputs[0]
    uses = [(user, index) for user, index in value.uses()]
    if value in pairs or value.is_graph_output() or not uses:
        return
    readers = {user for user, _ in uses}
    first = next(n for n in model.graph if n in readers)
    result = _pair(Inserter(model, first, "attended"), value, limits[_name(value)])
    for user, index in uses:
        user.replace_input_with(index, result)


def _quantize_weight(model: ir.Model, node: ir.Node) -> None:
    """weight -> DequantizeLinear(int8 of the same shape, scale [output channels]). The channels of a convolution and
    of a Gemm with transB are its first axis, of other products its last."""
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    axis = output_axis(node)
    quantized, scale = quantize_weight(weight.const_value.numpy(), axis)
    insert = Inserter(model, node, "weight")
    inputs = [
        insert.constant("int8", quantized),
        insert.constant("scale", scale),
        insert.constant("zero_point", np.zeros(len(scale), np.int8)),
    ]
    result = insert.op("DequantizeLinear", inputs, axis=axis, dtype=ir.DataType.FLOAT)
    result.shape = weight.shape
    node.replace_input_with(1, result)
