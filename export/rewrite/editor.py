"""Editing a torch.export graph: a copy that leaves the original as it was, new nodes with their meta, new constants."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from attn_deploy.export.graph import aten


class Editor:
    """A copy of a program under rewriting. Nodes are named by the original; `at` gives their place in the copy."""

    def __init__(self, program: ExportedProgram) -> None:
        copied: dict[Node, Node] = {}
        graph = Graph()
        result = graph.graph_copy(program.graph, copied)
        original_output = next(n for n in program.graph.nodes if n.op == "output")
        graph.output(result).meta.update(original_output.meta)
        self._copied = copied
        self._moved: dict[Node, Node] = {}
        self._counter = itertools.count()
        self.graph = graph
        self._program = program
        self._signature = copy.deepcopy(program.graph_signature)
        self._constants = dict(program.constants)
        self._fake_mode = next(
            n.meta["val"].fake_mode for n in program.graph.nodes if isinstance(n.meta.get("val"), Tensor)
        )
        self._anchor: Node | None = None

    def at(self, original: Node) -> Node:
        """The node that now stands for a node of the original program."""
        node = self._copied[original]
        while node in self._moved:
            node = self._moved[node]
        return node

    @contextmanager
    def at_site(self, original: Node, origin: Node | None = None) -> Iterator[None]:
        """New nodes go before `original` and take over the module path and source line of `origin` (itself if None)."""
        self._anchor = origin or original
        with self.graph.inserting_before(self.at(original)):
            yield
        self._anchor = None

    def call(self, target: Callable[..., Any], *args: Any) -> Node:
        """A new node; its meta is computed by running `target` on fake tensors."""
        assert self._anchor is not None
        node = self.graph.call_function(target, args)
        with self._fake_mode:
            values = torch.fx.map_arg(args, lambda n: n.meta["val"])
            node.meta["val"] = target(*values)
        for key in ("nn_module_stack", "stack_trace", "torch_fn"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        return node

    def constant(self, value: Tensor) -> Node:
        """A new constant as a graph input, placed before the user's."""
        name = f"attn_deploy_constant_{next(self._counter)}"
        users = set(self._signature.user_inputs)
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        position = next(i for i, n in enumerate(placeholders) if n.name in users)
        with self.graph.inserting_before(placeholders[position]):
            node = self.graph.placeholder(name)
        node.meta["val"] = self._fake_mode.from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(node.name), target=name)
        self._signature.input_specs.insert(position, spec)
        self._constants[name] = value
        return node

    def replace(self, original: Node, new: Node) -> None:
        """`new` takes over every use of the node that stands for `original`."""
        old = self.at(original)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        for spec in self._signature.output_specs:
            if getattr(spec.arg, "name", None) == old.name:
                spec.arg = TensorArgument(new.name)
        self._moved[old] = new

    def finish(self) -> ExportedProgram:
        """The rewritten program: permutations composed, dead code gone, checked by torch.export's verifier."""
        _compose_permutations(self.graph)
        _compose_reshapes(self.graph)
        self.graph.eliminate_dead_code(_must_stay)
        self.graph.lint()
        module = GraphModule(self._program.graph_module, self.graph)
        module.meta.update(self._program.graph_module.meta)
        return ExportedProgram(
            root=module,
            graph=self.graph,
            graph_signature=self._signature,
            state_dict=self._program.state_dict,
            range_constraints=self._program.range_constraints,
            module_call_graph=copy.deepcopy(self._program.module_call_graph),
            example_inputs=self._program.example_inputs,
            constants=self._constants,
            verifiers=self._program.verifiers,
        )


def _must_stay(node: Node) -> bool:
    """torch.fx keeps every scaled_dot_product_attention for the random numbers that its dropout might draw."""
    return node.is_impure() and node.target is not aten.scaled_dot_product_attention.default


def _permutation(node: Node) -> list[int] | None:
    """The dims of a permute or transpose node; None for anything else."""
    rank = len(node.meta["val"].shape) if isinstance(node.meta.get("val"), Tensor) else 0
    if node.target is aten.permute.default:
        return [d % rank for d in node.args[1]]
    if node.target is aten.transpose.int:
        dims = list(range(rank))
        first, second = node.args[1] % rank, node.args[2] % rank
        dims[first], dims[second] = dims[second], dims[first]
        return dims
    return None


def _compose_permutations(graph: Graph) -> None:
    """A permutation of a permutation becomes one, or none when they cancel."""
    for node in list(graph.nodes):
        outer = _permutation(node)
        if outer is None:
            continue
        source = node.args[0]
        inner = _permutation(source)
        dims = outer if inner is None else [inner[d] for d in outer]
        if dims == list(range(len(dims))):
            node.replace_all_uses_with(source if inner is None else source.args[0])
        elif inner is not None:
            node.target = aten.permute.default
            node.args = (source.args[0], dims)


def _compose_reshapes(graph: Graph) -> None:
    """A reshape of a reshape becomes one, or none when it restores the shape."""
    for node in list(graph.nodes):
        if node.target is not aten.reshape.default:
            continue
        source = node.args[0]
        if source.target is aten.reshape.default:
            source = source.args[0]
            node.args = (source, node.args[1])
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(before) == len(after) and all(str(b) == str(a) for b, a in zip(before, after, strict=True)):
            node.replace_all_uses_with(source)
