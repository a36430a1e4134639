"""Fusible units: what of a model can run by the native library, in which grains, and the lowering of each to one.

A unit is an attention with the linear layers around it, any other site, a feed-forward block, or a linear layer of no
block. Its levels, from the finest to the coarsest:
    stock   function bodies and ONNX Runtime's own operators
    site    the library's kernel for the site alone
    linear  that, and for each linear layer an operator with the norm, activation and residual around it
    block   one operator for all of it
Which is fastest only a measurement can tell. Under a precision plan that puts layers of a unit into 8 bits per token it
has the levels linear and block, of operators whose weights are in 8 bits; those that the library lacks run as bodies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attn_deploy.errors import UsageError
from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.functions import attach_functions, inline_functions
from attn_deploy.export.lower.cpu_attention import (
    AttentionBlock,
    attention_block,
    fuse_attention_block,
    pack,
    packable,
)
from attn_deploy.export.lower.cpu_feed_forward import FeedForward, feed_forwards, fuse_feed_forward
from attn_deploy.export.lower.cpu_fuser import Fuser
from attn_deploy.export.lower.cpu_linear import LinearLayer, bare, linear_layers, narrowed
from attn_deploy.export.lower.cpu_rows import keep_tokens_flat
from attn_deploy.export.lower.cpu_selected_rows import select_rows_early
from attn_deploy.export.lower.cuda_idle import drop_idle_movement
from attn_deploy.export.lower.cuda_nodes import dims
from attn_deploy.ops import BLOCK_FORMS, DOMAIN, FORMS
from attn_deploy.precision_plan import PrecisionPlan, Scheme
from attn_deploy.target import nearest

STOCK, SITE, LINEAR, BLOCK = LEVELS = ("stock", "site", "linear", "block")


@dataclass(frozen=True)
class Unit:
    """`name` is stable from one export to the next: the site's node name, `module/FeedForward`, or the layer's node
    name. `levels` are those that the kernels allow, two or more, from the finest to the coarsest. `multiply_adds` are
    those of all that it can hold, for one sample (a dynamic length counts as 1). `nodes` are the nodes of the canonical
    model that it covers: names of what runs start with them at every level. `site` is the site's node name, if any."""

    name: str
    levels: tuple[str, ...]
    multiply_adds: int
    nodes: tuple[str, ...]
    site: str | None = None


def fusible_units(
    canonical: CanonicalModel, kernels: Collection[str], plan: PrecisionPlan | None = None
) -> tuple[Unit, ...]:
    """In graph order; those of which `kernels`, the operator forms of the library, can run something. With `plan` as
    they are under it: those in 8 bits all, since bodies run them too."""
    return tuple(unit for unit in all_units(canonical, kernels, plan) if len(unit.levels) > 1 or LINEAR in unit.levels)


def all_units(
    canonical: CanonicalModel, kernels: Collection[str], plan: PrecisionPlan | None = None
) -> tuple[Unit, ...]:
    """Those too that have no level but stock."""
    model = canonical.model.clone()
    prepare(model)
    sites = {s.node for s in canonical.sites}
    units = [found.unit for found in _matches(model, _Means(frozenset(kernels), int8_layers(plan)), None)]
    order = {str(node.name): number for number, node in enumerate(canonical.model.graph)}
    units = [
        replace(u, nodes=tuple(n for n in u.nodes if n in order), site=u.site if u.site in sites else None)
        for u in units
    ]
    return tuple(sorted(units, key=lambda unit: min(order[name] for name in unit.nodes)))


def int8_layers(plan: PrecisionPlan | None) -> frozenset[str]:
    """The layers that run in 8 bits per token, if they are linear: a plan for TensorRT has other words for it."""
    return frozenset() if plan is None else frozenset(plan.of(Scheme.PER_TOKEN, Scheme.STATIC, Scheme.FP8))


