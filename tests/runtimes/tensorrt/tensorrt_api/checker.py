"""Infers the type of every expression in a file; checks against the bindings what is done with TensorRT's objects."""

from __future__ import annotations

import ast
import builtins

from tensorrt_api.index import File
from tensorrt_api.results import builtin, container_result, either
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
)
from tensorrt_api.uses import Uses


class Checker(Uses):
    """Checks files one after the other; `problems` and `counts` (by kind of use) are of all of them.

    `optional` are names that the source asks for with getattr and a default: not every version has them.
    """

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

    def _class(self, node: ast.ClassDef, env: dict[str, Type]) -> None:
        outer, self._owner = self._owner, self.index.classes.get(node.name)
        for base in node.bases:
            self._infer(base, env)
        if self._owner is not None:
            for base_name in self._owner.trt_bases:
                self._interface(node, base_name)
        self._body(node.body, dict(env))
        self._owner = outer

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
                return either(self._infer(body, env), self._infer(orelse, env))
            case ast.BoolOp(values=values):
                found = [self._infer(v, env) for v in values]
                return either(*found)
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
                return Many(either(*(self._infer(e, env) for e in elements)))
            case ast.Starred(value=value):
                return item_of(self._infer(value, env))
            case ast.Dict(keys=keys, values=values):
                held = [self._infer(v, env) for v in values]
                for key in keys:
                    if key is not None:
                        self._infer(key, env)
                return Table(Other(), either(*held))
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
                return Function(container_result(owner, name))
            case Unknown() | Variable():
                self._problem(node, f"the receiver of .{name} is not resolved: {ast.unparse(value)}")
                return Unknown()
        return Other()

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
            return builtin(node.func.id, given)
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
