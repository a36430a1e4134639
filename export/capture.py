"""Module and example inputs -> CapturedModel: a functional ATen graph of torch.export with module paths."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from attn_deploy.errors import CaptureError, UsageError
from attn_deploy.export.dimensions import (
    bounds_of_the_model,
    dims_of_program,
    dynamic_shapes,
    longest_by_tables,
    require_asked_bounds,
    require_example_within,
    unmet_guards,
)
from attn_deploy.export.einsum import as_matrix_product, is_matrix_product
from attn_deploy.export.graph import EXAMPLE_BATCH, ancestors, aten, module_path, source_line, user_inputs
from attn_deploy.export.module_tracker import ModuleTracker, first_line
from attn_deploy.export.sources.base import LoadedSource
from attn_deploy.inputs import ExampleInput, make_feeds, sequence_length
from attn_deploy.session import BATCH, SEQUENCE, Array, DimBounds

Reference = Callable[[Mapping[str, Array]], dict[str, Array]]
"""The original model in eager PyTorch: feeds by input name -> outputs by output name."""


@dataclass(frozen=True)
class CapturedModel:
    """`program` is functional, its views are reshapes; `outputs` are named as the model names them.

    `dims` holds the dynamic dimensions, `batch` and `sequence`, with the bounds that the model itself has.
    """

    program: ExportedProgram
    inputs: tuple[ExampleInput, ...]
    outputs: tuple[str, ...]
    dims: dict[str, DimBounds]
    reference: Reference
    module: nn.Module
    example_batch: int = EXAMPLE_BATCH

    def compiled_reference(self) -> Reference:
        """The reference under torch.compile, as a peer to measure."""
        return _eager(torch.compile(self.module), self.outputs)  # type: ignore[arg-type]

    @property
    def batch(self) -> int | None:
        """The batch size of the graph's example: None (as the inputs say) when it is not dynamic."""
        return self.example_batch if BATCH in self.dims else None

    @property
    def sequence(self) -> int | None:
        """The sequence length of the graph's example: None (as the inputs say) when it is not dynamic."""
        return sequence_length(self.inputs) if SEQUENCE in self.dims else None


def capture(source: LoadedSource, dims: Mapping[str, DimBounds]) -> CapturedModel:
    """Traces the model with torch.export. Raises CaptureError with the module path and source line that stopped it.

    A sequence without an upper bound gets the model's own one, where there is one.
    """
    if isinstance(source.module, ExportedProgram):
        return _from_program(source, source.module)
    require_example_within(source.inputs, dims)
    batch = EXAMPLE_BATCH if BATCH in dims else None
    feeds = _tensors(make_feeds(source.inputs, batch=batch, seed=0))
    module = source.module
    tracker = ModuleTracker(module)
    with (
        torch.no_grad(),
        tracker.tracking(),
        _as_capture_error(tracker, "the model does not run on its example", INPUT),
    ):
        example = module(**feeds)
    outputs = _apart(output_names(example), source.inputs)
    with (
        torch.no_grad(),
        tracker.tracking(),
        _as_capture_error(tracker, "the model cannot be traced", TRACEABLE),
    ):
        program, found = _traced(module, feeds, source.inputs, dims)
    _require_dynamic(program, found)
    program = normalize(program)
    _require_sizes_from_shapes(program)
    _require_no_randomness(program)
    if SEQUENCE in found:
        found = _bounded_by_tables(program, found)
    return CapturedModel(program, source.inputs, outputs, found, _eager(module, outputs), module)


TRACES = 3
"""A first one, one with the bounds that it suggests, and one without the length at which a buffer is used whole."""


def _traced(
    module: nn.Module, feeds: Mapping[str, Tensor], inputs: Sequence[ExampleInput], dims: Mapping[str, DimBounds]
) -> tuple[ExportedProgram, dict[str, DimBounds]]:
    """The program, and the dynamic dimensions with the model's own bounds of the sequence."""

    def trace(bounds: Mapping[str, DimBounds]) -> ExportedProgram:
        shapes = dynamic_shapes(inputs, bounds) if bounds else None
        with redirect_stderr(io.StringIO()):  # torch prints the graph beside the error that it raises
            return torch.export.export(module, (), dict(feeds), dynamic_shapes=shapes, strict=False)

    found = dict(dims)
    for attempt in range(TRACES):
        try:
            program = trace(found)
            break
        except Exception as error:
            possible = bounds_of_the_model(found, str(error))
            if possible is None or attempt == TRACES - 1:
                raise
            found[SEQUENCE] = possible
    if found != dims:
        require_asked_bounds(dims, found[SEQUENCE])
    return program, found