def fuse_units(
    model: ir.Model, kernels: Collection[str], levels: Mapping[str, str] | None, plan: PrecisionPlan | None = None
) -> frozenset[str]:
    """Brings every unit to its level, in place, and puts in the bodies of what has none of `kernels`. `levels` None:
    the coarsest of each; a unit that it leaves out is at its plainest. Returns the layers of `plan` that are in 8 bits
    now.

    Raises UsageError for a unit that the model does not have, or a level that the unit does not have. With `plan`,
    which may have changed since `levels` were chosen, those are taken as the nearest that there is.
    """
    forms = frozenset(kernels)
    means = _Means(forms, int8_layers(plan))
    prepare(model)
    found = _matches(model, means, levels)
    chosen = _chosen([f.unit for f in found], levels, strict=plan is None)
    fuser = Fuser(model)
    for match in found:
        match.lower(fuser, chosen[match.unit.name], forms)
    RemoveUnusedNodesPass()(model)
    attach_functions(model)
    stock = {f.unit.site for f in found if f.unit.site and chosen[f.unit.name] == STOCK}
    inline_functions(model, keep=forms, apart_from=frozenset(stock))
    return means.int8 & {name for match in found for name in match.unit.nodes}


def prepare(model: ir.Model) -> None:
    """Takes out, in place, what every lowering for the CPU is better without. Safe to call again."""
    drop_idle_movement(model)
    keep_tokens_flat(model)
    select_rows_early(model)


def _chosen(units: Sequence[Unit], levels: Mapping[str, str] | None, *, strict: bool) -> dict[str, str]:
    if levels is None:
        return {unit.name: unit.levels[-1] for unit in units}
    if not strict:
        return {unit.name: plainer(levels.get(unit.name, STOCK), unit.levels) for unit in units}
    by_name = {unit.name: unit for unit in units}
    for name, level in levels.items():
        if name not in by_name:
            raise UsageError("the model has no such unit", got=name, expected=nearest(name, by_name))
        if level not in by_name[name].levels:
            raise UsageError(
                "the unit has no such level", where=name, got=level, expected=", ".join(by_name[name].levels)
            )
    return {unit.name: levels.get(unit.name, STOCK) for unit in units}


def plainer(level: str, offered: Sequence[str]) -> str:
    """The level, or the next plainer one of those `offered`; where there is none, the plainest."""
    allowed = LEVELS[: LEVELS.index(level) + 1]
    return next((found for found in reversed(offered) if found in allowed), offered[0])


# -- what is in a model -----------------------------------------------------------------------------------------------


class _Means(NamedTuple):
    """`kernels`: the forms of the library; `int8`: names of products that are to be in 8 bits."""

    kernels: frozenset[str]
    int8: frozenset[str]


@dataclass(frozen=True)
class _Match:
    """A unit and what it is made of. `layers` are those that can run on their own."""

    unit: Unit
    layers: tuple[LinearLayer, ...] = ()
    block: AttentionBlock | FeedForward | None = None

    def lower(self, fuser: Fuser, level: str, kernels: frozenset[str]) -> None:
        if level == BLOCK and isinstance(self.block, FeedForward):
            fuse_feed_forward(fuser, self.block)
        elif level == BLOCK and isinstance(self.block, AttentionBlock):
            fuse_attention_block(fuser, self.block)
        elif level == LINEAR:
            for layer in self.layers:
                narrow = narrowed(layer, kernels)
                if narrow is None and layer.quantized:
                    narrow = bare(layer)
                if narrow is not None:
                    fuser.linear(narrow)


