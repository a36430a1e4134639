"""What calls give that are not TensorRT's: of containers, of Python's own functions; and types as words."""

from __future__ import annotations

import ast

from tensorrt_api.index import OurClass
from tensorrt_api.types import Many, Other, Ours, OursType, Row, Table, Trt, TrtType, Type, Unknown, item_of

_SAME_ITEMS = {"tuple", "list", "sorted", "reversed", "iter", "set", "frozenset"}
_ITEM = {"next", "min", "max"}


def is_value(known: OurClass) -> bool:
    """A class whose members come from elsewhere: an enumeration, a NamedTuple, a Struct, an error."""
    assert known.node is not None
    plain = ("Enum", "StrEnum", "NamedTuple", "Struct", "Protocol", "Exception")
    return any(ast.unparse(b).rpartition(".")[2].startswith(plain) for b in known.node.bases) or bool(known.own_bases)


def either(*options: Type) -> Type:
    """The type of a value that is one of these; what is nothing of TensorRT's (None) beside it says nothing."""
    found = set(options) - {Other()}
    if not found:
        return Other()
    return found.pop() if len(found) == 1 else Unknown()


def container_result(owner: Type, method: str) -> Type:
    match owner, method:
        case Table(key, value), "items":
            return Many(Row((key, value)))
        case Table(_, value), "values":
            return Many(value)
        case Table(key, _), "keys":
            return Many(key)
        case Table(_, value), "get" | "setdefault" | "pop":
            return value
        case Table(key, value), "popitem":
            return Row((key, value))
        case ((Table() | Many()), "copy"):
            return owner
        case Many(item), "pop" | "popleft":
            return item
    return Other()


def builtin(name: str, given: list[Type]) -> Type:
    if name in _SAME_ITEMS and given:
        return Many(item_of(given[0]))
    if name in _ITEM and given:
        return item_of(given[0]) if len(given) == 1 or name == "next" else either(*given)
    if name == "enumerate":
        return Many(Row((Other(), item_of(given[0]))))
    if name == "zip":
        return Many(Row(tuple(item_of(g) for g in given)))
    if name == "dict" and given:
        return given[0]
    return Other()


def shown(found: Type) -> str:
    match found:
        case Trt(name) | Ours(name) | TrtType(name) | OursType(name):
            return name
        case Unknown():
            return "something that is not resolved"
    return "a plain value"
