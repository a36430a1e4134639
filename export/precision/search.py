"""What a search of precision needs of a model: the parts that it decides about, and what each loses alone in INT8.

A part is a fusible unit (an attention with its linear layers, a feed-forward), and for other layers what a residual sum
goes around, since inside of it one layer's rounding is the next one's input: a block of a CNN, by its module path.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.lower.cpu_units import STOCK, fusible_units
from attn_deploy.export.precision.calibration import OpenModel, Run
from attn_deploy.ops import DOMAIN
from attn_deploy.parity import EXACT_DB, Moments
from attn_deploy.plan_file import is_below
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.session import Array
from attn_deploy.target import Precision

FLOAT, QUANTIZED = "float", "int8"

BLOCKED = "_nchwc"
"""How ONNX Runtime's names of nodes in its blocked layout end: a convolution there is named after what it makes."""


@dataclass(frozen=True)
class PlanPart:
    """`layers`: those of the plan that are not in floating point. `nodes`: names of all of the canonical
    model that belongs to it, by which a profile is attributed; `levels` are its forms there."""

    name: str
    layers: tuple[str, ...]
    nodes: tuple[str, ...]
    levels: tuple[str, ...] = (FLOAT, QUANTIZED)


def plan_parts(canonical: CanonicalModel, plan: PrecisionPlan, kernels: Collection[str]) -> list[PlanPart]:
    """In graph order, so that every layer that `plan` quantizes is in one of them. `kernels`: the forms of the native
    library; its units are parts."""
    quantized = frozenset(plan.quantized)
    names = [str(node.name) for node in canonical.model.graph]
    parts: dict[str, list[str]] = {}
    taken: set[str] = set()
    for unit in fusible_units(canonical, kernels, plan):
        if quantized & set(unit.nodes):
            parts[unit.name] = list(unit.nodes)
            taken.update(unit.nodes)
    blocks = residual_modules(canonical.model)
    rest: dict[str, str] = {n: _block_of(_module(n), blocks) for n in names if n not in taken}
    for block in dict.fromkeys(block for name, block in rest.items() if name in quantized):
        parts[block or "(top level)"] = [name for name, own in rest.items() if own == block]
    order = {name: place for place, name in enumerate(names)}
    blocked = {str(n.name): tuple(f"{o.name}{BLOCKED}" for o in n.outputs) for n in canonical.model.graph}
    found = [
        PlanPart(name, tuple(n for n in nodes if n in quantized), (*nodes, *(b for n in nodes for b in blocked[n])))
        for name, nodes in parts.items()
    ]
    return sorted(found, key=lambda part: order[part.layers[0]])


def levels_under(
    plan: PrecisionPlan,
    canonical: CanonicalModel,
    kernels: Collection[str],
    tuned: Mapping[Precision, Mapping[str, str]],
) -> dict[str, str]:
    """The level of each fusible unit: that of INT8 where the plan quantizes a layer of it, else that of FP32."""
    quantized = frozenset(plan.quantized)
    levels = {}
    for unit in fusible_units(canonical, kernels, plan):
        precision = Precision.INT8 if quantized & set(unit.nodes) else Precision.FP32
        levels[unit.name] = tuned.get(precision, {}).get(unit.name, STOCK)
    return levels


def residual_modules(model: ir.Model) -> frozenset[str]:
    """Modules around which a residual sum goes: whose own code adds two computed values of one shape, or what a gate
    that adds a residual and the layer before it are both in."""
    found = set()
    for node in model.graph:
        module = _module(str(node.name))
        if node.domain == DOMAIN and "Residual" in node.op_type:
            found.add(_shared(module, _module_before(node)))
        elif node.op_type == "Add" and not node.domain and _adds_computed(node):
            found.add(module)
    return frozenset(found - {""})


def _adds_computed(node: ir.Node) -> bool:
    shapes = {None if i is None or i.shape is None else tuple(map(str, i.shape)) for i in node.inputs}
    constant = any(i is None or i.const_value is not None for i in node.inputs)
    return not constant and len(shapes) == 1 and len(next(iter(shapes)) or ()) > 2


def _module_before(node: ir.Node) -> str:
    first = node.inputs[0]
    producer = None if first is None else first.producer()
    return "" if producer is None else _module(str(producer.name))


def _shared(one: str, other: str) -> str:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _block_of(module: str, blocks: Collection[str]) -> str:
    """The innermost residual module around it; else the module that holds it."""
    around = [block for block in blocks if is_below(module, block)]
    return max(around, key=len) if around else module.rpartition(".")[0] or module


def _module(node: str) -> str:
    return node.rpartition("/")[0]


# -- what a part loses alone -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Of the model's outputs, the worst of them, against FP32. `divergence`: the mean over samples of Kullback and
    Leibler's, in nats, of the softmax of the class scores; None for a model without."""

    sqnr_db: float
    divergence: float | None


def part_losses(
    plan: PrecisionPlan,
    parts: Sequence[PlanPart],
    lowered: Callable[[PrecisionPlan], ir.Model],
    open_model: OpenModel,
    batches: Sequence[Mapping[str, Array]],
    scores: str | None,
    step: Callable[[int, int], None],
) -> list[Loss]:
    """Each part alone in INT8, one session at a time. `lowered` makes a model of a plan; the reference is the one of
    which nothing is quantized. `scores` names the output with class scores [batch, classes]."""
    expected = [dict(output) for output in _outputs(open_model(lowered(plan.restricted(()))), batches)]
    losses = []
    for done, part in enumerate(parts):
        step(done, len(parts))
        got = _outputs(open_model(lowered(plan.restricted(part.layers))), batches)
        losses.append(loss(expected, got, scores))
    return losses


def _outputs(run: Run, batches: Iterable[Mapping[str, Array]]) -> Iterator[Mapping[str, Array]]:
    return (run(feeds) for feeds in batches)


def loss(
    expected: Iterable[Mapping[str, Array]], got: Iterable[Mapping[str, Array]], scores: str | None
) -> Loss:  # fmt: skip
    """Over all batches of both."""
    moments: dict[str, Moments] = {}
    diverged: list[Array] = []
    for one, other in zip(expected, got, strict=True):
        for name, value in one.items():
            moments.setdefault(name, Moments()).add(value, other[name])
        if scores is not None:
            diverged.append(divergences(one[scores], other[scores]))
    worst = min((m.fidelity().sqnr_db for m in moments.values()), default=EXACT_DB)
    return Loss(worst, float(np.concatenate(diverged).mean()) if diverged else None)


def divergences(expected: Array, got: Array) -> Array:
    """float64 [batch]: sum over classes of p (log p - log q), p and q the softmax of both scores [batch, classes]."""
    log_p, log_q = (_log_softmax(np.asarray(a, np.float64)) for a in (expected, got))
    found = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return np.where(np.isfinite(found), np.maximum(found, 0.0), 1e9)


def _log_softmax(scores: Array) -> Array:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
