"""Lowering for ONNX Runtime on the CPU: FP32, FP16 storage and INT8, with function bodies inlined or native kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from msgspec.structs import replace

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cpu_global_pool import global_pools
from attn_deploy.export.lower.cpu_int8 import Calibration, int8_graph
from attn_deploy.export.lower.cpu_units import STOCK, Unit, fuse_units, fusible_units, int8_layers, plainer, prepare
from attn_deploy.export.lower.lowered import Alternative, Batches, Conditions, Lowered
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.fp16 import store_fp16
from attn_deploy.export.precision.insert import drop_unused_initializers
from attn_deploy.export.precision.plan import Exempt, plan_int8, weighted_nodes
from attn_deploy.export.precision.statistics import Statistics
from attn_deploy.export.precision.weight_only import weight_only_plan
from attn_deploy.ops import FORMS
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.target import Precision

PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8, Precision.AUTO)
DEFAULTS = (Precision.FP32, Precision.INT8)

IN_FLOAT = (Precision.FP32, Precision.FP16)
"""Computed in FP32, whatever the weights are stored in."""

BLOCKED = {"layout": "blocked"}
"""The graph that ONNX Runtime optimized on this CPU is rewritten, so that what stands between two convolutions stays in
their layout (runtimes/onnxruntime_blocked.py)."""

MIN_CONVOLUTIONS = 4
"""Fewer are a stem, with nothing between them."""

_INSIDE_BLOCKED = frozenset({"Gate", "ChannelPool", "SpatialPool"})
"""Operators whose bodies are what the blocked layout works on."""


def alternatives(canonical: CanonicalModel, precision: Precision, conditions: Conditions) -> tuple[Alternative, ...]:
    """Function bodies; the levels that tuning chose, where it did; what the native library's kernels can run as coarse
    as it can; and convolutions with all between them in the blocked layout. FP16, which is how weights are stored, has
    the forms of FP32, which it computes in."""
    found = [Alternative()]
    tuned = conditions.tuned.get(Precision.FP32 if precision is Precision.FP16 else precision)
    kernels = conditions.kernels
    units = _units(canonical, precision, conditions)
    if _run_something(canonical, units, kernels):
        if tuned is not None and _is_mixture(units, tuned):
            found.append(Alternative("-tuned", {"native": kernels, "fuse": tuned}))
        found.append(Alternative("-native", {"native": kernels}))
    if precision in IN_FLOAT and _has_blocked(canonical, conditions):
        found.append(Alternative("-blocked", _beside_blocked(canonical, conditions.kernels, tuned), BLOCKED))
    if precision is Precision.INT8 and conditions.blocks and (conditions.plan or PrecisionPlan()).of(Scheme.PER_TOKEN):
        found.append(Alternative("-weights", {"native": kernels, "blocks": True}))
    return tuple(found)


def _units(canonical: CanonicalModel, precision: Precision, conditions: Conditions) -> tuple[Unit, ...]:
    plan = None
    if precision.quantized:
        plan = conditions.plan or plan_int8(canonical.model)
    return fusible_units(canonical, conditions.kernels, plan)


def _run_something(canonical: CanonicalModel, units: Sequence[Unit], kernels: frozenset[str]) -> bool:
    """Whether kernels run anything of the units: a level besides stock is a kernel's, but in INT8 bodies run too, and a
    kernel has to be there for a site or a layer."""
    if any(STOCK in unit.levels for unit in units):
        return bool(kernels)
    sites = {site.operator for site in canonical.sites}
    layers = {name for name in kernels if name in FORMS and FORMS[name].operator == "QuantizedLinear"}
    return bool(units) and bool(layers or sites & kernels)


def _is_mixture(units: Sequence[Unit], tuned: Mapping[str, str]) -> bool:
    """Whether the levels are neither stock everywhere nor the coarsest, which are offered anyway."""
    levels = {unit.name: plainer(tuned.get(unit.name, STOCK), unit.levels) for unit in units}
    return any(level != STOCK for level in levels.values()) and any(
        levels[unit.name] != unit.levels[-1] for unit in units
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
    plan: PrecisionPlan | None = None,
    statistics: Statistics | None = None,
    blocks: bool = False,
) -> Lowered:
    """`native`: forms that the native library can run; all others are inlined. `fuse`: the level of each fusible unit
    (cpu_units says what they are), None for the coarsest that `native` allows; a unit that it leaves out is at its
    plainest.

    INT8 follows `plan`, a plan of nodes, or without one `plan_int8`, which leaves what is below the module paths
    `exclude` in floating point. Convolutions in INT8 need `calibration` and `open_model`; so does a plan that smooths
    or equalizes, unless there are `statistics`. `blocks`: linear layers have their weights in blocks instead of
    activations per token. The plan that comes back is what was done.
    """
    notes: tuple[str, ...] = ()
    if precision.quantized:
        plan = plan_int8(canonical.model, exclude) if plan is None else plan
        plan = weight_only_plan(plan) if blocks else plan
        graph = int8_graph(canonical, plan, Calibration(statistics, calibration, open_model), native)
        model, plan, notes, statistics = graph.model, graph.plan, graph.notes, graph.statistics
        plan = _without(plan, _linear(canonical.model, plan) - fuse_units(model, native, fuse, plan))
    else:
        plan, model, statistics = PrecisionPlan(), canonical.model.clone(), None
        if native:
            fuse_units(model, native, fuse)
        else:
            prepare(model)
            inline_functions(model)
        global_pools(model)
    if precision is Precision.FP16:
        notes = tuple(f"{name} stays FP32: beyond FP16's range" for name in store_fp16(model))
    drop_unused_initializers(model)
    return Lowered(model, plan, bool(model.functions), notes, statistics=statistics)


def _linear(model: ir.Model, plan: PrecisionPlan) -> frozenset[str]:
    """The linear layers that the plan has in 8 bits per token."""
    names = int8_layers(plan)
    return frozenset(str(n.name) for n in weighted_nodes(model) if n.op_type != "Conv" and str(n.name) in names)


def _without(plan: PrecisionPlan, layers: frozenset[str]) -> PrecisionPlan:
    """The plan with layers in floating point that have no operator in 8 bits."""
    left = (LayerPlan(p.layer, Scheme.FLOAT, Exempt.FORM) if p.layer in layers else p for p in plan.layers)
    return replace(plan, layers=tuple(left))
