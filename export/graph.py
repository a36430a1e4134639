"""Small views on a torch.export graph: where a node comes from, what it depends on, what it evaluates to."""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

EXAMPLE_BATCH = 2
"""torch.export specializes on 0 and 1; the whole export works on examples of this batch size."""

aten = torch.ops.aten

_LEAF_TYPES = ("Softmax", "Dropout", "Identity", "Sigmoid", "Hardsigmoid", "ReLU", "SiLU")
"""Modules that hold one step of an attention, not the attention: their path is stripped to the parent's."""


def module_path(node: Node) -> str:
    """The path of the module that computes `node`, as in named_modules()."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        if not isinstance(entry, tuple):
            continue
        name, kind = entry
        short = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__
        if short not in _LEAF_TYPES:
            path = name
    return path


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def source_line(node: Node) -> str:
    """`file.py:line` of the innermost frame outside torch; empty when the graph does not know."""
    frames = [m for m in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    own = [m for m in frames if "/torch/" not in m["file"]] or frames
    if not own:
        return ""
    file = own[-1]["file"]
    for marker in ("site-packages/", "dist-packages/"):
        file = file.split(marker)[-1]
    return f"{file}:{own[-1]['line']}"


Sizes = Mapping[Any, int]
"""Symbol of a dynamic dimension -> a size to work with in place of the example's."""


def shape_of(node: Node) -> tuple[int, ...]:
    """The node's shape at the example's sizes."""
    return tuple(concrete(d) for d in node.meta["val"].shape)


def concrete(value: Any, sizes: Sizes | None = None) -> Any:
    """A symbolic size as the number it is at the example's sizes, or at those in `sizes`; anything else as it is."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr.subs(sizes or {})
        return int(value.node.shape_env.guarding_hint_or_throw(expression))
    return value


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def constants(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Parameters, buffers and lifted constants by the name of their graph input."""
    signature = program.graph_signature
    found: dict[str, torch.Tensor] = {}
    named = (signature.inputs_to_parameters, signature.inputs_to_buffers, signature.inputs_to_lifted_tensor_constants)
    for table in named:
        for name, target in table.items():
            value = program.state_dict.get(target)
            found[name] = (program.constants[target] if value is None else value).detach()
    return found


def user_inputs(program: ExportedProgram) -> list[Node]:
    """The graph's inputs that the user feeds, in order: no parameters, buffers or constants."""
    names = set(program.graph_signature.user_inputs)
    return [n for n in program.graph.find_nodes(op="placeholder") if n.name in names]


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def ancestors(node: Node, stop: Callable[[Node], bool] = lambda n: False) -> Iterator[Node]:
    """`node` and all it depends on, each once; the search does not pass a node for which `stop` holds."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            pending.extend(current.all_input_nodes)


def is_size(node: Node) -> bool:
    """True for a number such as the batch size: it depends on a tensor's shape, not on its data."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt))


LIKE = frozenset(
    {
        aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.zeros_like.default,
        aten.ones_like.default, aten.full_like.default,
    }
)  # fmt: skip
"""Operations that take a tensor's shape and type, and not its data."""


def varies(node: Node) -> bool:
    """True for a number, or a tensor made to a shape, that depends on another dynamic size than the batch, such as the
    sequence length."""
    value = node.meta.get("val")
    if node.target in LIKE:
        assert isinstance(value, torch.Tensor)
        return any(_varies(d, node.graph) for d in value.shape)
    return _varies(value, node.graph)


def _varies(value: Any, graph: Graph) -> bool:
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return False
    return not value.node.expr.free_symbols <= _batch_symbols(graph)


_BATCH_SYMBOLS: weakref.WeakKeyDictionary[Graph, frozenset[Any]] = weakref.WeakKeyDictionary()


def _batch_symbols(graph: Graph) -> frozenset[Any]:
    """The symbols in the first dimension of the graph's inputs."""
    found = _BATCH_SYMBOLS.get(graph)
    if found is None:
        inputs = [n for n in graph.find_nodes(op="placeholder") if is_tensor(n) and n.meta["val"].dim()]
        first = [n.meta["val"].shape[0] for n in inputs]
        found = frozenset(s for d in first if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols)
        _BATCH_SYMBOLS[graph] = found
    return found


def depends_on_data(node: Node, known: Mapping[str, torch.Tensor]) -> bool:
    """True when the values of the model's inputs enter into the node, and not only their shapes."""
    return any(_is_data(current, known) for current in ancestors(node, stop=is_size))


def _is_data(node: Node, known: Mapping[str, torch.Tensor]) -> bool:
    return node.op == "placeholder" and node.name not in known and not is_size(node)


def is_constant(node: Node, known: Mapping[str, torch.Tensor]) -> bool:
    """True when the node depends on parameters, buffers, constants and the batch size alone.

    What is made for a sequence length (a mask, a table of positions) is a run-time value where that is dynamic.
    """
    inner = ancestors(node, stop=lambda n: is_size(n) or n.target in LIKE)
    return not any(_is_data(current, known) or varies(current) for current in inner)


def evaluate(node: Node, known: Mapping[str, Any], sizes: Sizes | None = None) -> Any:
    """The node's value at the example's sizes, or at those in `sizes`, from values by node name.

    Raises KeyError with the name of a graph input that is not in `known`.
    """
    cache: dict[Node, Any] = {}
    pending = [node]
    while pending:
        current = pending[-1]
        if current in cache:
            pending.pop()
            continue
        if current.name in known:
            cache[current] = known[current.name]
        elif is_size(current):
            cache[current] = concrete(current.meta["val"], sizes)
        elif current.op == "placeholder":
            raise KeyError(current.name)
        else:
            if current.target in LIKE and current.args[0] not in cache:
                shaped = current.args[0]
                assert isinstance(shaped, Node)
                cache[shaped] = torch.empty(shape_of(shaped), dtype=shaped.meta["val"].dtype)
            missing = [n for n in current.all_input_nodes if n not in cache]
            if missing:
                pending.extend(missing)
                continue
            args = torch.fx.map_arg(current.args, lambda n: cache[n])
            kwargs = torch.fx.map_arg(current.kwargs, lambda n: cache[n])
            assert callable(current.target)
            cache[current] = current.target(*args, **kwargs)
        pending.pop()
    return cache[node]


MOVEMENT = frozenset(
    {
        aten.reshape.default, aten.permute.default, aten.transpose.int, aten.select.int, aten.slice.Tensor,
        aten.unbind.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.roll.default, aten.t.default, operator.getitem,
    }
)  # fmt: skip
"""Operations that move elements and change none."""


def movement_source(node: Node) -> Node:
    """The first node behind a chain of movements."""
    while node.target in MOVEMENT and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
