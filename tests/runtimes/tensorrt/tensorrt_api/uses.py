"""What is done with an object of TensorRT's, held against the bindings."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass

from tensorrt_api.arguments import Arguments
from tensorrt_api.index import File, Index, OurClass
from tensorrt_api.results import is_value, shown
from tensorrt_api.surface import Member, Signature, Surface
from tensorrt_api.types import BoundMethod, Many, Other, Trt, TrtType, Type, Unknown, substituted


@dataclass(frozen=True)
class Problem:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Uses:
    """Counts uses by kind and keeps the problems; what a use gives is its result's type."""

    def __init__(self, index: Index, surface: Surface) -> None:
        self.index = index
        self.surface = surface
        self._arguments = Arguments(index, surface)
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self.optional: dict[str, bool] = {}
        self._file: File
        self._owner: OurClass | None = None
        self._learning = False

    def _problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(Problem(self._file.path.name, getattr(node, "lineno", 0), text))

    def _named(self, node: ast.AST, name: str) -> None:
        self.counts["class"] += 1
        if name not in self.surface.classes:
            self._problem(node, f"TensorRT has no class {name}")

    def _interface(self, node: ast.ClassDef, base: str) -> None:
        """A callback that is misspelt is never called: each of an interface's methods is there, with its arguments."""
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        known = self.surface.classes.get(base)
        for name, member in known.members.items() if known is not None else ():
            if member.kind != "method" or not member.own or name.startswith("_"):
                continue
            self.counts["callback"] += 1
            wanted = {len(s.parameters) for s in member.signatures}
            got = len(methods[name].args.args) - 1 if name in methods else None
            if got is None:
                self._problem(node, f"{node.name} does not implement {base}.{name}")
            elif got not in wanted:
                self._problem(methods[name], f"{base}.{name} has {sorted(wanted)} arguments, not {got}")

    def _agree(self, node: ast.AST, declared: Type, found: Type) -> None:
        """What an annotation says of a value that TensorRT gives is what the bindings say of it."""
        if isinstance(declared, Trt) and isinstance(found, Trt):
            related = self.surface.is_a(declared.name, found.name) or self.surface.is_a(found.name, declared.name)
            if not related:
                self._problem(node, f"declared as {declared.name}, and TensorRT gives {found.name}")

    def _member(self, owner: str, name: str) -> Member | None:
        known = self.surface.classes.get(owner)
        return known.members.get(name) if known is not None else None

    def _class_member(self, node: ast.AST, owner: str, name: str) -> Type:
        known = self.surface.classes.get(owner)
        if known is not None and name in known.enumerators:
            self.counts["enumerator"] += 1
            return Trt(owner)
        member = self._member(owner, name)
        if member is None:
            self._problem(node, f"TensorRT's {owner} has no {name}")
            return Unknown()
        self.counts["name"] += 1
        if member.kind == "class":
            return TrtType(member.type)
        if member.kind == "method":
            return BoundMethod(owner, name, unbound=True)
        return Trt(member.type) if member.type in self.surface.classes else Other()

    def _instance_member(self, node: ast.AST, owner: str, name: str) -> Type:
        member = self._member(owner, name)
        if member is None:
            self._problem(node, f"TensorRT's {owner} has no {name}")
            return Unknown()
        if member.kind == "method":
            return BoundMethod(owner, name)
        self.counts["property"] += 1
        return self._of(member.type) if member.kind == "property" else Other()

    def _our_member(self, owner: str, arguments: tuple[Type, ...], name: str) -> Type:
        known = self.index.classes.get(owner)
        if known is None:
            return Other()
        values = dict(zip(known.variables, arguments, strict=False))
        for table in (known.properties, known.methods, known.fields):
            if name in table:
                return substituted(table[name], values)
        for base in known.own_bases:
            found = self._our_member(base, (), name)
            if not isinstance(found, Unknown):
                return found
        for base in known.trt_bases:
            if self._member(base, name) is not None:
                return self._instance_member(ast.Pass(), base, name)
        return Unknown() if known.node is not None and not is_value(known) else Other()

    def _of(self, text: str) -> Type:
        """A type as the bindings' docstrings write it."""
        if text == "plain":
            return Other()
        if text in self.surface.classes:
            return Trt(text)
        if text.lower().startswith("list[") and text.endswith("]"):
            return Many(self._of(text[text.index("[") + 1 : -1]))
        if text == "list":
            return Many(Other())
        return Other() if text in ("int", "str", "List[int]", "List[str]") else Unknown()

    def _check_call(
        self, node: ast.Call, name: str, member: Member | None, given: list[Type], named: dict[str | None, Type]
    ) -> Signature | None:
        """The overload that takes these arguments."""
        self.counts["method"] += 1
        self.counts["keyword"] += len(named)
        if member is None or not member.signatures:
            self._problem(node, f"{name} cannot be called: the bindings declare no signature")
            return None
        faults = []
        for signature in member.signatures:
            fault = self._arguments.fault(signature, given, named)
            if fault is None:
                return signature
            faults.append(fault)
        self._problem(node, f"{name}: {faults[0]}" + (f" (and {len(faults) - 1} overloads)" if faults[1:] else ""))
        return member.signatures[0]

    def _fits(self, node: ast.AST, name: str, wanted: str, found: Type) -> None:
        if not self._arguments.compatible(wanted, found):
            self._problem(node, f"{name} is a {wanted}, got {shown(found)}")
