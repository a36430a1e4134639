"""INT8 for the CPU as a precision plan says: what of it is done before linear layers become operators.

First the model is rewritten exactly, as far as the plan has it so: SmoothQuant between norms and the layers that read
them, equalization along chains of convolutions. Then convolutions get their calibrated ranges, and layers whose weights
alone are INT8 their operator. Linear layers with activations per token are `fuse_units`' part: what stands around them
goes into their operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import onnx_ir as ir

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cpu_int8_chain import chain_layers, lower_chain
from attn_deploy.export.lower.lowered import Batches
from attn_deploy.export.precision.bias_correction import correct_biases
from attn_deploy.export.precision.calibration import OpenModel
from attn_deploy.export.precision.equalize import equalize, wanted_for_equalization
from attn_deploy.export.precision.int8_chain import read_by_convolutions, wanted_for_chain
from attn_deploy.export.precision.int8_conv import quantize_convs, values_to_calibrate
from attn_deploy.export.precision.map_means import channel_means_of
from attn_deploy.export.precision.plan import Exempt, weighted_nodes
from attn_deploy.export.precision.smooth_quant import smooth, wanted_for_smoothing
from attn_deploy.export.precision.statistics import Statistics, Wanted, collect_statistics
from attn_deploy.export.precision.weight_only import quantize_blocks
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme


@dataclass(frozen=True)
class Calibration:
    """What is known of activations: `statistics` collected before, and the means to collect what they lack."""

    statistics: Statistics | None = None
    batches: Batches | None = None
    open_model: OpenModel | None = None

    def knowing(self, model: ir.Model, wanted: Sequence[Wanted]) -> Calibration:
        """With statistics that hold all that is wanted of `model`. Raises AttnDeployError where there are no means."""
        known = self.statistics
        if not wanted or (known is not None and known.hold(wanted)):
            return self
        batches, open_model = self.means()
        found = collect_statistics(_written_out(model), wanted, batches(), open_model)
        if known is not None:
            found = replace(found, values={**known.values, **found.values}, means=known.means)
        return replace(self, statistics=found)

    def means(self) -> tuple[Batches, OpenModel]:
        if self.batches is None or self.open_model is None:
            raise AttnDeployError(
                "the precision plan needs ranges of activations", got="neither statistics nor calibration data",
                expected="one of them", next_step="export again with --data",
            )  # fmt: skip
        return self.batches, self.open_model


@dataclass(frozen=True)
class Int8Graph:
    """`plan`: what was done. `statistics`: what of activations the plan needed, None where nothing."""

    model: ir.Model
    plan: PrecisionPlan
    notes: tuple[str, ...]
    statistics: Statistics | None


def int8_graph(
    canonical: CanonicalModel, plan: PrecisionPlan, calibration: Calibration, kernels: frozenset[str] = frozenset()
) -> Int8Graph:
    """A copy of the canonical model with everything of `plan` in it but its linear layers per token. Convolutions whose
    chains `kernels` can run whole are theirs, those too that the plan leaves out because ONNX Runtime gains nothing.

    Raises AttnDeployError where the plan needs calibration and there is none of it.
    """
    model = canonical.model.clone()
    convs = [n for n in weighted_nodes(model) if n.op_type == "Conv" and plan.scheme(str(n.name)) is Scheme.STATIC]
    if not convs and not plan.smoothing and not plan.equalized:
        calibration = Calibration()
    calibration, notes = _reparametrized(model, plan, calibration)
    chain = chain_layers(model, plan, kernels) if convs else frozenset()
    if chain:
        calibration = _lower_chain(model, chain, calibration)
        plan = _chained(plan, chain)
    elif convs:
        calibration = _quantize_convs(model, convs, plan, calibration)
    for node in [n for n in weighted_nodes(model) if plan.scheme(str(n.name)) is Scheme.WEIGHT_ONLY]:
        quantize_blocks(model, node)
    return Int8Graph(model, plan, notes, calibration.statistics)


def _reparametrized(
    model: ir.Model, plan: PrecisionPlan, calibration: Calibration
) -> tuple[Calibration, tuple[str, ...]]:
    """In place."""
    wanted = wanted_for_smoothing(model) if plan.smoothing else []
    wanted += wanted_for_equalization(model) if plan.equalized else []
    calibration = calibration.knowing(model, wanted)
    notes: tuple[str, ...] = ()
    if plan.smoothing:
        assert calibration.statistics is not None
        notes += smooth(model, plan.smoothing, calibration.statistics)
    if plan.equalized:
        assert calibration.statistics is not None
        notes += equalize(model, calibration.statistics, plan.of(Scheme.STATIC))
    return calibration, notes


def _lower_chain(model: ir.Model, layers: frozenset[str], calibration: Calibration) -> Calibration:
    calibration = calibration.knowing(model, wanted_for_chain(model, layers))
    statistics = calibration.statistics
    assert statistics is not None
    names = read_by_convolutions(model, layers)
    if not statistics.means.keys() >= set(names) and calibration.batches is not None and calibration.open_model:
        means = channel_means_of(_written_out(model), names, calibration.batches, calibration.open_model)
        statistics = replace(statistics, means=means)
    lower_chain(model, layers, statistics, {name: statistics.means[name] for name in names if name in statistics.means})
    return replace(calibration, statistics=statistics)


def _chained(plan: PrecisionPlan, layers: frozenset[str]) -> PrecisionPlan:
    """What the chain took is in 8 bits, what it left is not."""
    done = (
        LayerPlan(p.layer, Scheme.STATIC, "" if p.scheme is Scheme.FLOAT else p.reason)
        if p.layer in layers
        else LayerPlan(p.layer, Scheme.FLOAT, Exempt.FORM)
        if p.scheme is Scheme.STATIC
        else p
        for p in plan.layers
    )
    return msgspec.structs.replace(plan, layers=tuple(done))


def _quantize_convs(
    model: ir.Model, convs: list[ir.Node], plan: PrecisionPlan, calibration: Calibration
) -> Calibration:
    reference = _written_out(model)
    calibration = calibration.knowing(model, [Wanted(name) for name in values_to_calibrate(convs)])
    assert calibration.statistics is not None
    quantize_convs(model, convs, calibration.statistics.ranges())
    if plan.corrected:
        batches, open_model = calibration.means()
        correct_biases(model, reference, [str(conv.name) for conv in convs], batches, open_model)
    return calibration


def _written_out(model: ir.Model) -> ir.Model:
    copy = model.clone()
    inline_functions(copy)
    return copy
