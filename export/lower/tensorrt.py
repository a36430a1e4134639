"""Lowering for TensorRT 10.3 and later: a strongly typed graph of what its ONNX parser takes.

Precision is in the graph alone (TensorRT 11 has no other way, and 10.x is built strongly typed too): FP16 and BF16 by
casts, INT8 and FP8 by symmetric signed QuantizeLinear and DequantizeLinear with zero point 0, with the rest in FP16.

    form                       10.3 to 10.16, and FP32 everywhere      11.0 and later, in every other precision
    Attention, PackedAttention MatMul, Add, Softmax, MatMul            one Attention of opset 23
    ... Grouped                the same; key and value heads repeated  heads as they are
    ... Causal                 a constant triangle in the Add          is_causal, or in the mask where there is one
    ... Bias, Mask             one Add; rows that see nothing set to 0 one mask, bool or added; such rows set to 0
    ... Softcap                Tanh in between, which is not fused     the pattern
    ... Cosine                 unit vectors, head scale on the query   the same before Attention, with scale 1
    ... Indexed (windows)      one Gather in, one out, constant bias   the same around Attention
    head_dim not 16..256 by 8  the pattern, fused by Myelin at best    the pattern
    RotaryEmbedding            its body: Mul, Neg, Concat, Mul, Add    its body: ONNX's has no table for the whole batch
    RMSNorm written out        as it is, its statistics in FP32        RMSNormalization, from 10.15 on
    LayerNorm written out      LayerNormalization                      LayerNormalization
    Gate, pools, other forms   their bodies, fused by Myelin           their bodies

The scale is always on the query or inside Attention, whose parser puts its root on query and key. Attention is the
default from 11.0 on, as NVIDIA's manual recommends it; before, open reports stand against it (NVIDIA/TensorRT#4705: a
10.14 build that fails, #4732: wrong numbers in 10.16), and in FP32 no fused kernel is documented. `attention` overrides
that, so that both can be measured on the device. TRT_decomposable on every Attention lets a GPU without a fused kernel
for its shape build it from parts instead of failing.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from attn_deploy.errors import UsageError
from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.half_graph import half_graph, half_plan, kept_in_float32
from attn_deploy.export.lower.lowered import Alternative, Batches, Conditions, Lowered
from attn_deploy.export.lower.norms import whole_norms
from attn_deploy.export.lower.static_shapes import write_shapes
from attn_deploy.export.lower.tensorrt_attention import OPERATORS, AttentionForm, lower_attention
from attn_deploy.export.lower.tensorrt_operators import (
    NEWEST,
    Version,
    check_parses,
    check_version,
    max_opset,
    version_text,
)
from attn_deploy.export.lower.tensorrt_quantized import means, quantize, smooth_as_planned
from attn_deploy.export.opset import raise_opset
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.export.precision.statistics import Statistics
from attn_deploy.export.precision.symmetric_format import FORMATS
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.receipt import BlockLoss
from attn_deploy.target import Precision

ATTENTION_SINCE: Version = (10, 14)
ATTENTION_DEFAULT: Version = (11, 0)
RMS_NORMALIZATION_SINCE: Version = (10, 15)
DECOMPOSABLE = "TRT_decomposable"
"""The parser's attribute of Attention: without it a build *fails* where the GPU has no fused kernel for the shape."""

OPERATOR_OPSET = 23
"""The first with Attention and RMSNormalization."""


PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8)
DEFAULTS = (Precision.FP32, Precision.FP16)
"""An engine takes minutes to build: INT8, which is often slower than FP16 where attention is, only when it is named;
FP8, which GPUs before compute capability 8.9 lack, too."""


def alternatives(canonical: CanonicalModel, precision: Precision, conditions: Conditions) -> tuple[Alternative, ...]:
    """The other form of attention beside the version's default, where it has both and attention is there at all."""
    version = conditions.tensorrt or NEWEST
    attends = any(FORMS[s.operator].operator in OPERATORS for s in canonical.sites)
    forms = attention_forms(version, precision)[: None if attends else 1]
    return tuple(
        Alternative(f"-{form}" if place else "", {"version": version, "attention": form})
        for place, form in enumerate(forms)
    )


def default_attention(version: Version, precision: Precision) -> AttentionForm:
    """What an attention becomes unless asked otherwise; why is said above."""
    half = precision is not Precision.FP32
    return AttentionForm.OPERATOR if half and version[:2] >= ATTENTION_DEFAULT else AttentionForm.PATTERN


