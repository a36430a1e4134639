"""Editing a torch.export graph: a copy that leaves the original as it was, new nodes with their meta, new constants."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from attn_deploy.export.graph import aten, user_inputs

Size: TypeAlias = Any
"""A number, or a torch.SymInt where it is dynamic."""


class FixedSize(Exception):
    """Raised where a new node would hold for one size of a dynamic dimension only."""


class Editor:
    """A copy of a program under rewriting. Nodes are named by the original; `at` gives their place in the copy.

    `batch` is the batch size of the graph's example. With `keep_sizes` a new node that would fix a dynamic dimension
    raises FixedSize.
    """

    def __init__(self, program: ExportedProgram, batch: int, *, keep_sizes: bool = False) -> None:
        copied: dict[Node, Node] = {}
        graph = Graph()
        result = graph.graph_copy(program.graph, copied)
        original_output = next(n for n in program.graph.nodes if n.op == "output")
        graph.output(result).meta.update(original_output.meta)
        self.original = program
        self.batch = batch
        self.natural: dict[Node, Node] = {}
        """Original node -> its value in the natural order of tokens (see natural.py)."""
        self.left: set[Node] = set()
        """Movements behind which the natural order goes on."""
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
        self._keep_sizes = keep_sizes
        self._sizes: dict[str, Node] = {}
        self.site: object = None
        """What new nodes are made for: kept in their meta as `site`."""
        self._inputs = [copied[n] for n in user_inputs(program)]
        first = self._inputs[0].meta["val"].shape
        self.batch_size: Size = first[0] if len(first) else batch
        """The batch as it stands in shapes: a symbol where it is dynamic."""

    def at(self, original: Node) -> Node:
        """The node that now stands for a node of the original program."""
        node = self._copied[original]
        while node in self._moved:
            node = self._moved[node]
        return node

    @contextmanager
    def at_site(self, original: Node, origin: Node | None = None) -> Iterator[None]:
        """New nodes go before `original` and take over the module path and source line of `origin` (itself if None)."""
        outer, self._anchor = self._anchor, origin or original
        with self.graph.inserting_before(self.at(original)):
            yield
        self._anchor = outer

    @contextmanager
    def behind(self, original: Node) -> Iterator[None]:
        """New nodes go right behind `original`, or behind all inputs where it is one."""
        outer, self._anchor = self._anchor, original
        place = self.at(original)
        while place.op == "placeholder" and place.next.op == "placeholder":
            place = place.next
        with self.graph.inserting_before(place.next):  # inserting_after would turn the order of several nodes round
            yield
        self._anchor = outer

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A new node; its meta is computed by running `target` on fake tensors."""
        assert self._anchor is not None
        node = self.graph.call_function(target, args, kwargs)
        node.meta["site"] = self.site
        with self._fake_mode, self._sizes_kept():
            values, named = (torch.fx.map_arg(a, lambda n: n.meta["val"]) for a in (args, kwargs))
            node.meta["val"] = target(*values, **named)
        for key in ("nn_module_stack", "stack_trace", "torch_fn"):
            if key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        return node

    def reshape_like(self, value: Node, original: Node) -> Node:
        """`value` in the shape of a node of the original program."""
        return self.reshape(value, original.meta["val"].shape)

    @contextmanager
    def _sizes_kept(self) -> Iterator[None]:
        """torch would note a condition on the size, such as that it is the example's, and go on."""
        if not self._keep_sizes:
            yield
            return
        logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            with self._fake_mode.shape_env.error_on_new_guards():
                yield
        except RuntimeError as error:  # what torch raises has no public name, or is a shape that does not fit
            raise FixedSize(str(error)) from error
        finally:
            logger.setLevel(level)

    def reshape(self, node: Node, shape: Sequence[Size | None]) -> Node:
        """`node` in another shape; sizes may be symbolic, and None is what the others leave. No new node where that is
        its shape already."""
        before = node.meta["val"].shape
        if len(before) == len(shape) and all(s is None or str(s) == str(b) for s, b in zip(shape, before, strict=True)):
            return node
        left = [axis for axis, size in enumerate(shape) if size is None]
        sizes: dict[int, Size | Node] = {axis: size for axis, size in enumerate(shape) if size is not None}
        symbolic = [axis for axis, size in sizes.items() if isinstance(size, torch.SymInt)]
        if not left and symbolic:  # one size follows from the others
            left = [next((axis for axis in symbolic if self._input_axis(sizes[axis]) is None), symbolic[0])]
        for axis in symbolic:
            if axis not in left:
                sizes[axis] = self._size(sizes[axis])
        arguments = [-1 if axis in left else sizes[axis] for axis in range(len(shape))]
        return self.call(aten.reshape.default, node, arguments)

    def _size(self, size: Any) -> Node:
        """A dynamic size as a node behind the inputs."""
        found = self._sizes.get(str(size))
        if found is None:
            place = self._input_axis(size)
            if place is None:
                raise FixedSize(f"no input has a dimension of size {size}")
            with self.graph.inserting_after(self._inputs[-1]):
                found = self.graph.call_function(aten.sym_size.int, place)
            found.meta["val"] = size
            self._sizes[str(size)] = found
        return found

    def _input_axis(self, size: Any) -> tuple[Node, int] | None:
        """The input, and the axis of it, that is as long."""
        for node in self._inputs:
            for axis, other in enumerate(node.meta["val"].shape):
                if str(other) == str(size):
                    return node, axis
        return None

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
        self._name_outputs()
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

    def _name_outputs(self) -> None:
        """An output that was a cancelled permutation or reshape is now the node behind it."""
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        for spec, node in zip(self._signature.output_specs, output.args[0], strict=True):
            if isinstance(spec.arg, TensorArgument) and isinstance(node, Node):
                spec.arg = TensorArgument(node.name)


_WITHOUT_EFFECT = frozenset({aten.scaled_dot_product_attention.default, aten._assert_tensor_metadata.default})
"""torch.fx keeps an attention for the random numbers that its dropout might draw, and what was asserted of a tensor
when it was traced: both go with what they stand for."""


def _must_stay(node: Node) -> bool:
    return node.is_impure() and node.target not in _WITHOUT_EFFECT


def _is_output(node: Node) -> bool:
    """The program's signature names its outputs: such a node must stay."""
    return any(user.op == "output" for user in node.users)


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
        if outer is None or _is_output(node):
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
        if node.target is not aten.reshape.default or _is_output(node):
            continue
        source = node.args[0]
        if source.target is aten.reshape.default:
            source = source.args[0]
            node.args = (source, node.args[1])
        before, after = source.meta["val"].shape, node.meta["val"].shape
        if len(before) == len(after) and all(str(b) == str(a) for b, a in zip(before, after, strict=True)):
            node.replace_all_uses_with(source)