def _bounded_by_tables(program: ExportedProgram, dims: Mapping[str, DimBounds]) -> dict[str, DimBounds]:
    bounds, longest = dims[SEQUENCE], longest_by_tables(program)
    if longest is None or (bounds.max is not None and bounds.max <= longest):
        return dict(dims)
    possible = DimBounds(bounds.min, longest)
    require_asked_bounds(dims, possible)
    return {**dims, SEQUENCE: possible}


def _from_program(source: LoadedSource, program: ExportedProgram) -> CapturedModel:
    """A saved program is taken as it was traced, with the dimensions that are dynamic in it."""
    dims = dims_of_program(program, source.inputs)
    batch = source.inputs[0].shape[0] if BATCH in dims else None
    module = program.module()
    args, kwargs = program.example_inputs or ((), {})
    names = [i.name for i in source.inputs]

    def call(feeds: Mapping[str, Tensor]) -> Any:
        return module(*(feeds[n] for n in names[: len(args)]), **{n: feeds[n] for n in names[len(args) :]})

    assert kwargs is not None
    with torch.no_grad():
        example = call(_tensors(make_feeds(source.inputs, batch=batch, seed=0)))
    outputs = _apart(output_names(example), source.inputs)

    def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            return _named_outputs(call(_tensors(feeds)), outputs)

    program = normalize(program)
    _require_sizes_from_shapes(program)
    _require_no_randomness(program)
    return CapturedModel(program, source.inputs, outputs, dims, reference, module, batch or EXAMPLE_BATCH)


def _symbols(node: torch.fx.Node) -> set[Any]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return set()
    return {s for d in value.shape if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols}


