"""Classes, functions and imports of our source, with the types that its annotations say."""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

from tensorrt_api.types import (
    Function,
    Many,
    Module,
    Other,
    Ours,
    OursType,
    Row,
    Table,
    Trt,
    TrtType,
    Type,
    Unknown,
    Variable,
)

SEQUENCES = {
    "list", "Sequence", "Iterator", "Iterable", "tuple", "set", "frozenset", "deque", "Collection", "Generator",
    "AbstractSet",
}  # fmt: skip
TABLES = {"dict", "Mapping", "OrderedDict", "defaultdict", "MutableMapping"}


@dataclass
class OurClass:
    name: str
    fields: dict[str, Type] = field(default_factory=dict)
    methods: dict[str, Type] = field(default_factory=dict)
    properties: dict[str, Type] = field(default_factory=dict)
    trt_bases: list[str] = field(default_factory=list)
    own_bases: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    node: ast.ClassDef | None = None


@dataclass
class File:
    path: Path
    tree: ast.Module
    imports: tuple[ast.Import | ast.ImportFrom, ...]
    names: dict[str, Type] = field(default_factory=dict)


class Index:
    """The files of the package, read when they are needed; names are resolved from their imports."""

    def __init__(self, root: Path, folders: dict[str, str]) -> None:
        """`folders`: package -> its folder below the root."""
        self._paths: dict[str, Path] = {}
        for package, folder in folders.items():
            for path in sorted((root / folder).rglob("*.py")):
                parts = path.relative_to(root / folder).with_suffix("").parts
                self._paths[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
        self._files: dict[str, File] = {}
        self.classes: dict[str, OurClass] = {}

    def file(self, module: str) -> File:
        known = self._files.get(module)
        if known is None:
            path = self._paths[module]
            known = self._files[module] = File(path, *parsed(path.read_text()))
            for node in known.tree.body:
                if isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, OurClass(node.name, node=node))
            self._names(known)
            for node in known.tree.body:
                if isinstance(node, ast.ClassDef) and self.classes[node.name].node is node:
                    self._read_class(self.classes[node.name], node, known)
        return known

    def users(self) -> list[File]:
        """Files that import TensorRT, and those that import one of them: they may hold its objects."""
        texts = {module: path.read_text() for module, path in self._paths.items()}
        users = {
            module for module, text in texts.items() if re.search(r"^\s*(import|from)\s+tensorrt\w*\b", text, re.M)
        }
        fresh = set(users)
        while fresh:
            names = {user.rpartition(".")[2] for user in fresh}
            near = {m for m in texts.keys() - users if any(name in texts[m] for name in names)}
            fresh = {m for m in near if not fresh.isdisjoint(self._imported_modules(m))}
            users |= fresh
        return [self.file(m) for m in sorted(users)]

    def _imported_modules(self, module: str) -> set[str]:
        _, imports = parsed(self._paths[module].read_text())
        found = {n.module or "" for n in imports if isinstance(n, ast.ImportFrom)}
        return found | {f"{n.module}.{a.name}" for n in imports if isinstance(n, ast.ImportFrom) for a in n.names}

    def _names(self, file: File) -> None:
        """The module's own names and those it imports."""
        names = file.names
        names["__name__"] = Other()
        for node in file.tree.body:
            if isinstance(node, ast.ClassDef):
                names[node.name] = OursType(node.name)
        for node in file.imports:
            names.update({k: v for k, v in self.imported(node).items() if k not in names})
        for node in file.tree.body:
            if isinstance(node, ast.Assign) and _is_type_variable(node.value):
                names[node.targets[0].id] = Variable(node.targets[0].id)  # type: ignore[attr-defined]
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        names[target.id] = self._alias(node.value, file)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names[node.target.id] = self.annotation(node.annotation, file)
        for node in file.tree.body:
            if isinstance(node, ast.FunctionDef):
                names[node.name] = Function(self.annotation(node.returns, file))

    def _alias(self, value: ast.expr, file: File) -> Type:
        """`Profile = Mapping[str, Range]` stands for a type; another constant of a module is nothing of TensorRT's."""
        if isinstance(value, (ast.Subscript, ast.BinOp)):
            found = self.annotation(value, file)
            return found if isinstance(found, (Table, Many, Row)) else Other()
        return Other()

    def imported(self, node: ast.Import | ast.ImportFrom) -> dict[str, Type]:
        found: dict[str, Type] = {}
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            if isinstance(node, ast.Import):
                found[name] = Module() if alias.name in ("tensorrt", "tensorrt_bindings") else Other()
            elif node.module in ("tensorrt", "tensorrt_bindings"):
                found[name] = TrtType(alias.name)
            elif f"{node.module}.{alias.name}" in self._paths:
                found[name] = Other()  # a module of ours: its members are looked up by name
                found[f"{name}."] = Other()
            elif node.module in self._paths:
                found[name] = self.file(node.module).names.get(alias.name, Other())
            else:
                found[name] = Unknown() if alias.name == "Any" else Other()
        return found

    def module_member(self, file: File, module: str, name: str) -> Type | None:
        """`device_cache.DeviceCache`, where `device_cache` was imported as a module of ours."""
        for node in file.imports:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if (alias.asname or alias.name) == module and full in self._paths:
                        return self.file(full).names.get(name, Other())
        return None

    def annotation(self, node: ast.expr | None, file: File) -> Type:
        match node:
            case None:
                return Unknown()
            case ast.Constant(value=str(text)):
                return self.annotation(ast.parse(text, mode="eval").body, file)
            case ast.Constant():
                return Other()
            case ast.Name(id=name):
                found = file.names.get(name, Other())
                return Ours(found.name) if isinstance(found, OursType) else _instance(found)
            case ast.Attribute():
                return self._dotted(node, file)
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                options = {self.annotation(side, file) for side in (left, right)} - {Other()}
                return options.pop() if len(options) == 1 else Unknown() if options else Other()
            case ast.Subscript(value=value, slice=inner):
                return self._generic(value, inner, file)
        return Unknown()

    def _dotted(self, node: ast.Attribute, file: File) -> Type:
        parts = ast.unparse(node).split(".")
        if parts[-1] == "Any":
            return Unknown()
        if isinstance(file.names.get(parts[0]), Module):
            return Trt(".".join(parts[1:]))
        member = self.module_member(file, parts[0], parts[1]) if len(parts) == 2 else None
        return Ours(member.name) if isinstance(member, OursType) else member or Other()

    def _generic(self, value: ast.expr, inner: ast.expr, file: File) -> Type:
        name = ast.unparse(value).rpartition(".")[2]
        arguments = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if name == "tuple" and not (len(arguments) == 2 and ast.unparse(arguments[1]) == "..."):
            return Row(tuple(self.annotation(a, file) for a in arguments))
        if name in SEQUENCES:
            return Many(self.annotation(arguments[0], file))
        if name in TABLES:
            return Table(self.annotation(arguments[0], file), self.annotation(arguments[1], file))
        if name == "Callable":
            return Function(self.annotation(arguments[-1], file))
        if name in ("ClassVar", "Final", "Optional"):
            return self.annotation(arguments[0], file)
        if name in self.classes:
            return Ours(name, tuple(self.annotation(a, file) for a in arguments))
        return Other()

    def _read_class(self, found: OurClass, node: ast.ClassDef, file: File) -> None:
        for base in node.bases:
            kind = self.annotation(base, file)
            if isinstance(kind, Trt):
                found.trt_bases.append(kind.name)
            elif isinstance(kind, Ours):
                found.own_bases.append(kind.name)
            if isinstance(base, ast.Subscript) and ast.unparse(base.value) == "Generic":
                found.variables = ast.unparse(base.slice).strip("()").split(", ")
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                found.fields[statement.target.id] = self.annotation(statement.annotation, file)
            elif isinstance(statement, ast.Assign):
                found.fields.update({t.id: Other() for t in statement.targets if isinstance(t, ast.Name)})
            elif isinstance(statement, ast.FunctionDef):
                self._read_method(found, statement, file)

    def _read_method(self, found: OurClass, node: ast.FunctionDef, file: File) -> None:
        decorators = {ast.unparse(d) for d in node.decorator_list}
        returns = self.annotation(node.returns, file)
        if decorators & {"property", "functools.cached_property"}:
            found.properties[node.name] = returns
        else:
            found.methods[node.name] = Function(returns)
        for statement in ast.walk(node):
            match statement:
                case ast.AnnAssign(target=ast.Attribute(value=ast.Name(id="self"), attr=name), annotation=kind):
                    found.fields[name] = self.annotation(kind, file)


def _instance(found: Type) -> Type:
    return Trt(found.name) if isinstance(found, TrtType) else found


def _is_type_variable(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "TypeVar"


@functools.lru_cache(maxsize=512)
def parsed(text: str) -> tuple[ast.Module, tuple[ast.Import | ast.ImportFrom, ...]]:
    """A file's tree and all its imports; copies of a file share them."""
    tree = ast.parse(text)
    return tree, tuple(node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))
