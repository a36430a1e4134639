"""INT8 and FP8 for TensorRT: QuantizeLinear / DequantizeLinear pairs, signed, symmetric, zero point 0.

TensorRT takes 8 bits from such pairs alone (its calibrators went with version 11), and UINT8 for network inputs only.
Weights are constants of 8 bits with a scale per output channel behind a DequantizeLinear; activations have one static
scale each; biases stay float. The graph is not bound to a batch size.

Together with half: first this, on the FP32 graph, then `to_half`, which makes the scales and the float rest half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir
from msgspec.structs import replace

from attn_deploy.export.precision.attention_products import attention_products
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.insert import Inserter, drop_unused_initializers
from attn_deploy.export.precision.plan import (
    MAX_EXEMPT_SHARE,
    Exempt,
    multiply_adds,
    plan_int8,
    weight_of,
    weighted_nodes,
)
from attn_deploy.export.precision.ranges import RangeMethod
from attn_deploy.export.precision.statistics import Statistics, ValueStatistics, Wanted, collect_statistics
from attn_deploy.export.precision.symmetric_choice import choose, measure_layers, output_axis
from attn_deploy.export.precision.symmetric_format import FP8, INT8, SymmetricFormat
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.session import Array

FORMATS: Mapping[Scheme, SymmetricFormat] = MappingProxyType({form.scheme: form for form in (INT8, FP8)})
"""What a layer becomes by its scheme in the plan."""

ATTENTION_RANGE = RangeMethod.MSE
"""Of query, key, value and result where attention is quantized: all three leave 13 dB on vit_tiny, its attentions
alone quantized and nothing else."""

SOFTMAX_LIMIT = 1.0
"""Weights of an attention: 1/127 a level, whatever the data says."""

LAYER_MIN_SQNR_DB = 15.0
"""Of a layer alone: below it, it stays float as far as the promised share of INT8 allows. On vit_tiny the layer that
makes the massive activations has 9 dB, the next one 20."""

Batches = Callable[[], Iterable[Mapping[str, Array]]]


def plan_symmetric(model: ir.Model, exclude: Sequence[str] = (), form: SymmetricFormat = INT8) -> PrecisionPlan:
    """The layers of `plan_int8`, with the same exemptions, all in the format; FP8 also leaves out what TensorRT has no
    FP8 kernel for. `model`: the canonical one, whose operators tell gates. Raises UsageError as `plan_int8` does."""
    plan = plan_int8(model, exclude)
    nodes = {str(node.name): node for node in weighted_nodes(model)}
    return PrecisionPlan(tuple(_in_format(p, nodes[p.layer], form) for p in plan.layers))


def in_format(plan: PrecisionPlan, model: ir.Model, form: SymmetricFormat) -> PrecisionPlan:
    """A plan that was made for any target, for this one: layers that are INT8 or FP8 there are in the format here, as
    far as it has a kernel for them. Scales of SmoothQuant hold for every target."""
    nodes = {str(node.name): node for node in weighted_nodes(model)}
    layers = tuple(_in_format(p, nodes[p.layer], form) for p in plan.layers if p.layer in nodes)
    return replace(plan, layers=layers, equalized=False, corrected=False)


def _in_format(planned: LayerPlan, node: ir.Node, form: SymmetricFormat) -> LayerPlan:
    if not planned.scheme.quantizes:
        return planned
    if form is FP8 and not has_fp8_kernel(node):
        return replace(planned, scheme=Scheme.FLOAT, reason=Exempt.NO_FP8)
    return replace(planned, scheme=form.scheme)


FP8_CHANNELS = 16
FP8_KERNEL_ELEMENTS = 32


def has_fp8_kernel(node: ir.Node) -> bool:
    """TensorRT convolves in FP8 without groups, channels in and out in multiples of 16, up to 32 elements of a kernel
    (limitations in the release notes of 10.2 to 10.12; NVIDIA/TensorRT#4524); every other convolution is slower with
    pairs than without."""
    if node.op_type != "Conv":
        return True
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    outputs, inputs, *kernel = (int(d) for d in weight.const_value.shape)
    in_multiples = inputs % FP8_CHANNELS == 0 and outputs % FP8_CHANNELS == 0
    return node.attributes.get_int("group", 1) == 1 and in_multiples and math.prod(kernel) <= FP8_KERNEL_ELEMENTS


def values_to_calibrate(model: ir.Model, plan: PrecisionPlan, *, attention: bool = False) -> list[str]:
    """Names of all activations that get a range, each once."""
    names: dict[str, None] = {}
    for node, _ in _planned(model, plan):
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
    settled: bool = False,
    statistics: Statistics | None = None,
) -> PrecisionPlan:
    """Quantizes the layers of `plan` in place, with ranges from calibration data, and returns the plan as it was done.

    The kind of range is chosen for each activation by what its readers lose, unless `method` says one for all. Layers
    that lose too much with any stay float, the worst first, as far as the promised share of 8 bits allows, unless the
    plan is `settled`: somebody's own. `attention`: also both products of each attention, in INT8, where TensorRT's
    attention fusion wants the pairs: before the first product, behind the softmax, before and behind the second.
    `statistics`: collected before, of values by their names here; what is not in them is collected. Raises
    AttnDeployError where an activation is not finite, or without calibration data.
    """
    names = values_to_calibrate(model, plan, attention=attention)
    if not names:
        return plan
    found = _statistics(model, names, batches, open_model, statistics)
    lossy: list[tuple[float, str]] = []
    limits: dict[SymmetricFormat, dict[str, float]] = {}
    for form in FORMATS.values():
        layers = [node for node, own in _planned(model, plan) if own is form]
        losses = measure_layers(model, layers, found, batches, open_model, form)
        chosen = choose(losses) if method is None else dict.fromkeys(names, method)
        lossy += [(loss.sqnr_db(chosen[loss.value]), loss.layer) for loss in losses]
        limits[form] = {name: found[name].limit(chosen.get(name, ATTENTION_RANGE)) for name in names}
    if not settled:
        plan = _without_lossy(model, plan, lossy)
    quantize_symmetric(model, plan, limits, attention=attention)
    return plan


def _statistics(
    model: ir.Model, names: Sequence[str], batches: Batches, open_model: OpenModel, given: Statistics | None
) -> dict[str, ValueStatistics]:
    held = {} if given is None else {n: given.values[n] for n in names if n in given.values}
    held = {name: values for name, values in held.items() if values.histogram is not None}
    missing = [Wanted(name, histogram=True) for name in names if name not in held]
    if missing:
        held |= collect_statistics(model, missing, batches(), open_model).values
    return held


def _without_lossy(model: ir.Model, plan: PrecisionPlan, measured: Sequence[tuple[float, str]]) -> PrecisionPlan:
    """The plan with the worst of the `measured` layers (SQNR in dB, name) in floating point, as far as there is
    room."""
    work = {str(n.name): multiply_adds(n) for n in weighted_nodes(model)}
    exempt = sum(work.get(p.layer, 0) for p in plan.layers if not p.scheme.quantizes)
    room = MAX_EXEMPT_SHARE * sum(work.values()) - exempt
    lossy = {}
    for sqnr_db, layer in sorted(measured):
        if sqnr_db < LAYER_MIN_SQNR_DB and work[layer] <= room:
            room -= work[layer]
            lossy[layer] = f"{Exempt.LOSS} ({sqnr_db:.1f} dB alone)"
    layers = tuple(
        replace(p, scheme=Scheme.FLOAT, reason=lossy[p.layer]) if p.layer in lossy else p for p in plan.layers
    )
    return replace(plan, layers=layers)


def quantize_symmetric(model: ir.Model, plan: PrecisionPlan, limits: Limits, *, attention: bool = False) -> None:
    """Puts the pairs into the graph, in place. `limits`: by format the |x| of the last level by value name."""
    products = attention_products(model) if attention else []
    pairs: Pairs = {}
    for node, form in _planned(model, plan):
        _quantize_input(model, node, 0, limits[form], pairs, form)
        _quantize_weight(model, node, form)
    for each in products:
        fixed = {_name(each.second.inputs[0]): SOFTMAX_LIMIT}
        for node in (each.first, each.second):
            for index in (0, 1):
                _quantize_input(model, node, index, {**limits[INT8], **fixed}, pairs, INT8)
    for each in products:
        _quantize_output(model, each.second, limits[INT8], pairs)
    drop_unused_initializers(model)


Limits = Mapping[SymmetricFormat, Mapping[str, float]]
Pairs = dict[tuple[ir.Value, SymmetricFormat], ir.Value]


def _planned(model: ir.Model, plan: PrecisionPlan) -> Iterator[tuple[ir.Node, SymmetricFormat]]:
    forms = {p.layer: FORMATS[p.scheme] for p in plan.layers if p.scheme in FORMATS}
    return ((node, forms[str(node.name)]) for node in weighted_nodes(model) if str(node.name) in forms)


def _name(value: ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def _quantize_input(
    model: ir.Model, node: ir.Node, index: int, limits: Mapping[str, float], pairs: Pairs, form: SymmetricFormat
) -> None:
    """A value that several layers read has one pair."""
    value = node.inputs[index]
    assert value is not None
    if (value, form) not in pairs:
        insert = Inserter(model, node, f"input_{index}" if index else "input")
        pairs[value, form] = _pair(insert, value, limits[_name(value)], form)
    node.replace_input_with(index, pairs[value, form])


def _pair(insert: Inserter, value: ir.Value, limit: float, form: SymmetricFormat) -> ir.Value:
    scale = insert.constant("scale", form.activation_scale(limit))
    zero = insert.constant("zero_point", form.zero_point())
    quantized = insert.op("QuantizeLinear", [value, scale, zero], dtype=form.dtype)
    result = insert.op("DequantizeLinear", [quantized, scale, zero], dtype=ir.DataType.FLOAT)
    quantized.shape = result.shape = value.shape
    return result


def _quantize_output(model: ir.Model, node: ir.Node, limits: Mapping[str, float], pairs: Pairs) -> None:
    """A pair behind the node of an attention, for all that read it."""
    value = node.outputs[0]
    uses = [(user, index) for user, index in value.uses()]
    if (value, INT8) in pairs or value.is_graph_output() or not uses:
        return
    readers = {user for user, _ in uses}
    first = next(n for n in model.graph if n in readers)
    result = _pair(Inserter(model, first, "attended"), value, limits[_name(value)], INT8)
    for user, index in uses:
        user.replace_input_with(index, result)


def _quantize_weight(model: ir.Model, node: ir.Node, form: SymmetricFormat) -> None:
    """weight -> DequantizeLinear(levels of the same shape, scale [output channels]). The channels of a convolution and
    of a Gemm with transB are its first axis, of other products its last."""
    weight = weight_of(node)
    assert weight is not None
    assert weight.const_value is not None
    axis = output_axis(node)
    quantized, scale = form.quantize_weight(weight.const_value.numpy(), axis)
    insert = Inserter(model, node, "weight")
    inputs = [
        insert.constant(form.dtype.name.lower(), quantized),
        insert.constant("scale", scale),
        insert.constant("zero_point", form.zero_point(len(scale))),
    ]
    result = insert.op("DequantizeLinear", inputs, axis=axis, dtype=ir.DataType.FLOAT)
    result.shape = weight.shape
    node.replace_input_with(1, result)