def normalize(program: ExportedProgram) -> ExportedProgram:
    """Functional, without clones and dead code, with every view as a reshape and every einsum as a matrix product.

    run_decompositions makes views that are legal for the original strides only; clones and detaches change no value.
    """
    table: dict[Any, Callable[..., Any]] = {aten.baddbmm.default: _product_and_sum}
    einsums = [n for n in program.graph.nodes if n.target is aten.einsum.default]
    if einsums and all(is_matrix_product(n.args[0], len(n.args[1])) for n in einsums):
        table[aten.einsum.default] = as_matrix_product
    program = program.run_decompositions(table)
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif node.target is aten._assert_tensor_metadata.default:  # held when it was traced; not a use of the tensor
            graph.erase_node(node)
        elif _is_identity(node) and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _product_and_sum(added: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """torch.baddbmm in steps, as an attention with a mask may be spelled; with `beta` 0 it does not read `added`."""
    product = torch.bmm(first, second)
    product = product if alpha == 1 else product * alpha
    if not beta:
        return product
    return (added if beta == 1 else added * beta) + product


_IDENTITIES = frozenset(
    {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default}
)


_CASTS = frozenset(
    {aten.type_as.default, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.other, aten.to.device}
)


def _is_identity(node: torch.fx.Node) -> bool:
    """True when the node changes no value: dropout too, outside training, and a cast to the type that is there."""
    if node.target in _CASTS:
        before, after = node.args[0].meta["val"], node.meta["val"]
        return before.dtype == after.dtype and before.device == after.device
    return node.target in _IDENTITIES or (node.target is aten.dropout.default and node.args[2] is False)


def output_names(example: Any) -> tuple[str, ...]:
    """Names of the tensors of a result: dict keys and dataclass fields keep theirs, a lone tensor is `output`."""
    if isinstance(example, Tensor):
        return ("output",)
    names = []
    for path, leaf in pytree.tree_flatten_with_path(example)[0]:
        if not isinstance(leaf, Tensor):
            if leaf is None:
                continue
            raise UsageError("the model returns something that is not a tensor", got=type(leaf).__name__)
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        name = ".".join(parts)
        names.append(f"output_{name}" if name[0].isdigit() else name)
    if not names:
        raise UsageError(
            "the model returns nothing that can be exported",
            got=type(example).__name__,
            expected="a tensor, or a tuple, dict or dataclass of tensors",
        )
    return tuple(names)


def _apart(outputs: tuple[str, ...], inputs: tuple[ExampleInput, ...]) -> tuple[str, ...]:
    """ONNX has one name space: an output that is called like an input becomes `NAME_output`."""
    taken = {i.name for i in inputs}
    return tuple(f"{name}_output" if name in taken else name for name in outputs)


def _eager(module: Callable[..., Any], outputs: tuple[str, ...]) -> Reference:
    def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            return _named_outputs(module(**_tensors(feeds)), outputs)

    return reference


def _named_outputs(result: Any, names: tuple[str, ...]) -> dict[str, Array]:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    return {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}


def _tensors(feeds: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


INPUT = "check --input against what the model takes"
TRACEABLE = "make that line traceable by torch.export (no NumPy, no .item() that steers a branch)"
_ADVICE = (
    ("data-dependent", "replace the branch on a tensor's value by torch.where or torch.cond"),
    ("Could not guard", "replace the branch on a tensor's value by torch.where or torch.cond"),
    ("specialized", "export with a fixed batch: --dynamic none"),
    ("mat1 and mat2", INPUT),
    ("expected input", INPUT),
    ("doesn't match model", INPUT),
    ("must match", INPUT),
    ("index out of range", "give integer inputs their range: --input NAME=SHAPE:int64:BELOW"),
)


@contextmanager
def _as_capture_error(tracker: ModuleTracker, what: str, default_advice: str) -> Iterator[None]:
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        text = str(error)
        advice = next((a for key, a in _ADVICE if key.lower() in text.lower()), None)
        fixed = re.search(r"Constraints violated \((?P<name>\w+)", text)
        specialized = re.search(r"your code specialized it to be a constant \(\d+\)", text)
        name = fixed["name"] if fixed else BATCH
        guards = "; ".join(unmet_guards(text)) or first_line(error)
        got = f"the {name} is dynamic, and {specialized[0] if specialized else f'the code holds for {guards} alone'}"
        raise CaptureError(
            what,
            where=tracker.where(error),
            got=got if fixed or specialized else first_line(error),
            next_step=_without_dynamic(name) if fixed or specialized else advice or default_advice,
        ) from error


def _without_dynamic(name: str) -> str:
    """What to do about a dimension that the model fixes."""
    if name == SEQUENCE:
        return "export with a fixed sequence length: --dynamic batch"
    return "export with a fixed batch: --dynamic none"


def _require_dynamic(program: ExportedProgram, dims: Mapping[str, DimBounds]) -> None:
    symbols = {s for n in user_inputs(program) for s in _symbols(n)}
    if len(symbols) < len(dims):
        raise CaptureError(
            f"the {' or the '.join(dims)} did not stay dynamic",
            got=f"{len(symbols)} dynamic dimensions",
            expected="a graph that works for every size",
            next_step=_without_dynamic(SEQUENCE if SEQUENCE in dims else BATCH),
        )


def _require_sizes_from_shapes(program: ExportedProgram) -> None:
    """Everything after capture works out sizes from the inputs' shapes; torch.export itself takes more than that."""
    for node in program.graph.nodes:
        if free_unbacked_symbols(node.meta.get("val")):
            raise CaptureError(
                "a size depends on the values of a tensor",
                where=f"module {module_path(node) or '(root)'}, {source_line(node)}",
                got=str(node.target),
                expected="sizes that follow from the shapes of the inputs",
                next_step="mask what is not wanted (torch.where) instead of selecting it",
            )


def _require_no_randomness(program: ExportedProgram) -> None:
    """A model that draws random numbers gives another output on every call: nothing could be compared with it."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    for node in sorted(ancestors(output)):
        if _is_random(node):
            raise CaptureError(
                "the model draws random numbers in evaluation mode",
                where=f"module {module_path(node) or '(root)'}, {source_line(node)}",
                got=str(node.target),
                expected="the same output for the same input",
                next_step="give dropout training=self.training, and leave train() out of forward",
            )


_DROPOUTS = frozenset({aten.dropout.default, aten.native_dropout.default, aten.alpha_dropout.default})


def _is_random(node: torch.fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is aten.scaled_dot_product_attention.default:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    if node.target in _DROPOUTS:
        return node.args[1] != 0 and node.args[2] is not False
    return torch.Tag.nondeterministic_seeded in node.target.tags
