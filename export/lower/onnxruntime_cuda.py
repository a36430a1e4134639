"""Lowering for ONNX Runtime's CUDA provider: FP32, FP16 and BF16, attention as operators with fused kernels.

INT8 is not offered: the provider has no integer convolution, no QLinearMatMul and no fused product that quantizes, so
that a model with QuantizeLinear and DequantizeLinear computes in floating point between them. (Kernel table of
onnxruntime-gpu 1.31.1: MatMulInteger alone, whose INT32 results need three more passes over memory.)
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attn_deploy.errors import UnavailableError
from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cuda_attention import ATTENTION, fuse_attention
from attn_deploy.export.lower.cuda_bias_gelu import fuse_bias_gelu
from attn_deploy.export.lower.cuda_idle import drop_idle_movement
from attn_deploy.export.lower.cuda_kernels import NATIVE_MAX_HEAD_DIM, half_kernels
from attn_deploy.export.lower.cuda_linear import merge_linears
from attn_deploy.export.lower.cuda_operator import Operator
from attn_deploy.export.lower.cuda_opset import NO_KERNEL_AT_22, raise_for_attention
from attn_deploy.export.lower.cuda_rotary import fuse_rotary
from attn_deploy.export.lower.cuda_skip_norm import FUSED, fuse_skip_norm
from attn_deploy.export.lower.half_graph import half_graph, half_plan, kept_in_float32
from attn_deploy.export.lower.lowered import Alternative, Batches, Conditions, Lowered
from attn_deploy.export.lower.norms import whole_norms
from attn_deploy.export.lower.static_shapes import write_shapes
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.receipt import BlockLoss
from attn_deploy.target import Precision

PRECISIONS = (Precision.FP32, Precision.FP16, Precision.BF16)
"""What this recipe offers; any other raises UnavailableError."""

DEFAULTS = (Precision.FP32, Precision.FP16)

NHWC = {"prefer_nhwc": "1"}
"""Convolutions read their tensors channels last, as the tensor cores' kernels do, and the rest pays for the order."""


def alternatives(canonical: CanonicalModel, precision: Precision, conditions: Conditions) -> tuple[Alternative, ...]:
    """Stock operators or our library's, for convolutions channels last or first (the provider has channels-last
    kernels for FP32 and FP16), and for attention the other operator, whose half kernels are others."""
    used = native_forms(canonical, conditions.kernels)
    has_conv = any(node.op_type == "Conv" for node in canonical.model.graph)
    both_layouts = has_conv and precision is not Precision.BF16
    found = []
    for suffix, arguments in (("", {}), *((("-native", {"native": used}),) if used else ())):
        found.append(Alternative(suffix, arguments))
        if both_layouts:
            found.append(Alternative(f"-nhwc{suffix}", arguments, NHWC))
    forms = (FORMS.get(node.op_type) for node in canonical.model.graph if node.domain == DOMAIN)
    has_attention = any(form is not None and form.operator in ATTENTION for form in forms)
    if has_attention and precision is not Precision.FP32:
        found.append(Alternative("-multihead", {"attention": "MultiHeadAttention"}))
    return tuple(found)


def native_forms(canonical: CanonicalModel, kernels: frozenset[str]) -> frozenset[str]:
    """The forms of the model that the library has a kernel for, whatever the size of their heads in it."""
    too_wide = set()
    for node in canonical.model.graph:
        if node.domain == DOMAIN and FORMS[node.op_type].operator == "PackedAttention":
            packed = node.inputs[0]  # [batch, tokens, 3, heads, head_dim]
            head_dim = packed.shape[-1] if packed is not None and packed.shape is not None else None
            if not isinstance(head_dim, int) or head_dim > NATIVE_MAX_HEAD_DIM:
                too_wide.add(node.op_type)
    return (frozenset(s.operator for s in canonical.sites) & kernels) - too_wide


def lower(
    canonical: CanonicalModel,
    precision: Precision,
    *,
    native: frozenset[str] = frozenset(),
    calibration: Batches | None = None,
    open_model: OpenModel | None = None,
    exclude: Sequence[str] = (),
    attention: Operator = "Attention",
    plan: PrecisionPlan | None = None,
) -> Lowered:
    """`native`: forms that stay operators, to be run by the CUDA library. `exclude`: module paths that stay FP32, as
    layers do that the `plan` says so of; it was made for this target or another, and says nothing else here.
    `calibration` and `open_model` (on the CPU): magnitudes for FP16 and the loss of each block; without them neither.
    `attention`: the operator that is taken where two compute the same.

    Raises UnavailableError for a precision that the provider has no kernels for.
    """
    _require(canonical, precision)
    model = canonical.model.clone()
    has_rms_norm = raise_for_attention(model)
    notes = fuse_attention(model, native, attention)
    fuse_rotary(model, native)
    inline_functions(model, keep=native)
    write_shapes(model)
    drop_idle_movement(model)
    whole_norms(model, rms=has_rms_norm)
    fuse_skip_norm(model)
    fuse_bias_gelu(model)
    merge_linears(model, exclude)
    RemoveUnusedNodesPass()(model)
    drop_unused_initializers(model)
    blocks: tuple[BlockLoss, ...] = ()
    done = PrecisionPlan()
    if precision is not Precision.FP32:
        keep = kept_in_float32(model, plan)
        half = half_graph(
            canonical, model, precision, calibration, open_model, exclude=(*exclude, *keep),
            kernels=half_kernels(precision, native),
        )  # fmt: skip
        model, notes, blocks = half.model, notes + half.notes, half.blocks
        done = half_plan(canonical.model, half.kept)
    options = _options(model, precision)
    return Lowered(model, done, bool(model.functions), notes, options, blocks)


def _require(canonical: CanonicalModel, precision: Precision) -> None:
    offered = ", ".join(PRECISIONS)
    if precision not in PRECISIONS:
        raise UnavailableError(
            "ONNX Runtime has no CUDA kernels for this precision",
            got=precision,
            expected=offered,
            next_step="--target tensorrt for int8 on a GPU, or --precision fp16",
        )
    lost = {n.op_type for n in canonical.model.graph if n.domain == ""} & NO_KERNEL_AT_22
    if precision is Precision.BF16 and lost:
        raise UnavailableError(
            "ONNX Runtime's CUDA provider cannot run this model in bf16",
            got=", ".join(sorted(lost)),
            expected="operators with a CUDA kernel at opset 22, where convolutions have a bf16 form",
            next_step="--precision fp16",
        )


def _options(model: ir.Model, precision: Precision) -> dict[str, str]:
    """Options of the provider that the session must be opened with."""
    options = {"cuda_graph": "1"}
    if precision is Precision.FP32:
        options["use_tf32"] = "0"  # TF32 keeps 11 bits of an operand: it would not be FP32
    elif any(node.op_type in FUSED.values() for node in model.graph):
        options["enable_skip_layer_norm_strict_mode"] = "1"  # sums in FP32, by name
    return options
