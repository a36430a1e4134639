"""A precision plan as a file: read and checked for `--plan`, written beside the model it was lowered with.

    {"version": 1, "layers": [{"layer": "blocks.0", "scheme": "float"}, {"layer": "", "scheme": "int8-per-token"}]}

A plan that somebody wrote names nodes or module paths, the empty one for the whole model; of several that hold for a
layer the most specific wins. `resolved` makes of it a plan of nodes, as lowering takes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from attn_deploy.errors import UsageError
from attn_deploy.precision_plan import PLAN_VERSION, LayerPlan, PrecisionPlan, Scheme
from attn_deploy.target import nearest

UNNAMED = "the plan names it nowhere"
FORMLESS = "it has no form in the scheme of {entry!r}"

_NEXT = "attn-deploy export writes the plan of each INT8 variant beside it: take one as a pattern"


class _Layer(msgspec.Struct, forbid_unknown_fields=True):
    """As LayerPlan, before the scheme is known to be one."""

    layer: str
    scheme: str
    reason: str = ""


class _Plan(msgspec.Struct, forbid_unknown_fields=True):
    """As PrecisionPlan. A newer version may have other fields: it is read first, and alone."""

    layers: list[_Layer]
    smoothing: dict[str, float] = {}
    equalized: bool = False
    corrected: bool = False
    version: int = PLAN_VERSION


class _Version(msgspec.Struct):
    version: int = PLAN_VERSION


def read_plan(path: str | Path) -> PrecisionPlan:
    """The plan as it is written. Raises UsageError: no such file, unreadable, damaged, of a newer version; an unknown
    field or scheme; a layer named twice; a strength that is not between 0 and 1."""
    where = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(
            "the plan cannot be read", where=where, got=error.strerror or str(error), expected="a JSON file",
            next_step=_NEXT,
        ) from error  # fmt: skip
    try:
        version = msgspec.json.decode(content, type=_Version).version
        if not 1 <= version <= PLAN_VERSION:
            raise UsageError(
                "the plan is of another version", where=where, got=version, expected=f"1 to {PLAN_VERSION}",
                next_step="install a newer attn-deploy",
            )  # fmt: skip
        raw = msgspec.json.decode(content, type=_Plan)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(
            "the plan is not understood", where=where, got=str(error),
            expected='{"layers": [{"layer": NAME, "scheme": SCHEME, "reason": TEXT}, ...]} and perhaps '
            + ", ".join(name for name in _Plan.__struct_fields__ if name != "layers"),
            next_step=_NEXT,
        ) from error  # fmt: skip
    return _checked(raw, where)


def _checked(raw: _Plan, where: str) -> PrecisionPlan:
    for entry in raw.layers:
        if entry.scheme not in set(Scheme):
            raise UsageError(
                "the plan has an unknown scheme", where=f"{where}, layer {entry.layer}", got=entry.scheme,
                expected=nearest(entry.scheme, [str(s) for s in Scheme]),
            )  # fmt: skip
    twice = [name for name, count in Counter(entry.layer for entry in raw.layers).items() if count > 1]
    if twice:
        raise UsageError("the plan names a layer twice", where=where, got=twice[0], expected="one scheme for each")
    for norm, strength in raw.smoothing.items():
        if not 0.0 <= strength <= 1.0:
            raise UsageError(
                "a strength of SmoothQuant is out of range", where=f"{where}, {norm}", got=strength, expected="0 to 1"
            )
    layers = tuple(LayerPlan(entry.layer, Scheme(entry.scheme), entry.reason) for entry in raw.layers)
    return PrecisionPlan(layers, dict(raw.smoothing), raw.equalized, raw.corrected, raw.version)


def encode_plan(plan: PrecisionPlan) -> bytes:
    """As it stands in a bundle, and as `read_plan` takes it."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2) + b"\n"


@dataclass(frozen=True)
class Layer:
    """A weighted layer of a model: its node, and the schemes that it has forms in besides FLOAT."""

    name: str
    schemes: tuple[Scheme, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition("/")[0]


def resolved(plan: PrecisionPlan, layers: Sequence[Layer], norms: Collection[str]) -> PrecisionPlan:
    """`plan` for a model of these layers, node by node in their order; `norms` are its LayerNorm nodes.

    A layer of which nothing is said stays FLOAT. INT8 said of a module comes to a layer in the form that it has:
    activations per token or static. Raises UsageError for what names nothing of the model, and for a node that has no
    form in the scheme that is said of it by name.
    """
    nodes = {layer.name for layer in layers}
    for entry in plan.layers:
        if entry.layer not in nodes and not any(is_below(layer.module, entry.layer) for layer in layers):
            known = nodes if "/" in entry.layer else {path for layer in layers for path in _modules_around(layer)}
            raise UsageError(
                "the plan names no layer of the model", got=entry.layer, expected=nearest(entry.layer, known),
                next_step="attn-deploy inspect BUNDLE lists the layers of a plan",
            )  # fmt: skip
    by_name = {entry.layer: entry for entry in plan.layers}
    smoothing = {_norm(name, norms): strength for name, strength in plan.smoothing.items()}
    return msgspec.structs.replace(
        plan, layers=tuple(_resolved(layer, by_name) for layer in layers), smoothing=smoothing
    )


def _modules_around(layer: Layer) -> list[str]:
    parts = layer.module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _resolved(layer: Layer, by_name: Mapping[str, LayerPlan]) -> LayerPlan:
    own = by_name.get(layer.name)
    if own is not None:
        if own.scheme is not Scheme.FLOAT and own.scheme not in layer.schemes:
            raise UsageError(
                "a layer of the plan has no form in its scheme", where=layer.name, got=str(own.scheme),
                expected=", ".join(map(str, (Scheme.FLOAT, *layer.schemes))),
            )  # fmt: skip
        return own
    around = [name for name in by_name if is_below(layer.module, name)]
    if not around:
        return LayerPlan(layer.name, Scheme.FLOAT, UNNAMED)
    entry = by_name[max(around, key=len)]
    scheme = _form(entry.scheme, layer.schemes)
    if scheme is None:
        return LayerPlan(layer.name, Scheme.FLOAT, FORMLESS.format(entry=entry.layer or "(the whole model)"))
    return LayerPlan(layer.name, scheme, entry.reason)


_ACTIVATIONS = (Scheme.PER_TOKEN, Scheme.STATIC)


def _form(wanted: Scheme, offered: Sequence[Scheme]) -> Scheme | None:
    """The scheme itself, or the other way to quantize activations: convolutions have no tokens."""
    if wanted is Scheme.FLOAT or wanted in offered:
        return wanted
    return next((s for s in _ACTIVATIONS if s in offered), None) if wanted in _ACTIVATIONS else None


def _norm(name: str, norms: Collection[str]) -> str:
    """The norm's node: `name` itself, or the only one of the module `name`."""
    if name in norms:
        return name
    inside = [norm for norm in norms if norm.rpartition("/")[0] == name]
    if len(inside) == 1:
        return inside[0]
    raise UsageError(
        "the plan smooths behind what is no LayerNorm of the model", got=name,
        expected=nearest(name, norms) if norms else "no entry: the model has no LayerNorm",
    )  # fmt: skip


def is_below(module: str, path: str) -> bool:
    """Whether the module is `path` or inside it; the empty path holds all."""
    return not path or module == path or module.startswith(path + ".")
