"""Whether a signature of the bindings takes what a call gives it."""

from __future__ import annotations

from tensorrt_api.index import Index
from tensorrt_api.results import shown
from tensorrt_api.surface import Signature, Surface
from tensorrt_api.types import Module, Ours, Trt, TrtType, Type, Unknown

_CONVERTED = {"Dims", "Weights"}
"""Classes that pybind11 makes of a plain Python value by itself."""


class Arguments:
    def __init__(self, index: Index, surface: Surface) -> None:
        self._index = index
        self._surface = surface

    def fault(self, signature: Signature, given: list[Type], named: dict[str | None, Type]) -> str | None:
        if len(given) > len(signature.parameters):
            return f"takes {len(signature.parameters)} arguments, got {len(given)}"
        taken = {p.name: t for p, t in zip(signature.parameters, given, strict=False)}
        for name, found in named.items():
            if name is None or name not in {p.name for p in signature.parameters}:
                return f"has no keyword {name}"
            if name in taken:
                return f"{name} is given twice"
            taken[name] = found
        for parameter in signature.parameters:
            if parameter.required and parameter.name not in taken:
                return f"{parameter.name} is missing"
            if parameter.name in taken and not self.compatible(parameter.type, taken[parameter.name]):
                return f"{parameter.name} is a {parameter.type}, got {shown(taken[parameter.name])}"
        return None

    def compatible(self, wanted: str, found: Type) -> bool:
        if wanted not in self._surface.classes:
            return not isinstance(found, (TrtType, Module)) and (wanted != "plain" or not self._is_object(found))
        match found:
            case Trt(name):
                return self._surface.is_a(name, wanted)
            case Ours(name):
                known = self._index.classes.get(name)
                return known is not None and any(self._surface.is_a(b, wanted) for b in known.trt_bases)
            case Unknown():
                return False
        return wanted in _CONVERTED

    def _is_object(self, found: Type) -> bool:
        """An object of TensorRT's that is no number: enumerators and buffers pass as plain values."""
        return (
            isinstance(found, Trt)
            and found.name != "IHostMemory"
            and found.name in self._surface.classes
            and not self._surface.classes[found.name].enumerators
        )
