"""RewrittenModel -> CanonicalModel: ONNX with our operators, a function body attached to each, names from modules."""

from __future__ import annotations

import ast
import collections
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import rewriter
from onnxscript import values as onnxscript_values
from onnxscript.rewriter.rules import common
from torch.export import ExportedProgram

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.canonical import CanonicalModel, CanonicalSite, check_model
from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.dimensions import dynamic_shapes
from attn_deploy.export.forms import OPERATORS, form_and_operands
from attn_deploy.export.functions import attach_functions, register_schemas
from attn_deploy.export.rewrite import RewrittenModel
from attn_deploy.ops import DOMAIN, FORMS, VERSION
from attn_deploy.session import TensorSpec

MIN_OPSET = 20
"""Gelu is an operator from here on: below it, ONNX Runtime fuses none."""


AROUND_SITES = frozenset({"ChannelPool", "SpatialPool", "RotaryEmbedding"})
"""Operators that feed a site and are none themselves."""


def to_onnx(rewritten: RewrittenModel, *, opset: int = MIN_OPSET) -> CanonicalModel:
    """Translates the rewritten graph. Raises AttnDeployError when an ATen operator has no ONNX counterpart."""
    register_schemas()
    captured = rewritten.captured
    model = _export(captured, rewritten.program, opset)
    operators = _site_nodes(model, rewritten)
    _fold_batch_norms(model)
    _name_nodes(model)
    attach_functions(model)
    sites = tuple(
        CanonicalSite(
            site.kind, site.module, site.source_line, site.operator, str(node.name), site.node, site.proven,
            site.flops, site.bytes,
        )
        for site, node in zip(rewritten.sites, operators, strict=True)
    )  # fmt: skip
    canonical = CanonicalModel(model, sites, _specs(model.graph.inputs), _specs(model.graph.outputs), captured.dims)
    check_model(model)
    return canonical


def plain_onnx(captured: CapturedModel, *, opset: int = MIN_OPSET) -> ir.Model:
    """What torch.onnx.export makes of the model by itself: the peer to be faster than."""
    return _export(captured, captured.program, opset)


def _export(captured: CapturedModel, program: ExportedProgram, opset: int) -> ir.Model:
    shapes = None
    if captured.dims:  # said again: torch.onnx would call the dimension s77
        shapes = tuple(dynamic_shapes(captured.inputs, captured.dims).values())
    ops = torch.ops.attn_deploy
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        getattr(ops, name).default: _translation(name) for name in OPERATORS
    }
    try:
        with _quiet(), _contiguous_attention(program):
            exported = torch.onnx.export(
                program, dynamo=True, opset_version=opset, custom_translation_table=table,
                dynamic_shapes=shapes, input_names=[i.name for i in captured.inputs],
                output_names=list(captured.outputs), optimize=True, verbose=False,
            )  # fmt: skip
    except Exception as error:
        cause = error.__cause__ or error
        raise AttnDeployError(
            "the captured model cannot be written as ONNX",
            got=f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}",
            expected="ATen operators that torch.onnx translates",
            next_step="replace the operator named above in the model, or try a newer torch",
        ) from error
    assert exported is not None
    return exported.model


@contextlib.contextmanager
def _contiguous_attention(program: ExportedProgram) -> Iterator[None]:
    """Results of scaled_dot_product_attention are laid out in order while the program is exported.

    Where it has a float mask that is computed, two passes of torch.onnx 2.15 see other strides in its result: the first
    makes a view of what the second cannot view, and the export fails. ONNX knows no strides: no node stays behind.
    """
    attention, clone = torch.ops.aten.scaled_dot_product_attention.default, torch.ops.aten.clone.default
    copies = []
    for node in list(program.graph.nodes):
        if node.target is attention:
            with program.graph.inserting_after(node):
                copy = program.graph.call_function(clone, (node,), {"memory_format": torch.contiguous_format})
            copy.meta = dict(node.meta)
            for user in [user for user in node.users if user is not copy and user.op != "output"]:
                user.replace_input_with(node, copy)
            copies.append((node, copy))
    program.graph_module.recompile()
    try:
        yield
    finally:
        for node, copy in copies:
            copy.replace_all_uses_with(node)
            program.graph.erase_node(copy)
        program.graph_module.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter and its optimizer talk on every channel; what is wrong comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _site_nodes(model: ir.Model, rewritten: RewrittenModel) -> list[ir.Node]:
    """The ONNX node of each site: the exporter keeps the order of the graph, but not the names of its nodes."""
    nodes = [n for n in model.graph if n.domain == DOMAIN and FORMS[n.op_type].operator not in AROUND_SITES]
    if [n.op_type for n in nodes] != [site.operator for site in rewritten.sites]:
        raise AttnDeployError(
            "the exporter changed the recognized sites",
            got=[n.op_type for n in nodes],
            expected=[site.operator for site in rewritten.sites],
        )
    return nodes


def _translation(operator: str) -> Callable[..., Any]:
    domain = onnxscript_values.Opset(DOMAIN, VERSION)

    def translate(*args: Any) -> Any:
        form, operands, attributes = form_and_operands(operator, args)
        return getattr(domain, form.name)(*operands, **attributes)

    return translate


def _fold_batch_norms(model: ir.Model) -> None:
    """BatchNormalization behind a convolution goes into its weights: quantization must see the weights that run."""
    rules = [
        common.fuse_batchnorm_into_conv_rule,
        common.fuse_batchnorm_into_conv_transpose_rule,
        common.fuse_batchnorm_into_gemm_rule,
    ]
    rewriter.rewrite(model, pattern_rewrite_rules=rewriter.RewriteRuleSet(rules))


def _name_nodes(model: ir.Model) -> None:
    """`module.path/Operator`, numbered where a module has several: profiles and errors then say where they are."""
    counts: collections.Counter[str] = collections.Counter()
    for node in model.graph:
        name = f"{_scope(node)}/{node.op_type}".lstrip("/")
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name]}"


def _scope(node: ir.Node) -> str:
    """The module path: the name of the weight where the node has one (a folded BatchNormalization leaves the
    convolution's weight), else what torch.onnx noted, whose last entry is the ATen node itself."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is not None and weight.is_initializer() and str(weight.name).endswith(".weight"):
        return str(weight.name).removesuffix(".weight")
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if not text:
        return ""
    scopes = [s for s in ast.literal_eval(text)[:-1] if s and not s.startswith("_empty_nn_module")]
    return scopes[-1] if scopes else ""


def _specs(values: Any) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        assert value.name is not None
        assert value.dtype is not None
        dims = tuple(d if isinstance(d, int) else str(d.value) for d in (value.shape or ()))
        specs.append(TensorSpec(value.name, str(value.dtype.numpy()), dims))
    return tuple(specs)
