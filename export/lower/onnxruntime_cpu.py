"""Lowering for ONNX Runtime on the CPU: FP32, FP16 storage and INT8, with function bodies inlined or native kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cpu_global_pool import global_pools
from attn_deploy.export.lower.cpu_units import SITE, STOCK, fuse_units, fusible_units, prepare
from attn_deploy.export.lower.lowered import Alternative, Batches, Conditions, Lowered
from attn_deploy.export.precision.calibration import OpenModel, collect_ranges
from attn_deploy.export.precision.fp16 import store_fp16
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.export.precision.int8_conv import quantize_convs, values_to_calibrate
from attn_deploy.export.precision.int8_linear import quantize_linear
from attn_deploy.export.precision.plan import PrecisionPlan, Scheme, plan_int8, weighted_nodes
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.target import Precision

PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
DEFAULTS = (Precision.FP32, Precision.INT8)


BLOCKED = {"layout": "blocked"}
"""The graph that ONNX Runtime optimized on this CPU is rewritten, so that what stands between two convolutions stays in
their layout (runtimes/onnxruntime_blocked.py)."""

MIN_CONVOLUTIONS = 4
"""Fewer are a stem, with nothing between them."""

SITES = (STOCK, SITE)
"""What a unit can be beside INT8."""

_INSIDE_BLOCKED = frozenset({"Gate", "ChannelPool", "SpatialPool"})
"""Operators whose bodies are what the blocked layout works on."""


def alternatives(canonical: CanonicalModel, precision: Precision, conditions: Conditions) -> tuple[Alternative, ...]:
    """Function bodies; the levels that tuning chose, where it did; what the native library's kernels can run as coarse
    as it can; and convolutions with all between them in the blocked layout. The kernels are FP32 alone: an operator
    beside FP16 weights would meet no kernel, and INT8 quantizes the linear layers."""
    found = [Alternative()]
    tuned = conditions.tuned.get(precision)
    if precision is Precision.FP16:
        used: frozenset[str] = frozenset()
    elif precision is Precision.FP32:
        used = _useful(canonical, conditions.kernels)
    else:
        used = frozenset(s.operator for s in canonical.sites) & conditions.kernels
    if used:
        if tuned is not None and _is_mixture(canonical, precision, used, tuned):
            found.append(Alternative("-tuned", {"native": used, "fuse": tuned}))
        found.append(Alternative("-native", {"native": used}))
    if precision is Precision.FP32 and _has_blocked(canonical, conditions):
        found.append(Alternative("-blocked", _beside_blocked(canonical, conditions.kernels, tuned), BLOCKED))
    return tuple(found)


def _useful(canonical: CanonicalModel, kernels: frozenset[str]) -> frozenset[str]:
    """The kernels, if one of them can run something of the model."""
    return kernels if fusible_units(canonical, kernels) else frozenset()


def _is_mixture(
    canonical: CanonicalModel, precision: Precision, kernels: frozenset[str], tuned: Mapping[str, str]
) -> bool:
    """Whether the levels are neither stock everywhere nor the coarsest, which are offered anyway."""
    units = fusible_units(canonical, kernels)
    coarsest = {u.name: next(v for v in reversed(u.levels) if precision is Precision.FP32 or v in SITES) for u in units}
    return any(level != STOCK for level in tuned.values()) and any(
        tuned.get(name, STOCK) != level for name, level in coarsest.items()
    )


def _has_blocked(canonical: CanonicalModel, conditions: Conditions) -> bool:
    convolutions = sum(node.op_type == "Conv" for node in canonical.model.graph)
    return convolutions >= MIN_CONVOLUTIONS and any(name.startswith("Blocked") for name in conditions.kernels)


def _beside_blocked(
    canonical: CanonicalModel, kernels: frozenset[str], tuned: Mapping[str, str] | None
) -> dict[str, Any]:
    """Attention and linear layers as without it; gates and pools written out."""
    rest = frozenset(name for name in kernels if name in FORMS and FORMS[name].operator not in _INSIDE_BLOCKED)
    units = {unit.name: unit for unit in fusible_units(canonical, rest)}
    if not units:
        return {}
    if tuned is None:
        return {"native": rest}
    fitting = {name: level for name, level in tuned.items() if name in units and level in units[name].levels}
    return {"native": rest, "fuse": fitting}


def lower(
    canonical: CanonicalModel,
    precision: Precision,
    *,
    native: frozenset[str] = frozenset(),
    fuse: Mapping[str, str] | None = None,
    calibration: Batches | None = None,
    open_model: OpenModel | None = None,
    exclude: Sequence[str] = (),
) -> Lowered:
    """`native`: forms that the native library can run; all others are inlined. `fuse`: the level of each fusible unit
    (cpu_units says what they are), None for the coarsest that `native` allows; a unit that it leaves out is stock.
    INT8 has the levels stock and site. `exclude`: module paths below which every layer stays in floating point.

    INT8 of a model with convolutions needs `calibration` and `open_model`.
    """
    model = canonical.model.clone()
    plan = PrecisionPlan(())
    notes: tuple[str, ...] = ()
    if precision is Precision.INT8:
        plan = plan_int8(model, exclude)
        _quantize(canonical, model, plan, calibration, open_model)
    if native and precision is Precision.FP32:
        fuse_units(model, native, fuse)
    else:
        if precision is Precision.FP32:
            prepare(model)
        inline_functions(model, keep=native, apart_from=_stock_sites(model, fuse))
    if precision is not Precision.INT8:
        global_pools(model)
    if precision is Precision.FP16:
        notes = tuple(f"{name} stays FP32: beyond FP16's range" for name in store_fp16(model))
    drop_unused_initializers(model)
    return Lowered(model, plan, bool(model.functions), notes)


def _stock_sites(model: ir.Model, fuse: Mapping[str, str] | None) -> frozenset[str]:
    if fuse is None:
        return frozenset()
    return frozenset(str(n.name) for n in model.graph if n.domain == DOMAIN and fuse.get(str(n.name), STOCK) == STOCK)


def _quantize(
    canonical: CanonicalModel,
    model: ir.Model,
    plan: PrecisionPlan,
    calibration: Batches | None,
    open_model: OpenModel | None,
) -> None:
    by_scheme: dict[Scheme, list[ir.Node]] = {scheme: [] for scheme in Scheme}
    for node in weighted_nodes(model):
        by_scheme[plan.scheme(str(node.name))].append(node)
    convs = by_scheme[Scheme.STATIC_PER_TENSOR]
    if convs:
        assert calibration is not None
        assert open_model is not None
        reference = canonical.model.clone()
        inline_functions(reference)
        ranges = collect_ranges(reference, values_to_calibrate(convs), calibration(), open_model)
        quantize_convs(model, convs, ranges)
    for node in by_scheme[Scheme.DYNAMIC_PER_TOKEN]:
        quantize_linear(model, node)
