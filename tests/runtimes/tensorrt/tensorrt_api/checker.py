"""Infers the type of every expression in a file; checks against the bindings what is done with TensorRT's objects."""

from __future__ import annotations

import ast
import builtins
from collections import Counter
from dataclasses import dataclass

from tensorrt_api.index import File, Index, OurClass
from tensorrt_api.surface import Member, Signature, Surface
from tensorrt_api.types import (
    BoundMethod,
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
    item_of,
    substituted,
)

_SAME_ITEMS = {"tuple", "list", "sorted", "reversed", "iter", "set", "frozenset"}
_ITEM = {"next", "min", "max"}
_OF_MANY = {"pop", "popleft", "index"}
_CONVERTED = {"Dims", "Weights"}
"""Classes that pybind11 makes of a plain Python value by itself."""


@dataclass(frozen=True)
class Problem:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


class Checker:
    """Checks files one after the other; `problems` and `counts` (by kind of use) are of all of them.

    `optional` are names that the source asks for with getattr and a default: not every version has them.
    """

    def __init__(self, index: Index, surface: Surface) -> None:
        self.index = index
        self.surface = surface
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()
        self.optional: dict[str, bool] = {}
        self._file: File
        self._owner: OurClass | None = None
        self._learning = False

    def check(self, files: list[File]) -> None:
        self._learning = True
        for _ in range(3):  # what a field is given may depend on another field
            for file in files:
                self._check_file(file)
        self._learning = False
        self.problems.clear()
        self.counts.clear()
        for file in files:
            self._check_file(file)
        self.problems = sorted(set(self.problems), key=lambda p: (p.path, p.line, p.text))

    def _check_file(self, file: File) -> None:
        self._file = file
        self._body(file.tree.body, dict(file.names))

    def _problem(self, node: ast.AST, text: str) -> None:
        self.problems.append(Problem(self._file.path.name, getattr(node, "lineno", 0), text))

    # -- statements ----------------------------------------------------------------------------------------------------

    def _body(self, body: list[ast.stmt], env: dict[str, Type]) -> None:
        for statement in body:
            self._statement(statement, env)

    def _statement(self, node: ast.stmt, env: dict[str, Type]) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self._function(node, env)
            case ast.ClassDef():
                self._class(node, env)
            case ast.Import() | ast.ImportFrom():
                env.update(self.index.imported(node))
            case ast.Assign(targets=targets, value=value):
                found = self._infer(value, env)
                for target in targets:
                    self._assign(target, found, env)
            case ast.AnnAssign(target=target, annotation=annotation, value=value):
                declared = self.index.annotation(annotation, self._file)
                if isinstance(declared, Trt):
                    self._named(annotation, declared.name)
                if value is not None:
                    self._agree(node, declared, self._infer(value, env))
                self._assign(target, declared, env)
            case ast.AugAssign(target=target, value=value):
                self._infer(value, env)
                self._infer(target, env)
            case ast.For(target=target, iter=iterated, body=body, orelse=orelse):
                self._assign(target, item_of(self._infer(iterated, env)), env)
                self._body([*body, *orelse], env)
            case ast.With(items=items, body=body):
                for item in items:
                    found = self._infer(item.context_expr, env)
                    if item.optional_vars is not None:
                        self._assign(item.optional_vars, item_of(found) if isinstance(found, Many) else found, env)
                self._body(body, env)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                self._body(body, env)
                for handler in handlers:
                    if handler.name:
                        env[handler.name] = Other()
                    self._body(handler.body, env)
                self._body([*orelse, *final], env)
            case _:
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.stmt):
                        self._statement(child, env)
                    elif isinstance(child, ast.expr):
                        self._infer(child, env)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, env: dict[str, Type]) -> None:
        inner = dict(env)
        static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for position, argument in enumerate(arguments):
            if position == 0 and self._owner is not None and argument.arg in ("self", "cls") and not static:
                own = Ours(self._owner.name, tuple(Variable(v) for v in self._owner.variables))
                inner[argument.arg] = own
                continue
            inner[argument.arg] = self.index.annotation(argument.annotation, self._file)
            self._annotated(argument.annotation)
        for extra in (node.args.vararg, node.args.kwarg):
            if extra is not None:
                inner[extra.arg] = Many(self.index.annotation(extra.annotation, self._file))
        self._annotated(node.returns)
        if self._owner is None or node.name not in self._owner.methods:
            env[node.name] = Function(self.index.annotation(node.returns, self._file))
        owner, self._owner = self._owner, self._owner
        for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
            self._infer(default, env)
        self._body(node.body, inner)
        self._owner = owner

    def _annotated(self, annotation: ast.expr | None) -> None:
        """Names of TensorRT in an annotation exist."""
        for part in ast.walk(annotation) if annotation is not None else ():
            if isinstance(part, ast.Attribute):
                found = self.index.annotation(part, self._file)
                if isinstance(found, Trt):
                    self._named(part, found.name)

    def _named(self, node: ast.AST, name: str) -> None:
        self.counts["class"] += 1
        if name not in self.surface.classes:
            self._problem(node, f"TensorRT has no class {name}")

    def _class(self, node: ast.ClassDef, env: dict[str, Type]) -> None:
        outer, self._owner = self._owner, self.index.classes.get(node.name)
        for base in node.bases:
            self._infer(base, env)
        if self._owner is not None:
            for base_name in self._owner.trt_bases:
                self._interface(node, base_name)
        self._body(node.body, dict(env))
        self._owner = outer

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

    def _assign(self, target: ast.expr, found: Type, env: dict[str, Type]) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = found
            case ast.Tuple(elts=elements) | ast.List(elts=elements):
                parts = found.items if isinstance(found, Row) and len(found.items) == len(elements) else None
                for position, element in enumerate(elements):
                    self._assign(element, parts[position] if parts else item_of(found), env)
            case ast.Starred(value=value):
                self._assign(value, Many(found), env)
            case ast.Attribute(value=value, attr=name):
                self._set(target, self._infer(value, env), name, found)
            case ast.Subscript(value=value, slice=inner):
                self._infer(value, env)
                self._infer(inner, env)

    def _set(self, node: ast.AST, owner: Type, name: str, found: Type) -> None:
        if isinstance(owner, Unknown):
            self._problem(node, f"the receiver of .{name} = ... is not resolved")
        if isinstance(owner, Ours) and self._learning and owner.name in self.index.classes:
            fields = self.index.classes[owner.name].fields
            if isinstance(fields.get(name, Unknown()), Unknown):
                fields[name] = found
        if isinstance(owner, Trt) and name != "__class__":
            self.counts["property"] += 1
            member = self._member(owner.name, name)
            if member is None or member.kind != "property":
                self._problem(node, f"TensorRT's {owner.name} has no property {name}")
            elif not member.writable:
                self._problem(node, f"{owner.name}.{name} cannot be set")
            else:
                self._fits(node, f"{owner.name}.{name}", member.type, found)

    def _agree(self, node: ast.AST, declared: Type, found: Type) -> None:
        """What an annotation says of a value that TensorRT gives is what the bindings say of it."""
        if isinstance(declared, Trt) and isinstance(found, Trt):
            related = self.surface.is_a(declared.name, found.name) or self.surface.is_a(found.name, declared.name)
            if not related:
                self._problem(node, f"declared as {declared.name}, and TensorRT gives {found.name}")

    # -- expressions ---------------------------------------------------------------------------------------------------

    def _infer(self, node: ast.expr, env: dict[str, Type]) -> Type:
        match node:
            case ast.Constant():
                return Other()
            case ast.Name(id=name):
                return env.get(name, Other() if hasattr(builtins, name) else Unknown())
            case ast.Attribute(value=value, attr=name):
                return self._attribute(node, value, name, env)
            case ast.Call():
                return self._call(node, env)
            case ast.Subscript(value=value, slice=inner):
                self._infer(inner, env)
                return self._item(self._infer(value, env), inner)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self._infer(test, env)
                return _either(self._infer(body, env), self._infer(orelse, env))
            case ast.BoolOp(values=values):
                found = [self._infer(v, env) for v in values]
                return _either(*found)
            case ast.NamedExpr(target=target, value=value):
                found_value = self._infer(value, env)
                self._assign(target, found_value, env)
                return found_value
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self._comprehension(node, env)
            case ast.Lambda(args=arguments, body=body):
                inner = env | {a.arg: Unknown() for a in arguments.args}
                return Function(self._infer(body, inner))
            case ast.Tuple(elts=[]) | ast.List(elts=[]) | ast.Dict(keys=[]):
                return Other()
            case ast.Tuple(elts=elements):
                return Row(tuple(self._infer(e, env) for e in elements))
            case ast.List(elts=elements) | ast.Set(elts=elements):
                return Many(_either(*(self._infer(e, env) for e in elements)))
            case ast.Starred(value=value):
                return item_of(self._infer(value, env))
            case ast.Dict(keys=keys, values=values):
                held = [self._infer(v, env) for v in values]
                for key in keys:
                    if key is not None:
                        self._infer(key, env)
                return Table(Other(), _either(*held))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._infer(child, env)
        return Other()

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, env: dict[str, Type]
    ) -> Type:
        inner = dict(env)
        for generator in node.generators:
            self._assign(generator.target, item_of(self._infer(generator.iter, inner)), inner)
            for condition in generator.ifs:
                self._infer(condition, inner)
        if isinstance(node, ast.DictComp):
            return Table(self._infer(node.key, inner), self._infer(node.value, inner))
        return Many(self._infer(node.elt, inner))

    def _item(self, found: Type, inner: ast.expr) -> Type:
        if isinstance(inner, ast.Slice):
            return found
        match found, inner:
            case Row(items), ast.Constant(value=int(position)) if -len(items) <= position < len(items):
                return items[position]
            case Table(_, value), _:
                return value
        return item_of(found)

    def _attribute(self, node: ast.Attribute, value: ast.expr, name: str, env: dict[str, Type]) -> Type:
        if isinstance(value, ast.Name) and f"{value.id}." in env:
            member = self.index.module_member(self._file, value.id, name)
            if member is not None:
                return member
        owner = self._infer(value, env)
        match owner:
            case Module():
                self.counts["name"] += 1
                if name in self.surface.classes:
                    return TrtType(name)
                if name not in self.surface.others:
                    self._problem(node, f"tensorrt has no {name}")
                return Other()
            case TrtType(held):
                return self._class_member(node, held, name)
            case Trt(held):
                return self._instance_member(node, held, name)
            case Ours(held, arguments):
                return self._our_member(held, arguments, name)
            case OursType(held):
                known = self.index.classes.get(held)
                return known.methods.get(name, Other()) if known is not None else Other()
            case Many() | Table() | Row():
                return Function(_container_result(owner, name))
            case Unknown() | Variable():
                self._problem(node, f"the receiver of .{name} is not resolved: {ast.unparse(value)}")
                return Unknown()
        return Other()

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
        return Unknown() if known.node is not None and not _is_value(known) else Other()

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

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, node: ast.Call, env: dict[str, Type]) -> Type:
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            return self._by_name(node, env)
        called = self._infer(node.func, env)
        given = [self._infer(a, env) for a in node.args]
        named = {k.arg: self._infer(k.value, env) for k in node.keywords}
        match called:
            case TrtType(name):
                self._check_call(node, f"{name}.__init__", self._member(name, "__init__"), given, named)
                return Trt(name)
            case BoundMethod(owner, method, unbound):
                arguments = given[1:] if unbound else given
                found = self._check_call(node, f"{owner}.{method}", self._member(owner, method), arguments, named)
                return self._of(found.returns) if found is not None else Unknown()
            case OursType(name):
                return Ours(name)
            case Function(returns):
                return returns
            case Unknown() | Variable():
                if isinstance(node.func, ast.Name):
                    self._problem(node, f"what is called is not resolved: {ast.unparse(node.func)}")
                return Unknown()
        if isinstance(node.func, ast.Name):
            return _builtin(node.func.id, given)
        return Other()

    def _by_name(self, node: ast.Call, env: dict[str, Type]) -> Type:
        """getattr and hasattr: a literal name of TensorRT's is to be in one of the versions; any other is refused."""
        owner = self._infer(node.args[0], env)
        for argument in node.args[1:]:
            self._infer(argument, env)
        if not isinstance(owner, (Module, TrtType, Trt)):
            return Unknown() if isinstance(owner, Unknown) else Other()
        name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
        if not isinstance(name, str):
            self._problem(node, "a name of TensorRT's that is known only at run time")
            return Unknown()
        held = "" if isinstance(owner, Module) else owner.name
        if not held:
            there = name in self.surface.classes or name in self.surface.others
        else:
            known = self.surface.classes.get(held)
            there = self._member(held, name) is not None or (known is not None and name in known.enumerators)
        self.optional[f"{held}.{name}".strip(".")] = there
        self.counts["optional"] += 1
        return Trt(held) if isinstance(owner, TrtType) and there else Other()

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
            fault = self._fault(signature, given, named)
            if fault is None:
                return signature
            faults.append(fault)
        self._problem(node, f"{name}: {faults[0]}" + (f" (and {len(faults) - 1} overloads)" if faults[1:] else ""))
        return member.signatures[0]

    def _fault(self, signature: Signature, given: list[Type], named: dict[str | None, Type]) -> str | None:
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
            if parameter.name in taken and not self._compatible(parameter.type, taken[parameter.name]):
                return f"{parameter.name} is a {parameter.type}, got {_shown(taken[parameter.name])}"
        return None

    def _fits(self, node: ast.AST, name: str, wanted: str, found: Type) -> None:
        if not self._compatible(wanted, found):
            self._problem(node, f"{name} is a {wanted}, got {_shown(found)}")

    def _compatible(self, wanted: str, found: Type) -> bool:
        if wanted not in self.surface.classes:
            return not isinstance(found, (TrtType, Module)) and (wanted != "plain" or not self._is_object(found))
        match found:
            case Trt(name):
                return self.surface.is_a(name, wanted)
            case Ours(name):
                known = self.index.classes.get(name)
                return known is not None and any(self.surface.is_a(b, wanted) for b in known.trt_bases)
            case Unknown():
                return False
        return wanted in _CONVERTED

    def _is_object(self, found: Type) -> bool:
        """An object of TensorRT's that is no number: enumerators and buffers pass as plain values."""
        return (
            isinstance(found, Trt)
            and found.name != "IHostMemory"
            and found.name in self.surface.classes
            and not self.surface.classes[found.name].enumerators
        )


