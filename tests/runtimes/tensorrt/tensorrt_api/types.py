"""What the checker knows of an expression's type."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trt:
    """An instance of a class of TensorRT."""

    name: str


@dataclass(frozen=True)
class TrtType:
    """The class itself: what `trt.Builder` stands for."""

    name: str


@dataclass(frozen=True)
class Module:
    """TensorRT's module."""


@dataclass(frozen=True)
class Ours:
    """An instance of a class of our source, with the arguments of a generic one."""

    name: str
    arguments: tuple[Type, ...] = ()


@dataclass(frozen=True)
class OursType:
    """A class of our source."""

    name: str


@dataclass(frozen=True)
class Function:
    """A function or method of our source: what a call of it gives."""

    returns: Type


@dataclass(frozen=True)
class BoundMethod:
    """A method of an instance of TensorRT's, or of its class (`unbound`), before it is called."""

    owner: str
    method: str
    unbound: bool = False


@dataclass(frozen=True)
class Variable:
    """A type variable, before it is known what it stands for."""

    name: str


@dataclass(frozen=True)
class Table:
    """A mapping."""

    key: Type
    value: Type


@dataclass(frozen=True)
class Many:
    """A sequence, a set or an iterator."""

    item: Type


@dataclass(frozen=True)
class Row:
    """A tuple of known types."""

    items: tuple[Type, ...]


@dataclass(frozen=True)
class Other:
    """Known to be nothing of TensorRT's."""


@dataclass(frozen=True)
class Unknown:
    """May be anything: a use of it fails the check."""


Type = (
    Trt | TrtType | Module | Ours | OursType | Function | BoundMethod | Variable | Table | Many | Row | Other | Unknown
)


def substituted(found: Type, values: dict[str, Type]) -> Type:
    """The type with its variables replaced."""
    match found:
        case Variable(name):
            return values.get(name, Unknown())
        case Function(returns):
            return Function(substituted(returns, values))
        case Many(item):
            return Many(substituted(item, values))
        case Table(key, value):
            return Table(substituted(key, values), substituted(value, values))
        case Row(items):
            return Row(tuple(substituted(i, values) for i in items))
    return found


def item_of(found: Type) -> Type:
    """What iteration gives."""
    match found:
        case Many(item):
            return item
        case Table(key, _):
            return key
        case Row(items):
            return items[0] if len(set(items)) == 1 else Unknown()
        case Unknown() | Variable():
            return Unknown()
    return Other()
