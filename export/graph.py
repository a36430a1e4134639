"""Small views on a torch.export graph: where a node comes from, what it depends on, what it evaluates to."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

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


def shape_of(node: Node) -> tuple[int, ...]:
    """The node's shape at the example batch."""
    return tuple(concrete(d) for d in node.meta["val"].shape)


def concrete(value: Any) -> Any:
    """A symbolic size as the number it is at the example batch; anything else as it is."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.subs({s: EXAMPLE_BATCH for s in expression.free_symbols}))
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


def users(node: Node) -> list[Node]:
    return list(node.users)


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


def is_constant(node: Node, known: Mapping[str, torch.Tensor]) -> bool:
    """True when the node depends on parameters, buffers and constants alone (sizes are not data)."""
    return all(
        current.op != "placeholder" or current.name in known or is_size(current)
        for current in ancestors(node, stop=is_size)
    )


def evaluate(node: Node, known: Mapping[str, Any]) -> Any:
    """The node's value at the example batch, from values by node name; sizes are put in from the graph's meta.

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
            cache[current] = concrete(current.meta["val"])
        elif current.op == "placeholder":
            raise KeyError(current.name)
        else:
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