def _is_value(known: OurClass) -> bool:
    """A class whose members come from elsewhere: an enumeration, a NamedTuple, a Struct, an error."""
    assert known.node is not None
    plain = ("Enum", "StrEnum", "NamedTuple", "Struct", "Protocol", "Exception")
    return any(ast.unparse(b).rpartition(".")[2].startswith(plain) for b in known.node.bases) or bool(known.own_bases)


def _either(*options: Type) -> Type:
    """The type of a value that is one of these; what is nothing of TensorRT's (None) beside it says nothing."""
    found = set(options) - {Other()}
    if not found:
        return Other()
    return found.pop() if len(found) == 1 else Unknown()


def _container_result(owner: Type, method: str) -> Type:
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


def _builtin(name: str, given: list[Type]) -> Type:
    if name in _SAME_ITEMS and given:
        return Many(item_of(given[0]))
    if name in _ITEM and given:
        return item_of(given[0]) if len(given) == 1 or name == "next" else _either(*given)
    if name == "enumerate":
        return Many(Row((Other(), item_of(given[0]))))
    if name == "zip":
        return Many(Row(tuple(item_of(g) for g in given)))
    if name == "dict" and given:
        return given[0]
    return Other()


def _shown(found: Type) -> str:
    match found:
        case Trt(name) | Ours(name) | TrtType(name) | OursType(name):
            return name
        case Unknown():
            return "something that is not resolved"
    return "a plain value"
