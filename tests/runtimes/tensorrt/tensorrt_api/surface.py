"""The bindings' classes as Python values: signatures and types are read from pybind11's docstrings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> ([^\n]+)$", re.MULTILINE)
_CPP = re.compile(r"\b(?:nvinfer1|nvonnxparser)::(?:v_\d+_\d+::)?(?:I(ParserError)|I(Builder)\b|I(Runtime)\b|(\w+))")
_PLAIN = {
    "int", "str", "bool", "float", "bytes", "None", "object", "tuple", "dict", "typing.SupportsInt", "capsule",
    "buffer", "typing.SupportsFloat", "typing_extensions.Buffer", "typing_extensions.CapsuleType", "numpy.ndarray",
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    required: bool


@dataclass(frozen=True)
class Signature:
    """One overload, without `self`."""

    parameters: tuple[Parameter, ...]
    returns: str


@dataclass(frozen=True)
class Member:
    kind: str  # method, property, value, class
    type: str = ""
    writable: bool = False
    signatures: tuple[Signature, ...] = ()
    own: bool = False


@dataclass(frozen=True)
class TrtClass:
    name: str
    bases: tuple[str, ...]
    enumerators: frozenset[str]
    members: Mapping[str, Member]


@dataclass(frozen=True)
class Surface:
    version: str
    classes: Mapping[str, TrtClass]
    others: frozenset[str]

    def is_a(self, name: str, base: str) -> bool:
        return name == base or (name in self.classes and base in self.classes[name].bases)


def read(described: Mapping[str, Any]) -> Surface:
    classes = {
        name: TrtClass(
            name,
            tuple(entry["bases"]),
            frozenset(entry["enum"]),
            {key: _member(key, name, *value) for key, value in entry["members"].items()},
        )
        for name, entry in described["classes"].items()
    }
    return Surface(described["version"], classes, frozenset(described["others"]))


def _member(name: str, owner: str, kind: str, text: str, flag: bool) -> Member:
    if kind == "property":
        found = re.search(r"-> ([^\n]+)", text)
        return Member("property", _type(found.group(1)) if found else "object", writable=flag)
    if kind == "method":
        return Member("method", signatures=_signatures(name, text), own=flag)
    return Member(kind, text)


def _signatures(name: str, text: str) -> tuple[Signature, ...]:
    found = [
        Signature(_parameters(inside), _type(returns))
        for called, inside, returns in _SIGNATURE.findall(text)
        if called == name and not inside.startswith("*args")
    ]
    return tuple(found)


def _parameters(text: str) -> tuple[Parameter, ...]:
    """`self: X, name: str, shape: tuple = <...>` -> all but self. Commas within brackets separate nothing."""
    parts: list[str] = []
    depth = 0
    for piece in re.split(r"([\[\](){}<>,])", text):
        if piece == "," and depth == 0:
            parts.append("")
            continue
        depth += {"[": 1, "(": 1, "{": 1, "<": 1}.get(piece, 0) - {"]": 1, ")": 1, "}": 1, ">": 1}.get(piece, 0)
        if not parts:
            parts.append("")
        parts[-1] += piece
    parameters = []
    for part in parts:
        name, _, rest = part.strip().partition(":")
        kind, equals, _ = rest.partition("=")
        if name and name != "self":
            parameters.append(Parameter(name, _type(kind), not equals))
    return tuple(parameters)


def _type(text: str) -> str:
    """A class of TensorRT by its Python name, `list[X]` of one, or a plain Python type."""
    text = text.strip()
    text = _CPP.sub(lambda m: next(g for g in m.groups() if g), text)
    if text in _PLAIN or text.startswith(("collections.abc.", "Callable", "typing.")):
        return "plain"
    return text