def attention_forms(version: Version, precision: Precision) -> tuple[AttentionForm, ...]:
    """The forms worth measuring on a device, the default first."""
    default = default_attention(version, precision)
    if precision is Precision.FP32 or version[:2] < ATTENTION_SINCE:
        return (default,)
    return (default, *(form for form in AttentionForm if form is not default))


def lower(
    canonical: CanonicalModel,
    precision: Precision,
    *,
    native: frozenset[str] = frozenset(),
    calibration: Batches | None = None,
    open_model: OpenModel | None = None,
    exclude: Sequence[str] = (),
    version: Version = NEWEST,
    attention: AttentionForm | None = None,
    int8_attention: bool = False,
    plan: PrecisionPlan | None = None,
    statistics: Statistics | None = None,
) -> Lowered:
    """`version`: the TensorRT that will parse the model. `exclude`: module paths below which every layer stays in FP32
    (INT8 and FP8: in FP16). `calibration` and `open_model`: INT8 and FP8 need them, FP16 and BF16 check their blocks
    with them. `int8_attention`: the products of an attention are quantized too; the pattern then, whatever `attention`
    says. It is an option to measure: TensorRT fuses it for head sizes 16, 32 and 64 up to 512 tokens, and FP16 is often
    faster.

    `plan`: what each layer is, by its node in the canonical model, made for this target or another; layers in any INT8
    scheme are in this precision. `statistics` were collected from the canonical model; what is missing is collected.

    Raises NotAsAskedError for what that version does not parse, naming the node; UsageError for native forms, a version
    before 10.3, or an attention form that the version lacks.
    """
    if native:
        raise UsageError("TensorRT runs no native operators of ours", got=", ".join(sorted(native)), expected="none")
    check_version(version)
    form = attention or default_attention(version, precision)
    if int8_attention and precision is Precision.INT8:
        form = AttentionForm.PATTERN
    if form is AttentionForm.OPERATOR and version[:2] < ATTENTION_SINCE:
        raise UsageError(
            "this TensorRT has no Attention operator", got=version_text(version), expected="10.14 or later",
            next_step="lower with attention=pattern",
        )  # fmt: skip
    model = canonical.model.clone()
    done, notes, blocks = PrecisionPlan(), tuple[str, ...](), tuple[BlockLoss, ...]()
    quantized = FORMATS.get(precision)
    found = None if quantized is None else means(calibration, open_model, statistics)
    if found is not None:
        notes = smooth_as_planned(canonical, model, plan, found)
    _lower_forms(model, form, version)
    opset = model.opset_imports[""]
    if quantized is not None and found is not None:
        done, more = quantize(canonical, model, quantized, plan, found, exclude=exclude, attention=int8_attention)
        notes += more
    elif precision is not Precision.FP32:
        keep = (*exclude, *kept_in_float32(model, plan))
        half = half_graph(canonical, model, precision, calibration, open_model, exclude=keep)
        model, notes, blocks = half.model, half.notes, half.blocks
        done = half_plan(canonical.model, half.kept)
    # BF16 convolutions are in ONNX from opset 22 on and in TensorRT's parser at every opset: the number is a label.
    model.graph.opset_imports[""] = min(model.opset_imports[""], max(opset, max_opset(version)))
    drop_unused_initializers(model)
    for node in model.graph:
        if node.op_type == "Attention":  # last: no runtime but TensorRT takes a model with it
            node.attributes[DECOMPOSABLE] = ir.AttrInt64(DECOMPOSABLE, 1)
    check_parses(model, version)
    return Lowered(model, done, library=False, notes=notes, blocks=blocks)


def _lower_forms(model: ir.Model, form: AttentionForm, version: Version) -> None:
    """Our operators as ONNX's, in place."""
    families = {name for name, f in FORMS.items() if f.operator in OPERATORS}
    inline_functions(model, keep=frozenset(families))
    opset = model.opset_imports[""]
    wants_rms = version[:2] >= RMS_NORMALIZATION_SINCE
    raised = (form is AttentionForm.OPERATOR or wants_rms) and raise_opset(model, OPERATOR_OPSET)
    if not raised:
        form = AttentionForm.PATTERN
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type in families:
            lower_attention(model, node, form)
    inline_functions(model)
    write_shapes(model)
    whole_norms(model, rms=raised and wants_rms)
    write_shapes(model)
    if not {"Attention", "RMSNormalization"} & {node.op_type for node in model.graph}:
        model.graph.opset_imports[""] = opset  # older TensorRT can then take the model too


def standard(model: ir.Model) -> ir.Model:
    """A copy without the attributes that only TensorRT's parser knows: what ONNX and other runtimes take."""
    copy = model.clone()
    for node in copy.graph:
        node.attributes.pop(DECOMPOSABLE, None)
    return copy