@dataclass
class _Found:
    """The linear layers of a model by what they read and make; `taken` are products that a unit has."""

    layers: list[LinearLayer]
    by_operand: dict[ir.Value, LinearLayer] = field(default_factory=dict)
    by_result: dict[ir.Value, LinearLayer] = field(default_factory=dict)
    taken: set[ir.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.by_operand = {layer.x: layer for layer in self.layers}
        self.by_result = {layer.result: layer for layer in self.layers}

    def take(self, layers: Sequence[LinearLayer]) -> None:
        self.taken.update(layer.product for layer in layers)


def _matches(model: ir.Model, means: _Means, levels: Mapping[str, str] | None) -> list[_Match]:
    """Query, key and value are packed first, where the unit's level asks for it."""
    kernels = means.kernels
    forms = {str(node.name): node.op_type for node in model.graph if node.domain == DOMAIN}
    packed, int8 = _pack(model, means, levels)
    found = _Found([replace(a, quantized=str(a.product.name) in int8) for a in linear_layers(model)])
    own = [node for node in model.graph if node.domain == DOMAIN and node.op_type not in BLOCK_FORMS]
    matches = [_site(n, forms[str(n.name)], packed.get(str(n.name), ()), found, kernels) for n in own]
    names: Counter[str] = Counter()
    for block in feed_forwards([layer for layer in found.layers if layer.product not in found.taken]):
        found.take((block.first, block.second))
        matches.append(_feed_forward(block, names, kernels))
    return matches + [_lone(layer, kernels) for layer in found.layers if layer.product not in found.taken]


def _pack(
    model: ir.Model, means: _Means, levels: Mapping[str, str] | None
) -> tuple[dict[str, tuple[LinearLayer, ...]], frozenset[str]]:
    """The layers that were packed, by the site's name; and the products that are to be in 8 bits from there on. Layers
    are packed where all or none of them are."""
    packed: dict[str, tuple[LinearLayer, ...]] = {}
    int8 = set(means.int8)
    by_result = {layer.result: layer for layer in linear_layers(model)}
    for node in [n for n in model.graph if n.domain == DOMAIN]:
        asked = levels is None or levels.get(str(node.name)) in (LINEAR, BLOCK)
        found = packable(node, by_result) if asked else None
        if found is None or found.form not in means.kernels or not means.kernels & {"Linear", "NormLinear"}:
            continue
        in_int8 = {str(layer.product.name) in means.int8 for layer in found.layers}
        if len(in_int8) == 1:
            product = pack(model, found)
            packed[str(node.name)] = found.layers
            int8 |= {str(product.name)} if True in in_int8 else set()
    RemoveUnusedNodesPass()(model)
    return packed, frozenset(int8)


def _site(node: ir.Node, form: str, packed: Sequence[LinearLayer], found: _Found, kernels: frozenset[str]) -> _Match:
    """`form` is the operator in the canonical model, `packed` the layers there that are one here."""
    own = FORMS[node.op_type].operator == "PackedAttention"
    block = attention_block(node, found.by_operand, found.by_result) if own else AttentionBlock(node, None, None)
    layers = block.layers
    found.take(layers)
    levels = _levels(kernels, form, layers, block.form)
    work = _site_multiply_adds(node) + sum(map(_multiply_adds, layers))
    nodes = (str(node.name), *(name for layer in (*packed, *layers) for name in _names(layer)))
    return _Match(Unit(str(node.name), levels, work, nodes, str(node.name)), layers, block)


def _feed_forward(block: FeedForward, names: Counter[str], kernels: frozenset[str]) -> _Match:
    """`names` counts those of before: a module that is called twice has two blocks, numbered as its nodes are."""
    layers = (block.first, block.second)
    modules = [str(layer.product.name).rpartition("/")[0].split(".") for layer in layers]
    shared = [a for a, b in zip(*modules, strict=False) if a == b]
    name = f"{'.'.join(shared)}/FeedForward".lstrip("/")
    names[name] += 1
    name = name if names[name] == 1 else f"{name}_{names[name]}"
    nodes = tuple(n for layer in layers for n in _names(layer))
    unit = Unit(name, _levels(kernels, "", layers, block.form), sum(map(_multiply_adds, layers)), nodes)
    return _Match(unit, layers, block)


def _lone(layer: LinearLayer, kernels: frozenset[str]) -> _Match:
    levels = _levels(kernels, "", (layer,), "")
    return _Match(Unit(str(layer.product.name), levels, _multiply_adds(layer), _names(layer)), (layer,))


def _levels(kernels: frozenset[str], site: str, layers: Sequence[LinearLayer], block: str) -> tuple[str, ...]:
    int8 = any(layer.quantized for layer in layers)
    there = {
        STOCK: not int8,
        SITE: site in kernels and not int8,
        LINEAR: int8 or any(narrowed(layer, kernels) is not None for layer in layers),
        BLOCK: block in kernels,
    }
    return tuple(level for level in LEVELS if there[level])


def _names(layer: LinearLayer) -> tuple[str, ...]:
    norm = () if layer.norm is None else (str(layer.norm.node.name),)
    return (*norm, *(str(node.name) for node in layer.nodes))


def _multiply_adds(layer: LinearLayer) -> int:
    return math.prod(_sizes(layer.result)) * layer.shape[0]


def _site_multiply_adds(node: ir.Node) -> int:
    shapes = [_sizes(i) for i in node.inputs if i is not None]
    return FORMS[node.op_type].multiply_adds(*shapes, **{name: a.value for name, a in node.attributes.items()})


def _sizes(value: ir.Value) -> tuple[int, ...]:
    return tuple(d if isinstance(d, int) else 1 for d in dims(value))
