"""Module and example inputs -> CapturedModel: a functional ATen graph of torch.export with module paths."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from attn_deploy.errors import CaptureError, UsageError
from attn_deploy.export.graph import EXAMPLE_BATCH, aten
from attn_deploy.export.sources.base import LoadedSource
from attn_deploy.inputs import ExampleInput, make_feeds
from attn_deploy.session import Array, DimBounds

Reference = Callable[[Mapping[str, Array]], dict[str, Array]]
"""The original model in eager PyTorch: feeds by input name -> outputs by output name."""


@dataclass(frozen=True)
class CapturedModel:
    """`program` is functional, its views are reshapes; `outputs` are named as the model names them.

    `dims` holds the dynamic dimensions: `batch`, or nothing.
    """

    program: ExportedProgram
    inputs: tuple[ExampleInput, ...]
    outputs: tuple[str, ...]
    dims: dict[str, DimBounds]
    reference: Reference
    module: nn.Module

    def compiled_reference(self) -> Reference:
        """The reference under torch.compile, as a peer to measure."""
        return _eager(torch.compile(self.module), self.outputs)  # type: ignore[arg-type]

    @property
    def batch(self) -> int | None:
        """The batch size for examples: EXAMPLE_BATCH when it is dynamic, None (as the inputs say) when it is not."""
        return EXAMPLE_BATCH if self.dims else None


def capture(source: LoadedSource, dims: Mapping[str, DimBounds]) -> CapturedModel:
    """Traces the model with torch.export. Raises CaptureError with the module path and source line that stopped it."""
    if isinstance(source.module, ExportedProgram):
        return _from_program(source, source.module)
    batch = EXAMPLE_BATCH if dims else None
    feeds = _tensors(make_feeds(source.inputs, batch=batch, seed=0))
    module = source.module
    path = _PathTracker(module)
    with torch.no_grad(), path.tracking(), _as_capture_error(path):
        example = module(**feeds)
    outputs = _apart(output_names(example), source.inputs)
    shapes = None
    if dims:
        dim = batch_dim(dims["batch"])
        shapes = {item.name: {0: dim} for item in source.inputs}
    with torch.no_grad(), path.tracking(), _as_capture_error(path):
        program = torch.export.export(module, (), feeds, dynamic_shapes=shapes, strict=False)
    _require_dynamic_batch(program, dims)
    return CapturedModel(normalize(program), source.inputs, outputs, dict(dims), _eager(module, outputs), module)


def batch_dim(bounds: DimBounds) -> Any:
    """The batch as torch.export's dynamic dimension."""
    return Dim("batch", min=bounds.min) if bounds.max is None else Dim("batch", min=bounds.min, max=bounds.max)


def _from_program(source: LoadedSource, program: ExportedProgram) -> CapturedModel:
    """A saved program is taken as it was traced; its batch is dynamic when its first dimension is."""
    symbols = {s for item in program.graph.nodes if item.op == "placeholder" for s in _symbols(item)}
    if len(symbols) > 1:
        raise CaptureError(
            "the saved program has several dynamic dimensions",
            got=", ".join(str(s) for s in symbols),
            expected="the batch alone, as the first dimension of every input",
            next_step='export it with dynamic_shapes={name: {0: Dim("batch")}}',
        )
    dims = {"batch": DimBounds()} if symbols else {}
    module = program.module()
    args, kwargs = program.example_inputs or ((), {})
    names = [i.name for i in source.inputs]

    def call(feeds: Mapping[str, Tensor]) -> Any:
        return module(*(feeds[n] for n in names[: len(args)]), **{n: feeds[n] for n in names[len(args) :]})

    assert kwargs is not None
    with torch.no_grad():
        example = call(_tensors(make_feeds(source.inputs, batch=EXAMPLE_BATCH if dims else None, seed=0)))
    outputs = _apart(output_names(example), source.inputs)

    def reference(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            return _named_outputs(call(_tensors(feeds)), outputs)

    return CapturedModel(normalize(program), source.inputs, outputs, dims, reference, module)


def _symbols(node: torch.fx.Node) -> set[Any]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return set()
    return {s for d in value.shape if isinstance(d, torch.SymInt) for s in d.node.expr.free_symbols}


def normalize(program: ExportedProgram) -> ExportedProgram:
    """Functional, without clones and dead code, and with every view as a reshape.

    run_decompositions makes views that are legal for the original strides only; clones and detaches change no value.
    """
    program = program.run_decompositions({})
    graph = program.graph
    for node in list(graph.nodes):
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
        elif _is_identity(node) and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


_IDENTITIES = frozenset(
    {aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default}
)


def _is_identity(node: torch.fx.Node) -> bool:
    """True when the node changes no value: dropout too, outside training."""
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


class _PathTracker:
    """Knows which submodule is running, so that an error can name it."""

    def __init__(self, module: nn.Module) -> None:
        self._names = {id(m): name for name, m in module.named_modules()}
        self._module = module
        self._stack: list[str] = []

    @property
    def path(self) -> str:
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def tracking(self) -> Iterator[None]:
        self._stack.clear()
        handles = []
        for submodule in self._module.modules():
            handles.append(submodule.register_forward_pre_hook(self._enter))
            handles.append(submodule.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


_ADVICE = (
    ("data-dependent", "replace the branch on a tensor's value by torch.where or torch.cond"),
    ("Could not guard", "replace the branch on a tensor's value by torch.where or torch.cond"),
    ("Constraints violated", "export with a fixed batch: --dynamic none"),
    ("specialized", "export with a fixed batch: --dynamic none"),
    ("mat1 and mat2", "check --input against what the model takes"),
    ("expected input", "check --input against what the model takes"),
    ("doesn't match model", "check --input against what the model takes"),
    ("must match", "check --input against what the model takes"),
    ("out of range", "give integer inputs their range: --input NAME=SHAPE:int64:BELOW"),
)


@contextmanager
def _as_capture_error(path: _PathTracker) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = str(error)
        advice = next((a for key, a in _ADVICE if key.lower() in text.lower()), None)
        first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(
            "the model cannot be traced",
            where=f"module {path.path or '(root)'}, {_user_line(error)}",
            got=f"{type(error).__name__}: {first}",
            next_step=advice or "make that line traceable by torch.export (no NumPy, no .item() that steers a branch)",
        ) from error


def _user_line(error: BaseException) -> str:
    """The innermost line outside torch: where the model's own code stopped."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "attn_deploy" not in f.filename] or frames
    own = [f for f in own if not f.filename.endswith(("export/capture.py", "contextlib.py"))] or frames
    last = own[-1]
    return f"{last.filename}:{last.lineno}: {(last.line or '').strip()}"


def _require_dynamic_batch(program: ExportedProgram, dims: Mapping[str, DimBounds]) -> None:
    if dims and not any(_symbols(n) for n in program.graph.nodes if n.op == "placeholder"):
        raise CaptureError(
            "the batch did not stay dynamic",
            expected="a graph that works for every batch size",
            next_step="export with a fixed batch: --dynamic none",
        )
