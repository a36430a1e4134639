"""Our operators in ONNX: their schemas, their function bodies on a model, and models with the bodies put in."""

from __future__ import annotations

import itertools

import onnx
import onnx.parser
import onnx_ir as ir
from onnx import defs

from attn_deploy.errors import AttnDeployError
from attn_deploy.ops import DOMAIN, FORMS, VERSION, Form
from attn_deploy.target import nearest

_TYPES = {
    "float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)", "uint8": "tensor(uint8)"
}  # fmt: skip


def register_schemas() -> None:
    """Makes the operators known to onnx in this process: torch.onnx.export asks for it. Safe to call again."""
    schema = defs.OpSchema
    for form in FORMS.values():
        if defs.has(form.name, DOMAIN):
            continue
        kinds = {float: schema.AttrType.FLOAT, int: schema.AttrType.INT}
        defs.register_schema(
            schema(
                form.name,
                DOMAIN,
                VERSION,
                inputs=[schema.FormalParameter(i.name, _TYPES[i.dtype]) for i in form.inputs],
                outputs=[schema.FormalParameter(o, _TYPES[form.output_dtype]) for o in form.outputs],
                attributes=[schema.Attribute(name, kinds[kind]) for name, kind in form.attributes.items()],
            )
        )


def attach_functions(model: ir.Model) -> None:
    """Adds the body of every operator that the model uses, in place.

    The last step of writing a model: the optimizer would inline the bodies, the version converter would drop them.
    """
    forms = {node.op_type: _form(node) for node in model.graph if node.domain == DOMAIN}
    for _, form in sorted(forms.items()):
        proto = onnx.parser.parse_function(form.function_text())
        del proto.opset_import[:]
        proto.opset_import.append(onnx.helper.make_opsetid("", model.opset_imports[""]))
        function = ir.serde.deserialize_function(proto)
        model.functions[function.identifier()] = function
    check_functions(model)


def check_functions(model: ir.Model) -> None:
    """Every node of our domain has its body and all its attributes; the ONNX checker notices neither."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        form = _form(node)
        if (DOMAIN, node.op_type, "") not in model.functions:
            raise AttnDeployError("an operator has no function body", where=node.name, got=node.op_type)
        if set(node.attributes) != set(form.attributes) or len(node.inputs) != len(form.inputs):
            raise AttnDeployError(
                "an operator does not fit its schema",
                where=node.name,
                got=f"{len(node.inputs)} inputs, attributes {sorted(node.attributes)}",
                expected=f"{len(form.inputs)} inputs, attributes {sorted(form.attributes)}",
            )


def _form(node: ir.Node) -> Form:
    form = FORMS.get(node.op_type)
    if form is None:
        raise AttnDeployError(
            "a node is no operator of ours", where=node.name, got=f"{node.domain}.{node.op_type}",
            expected=nearest(node.op_type, FORMS), next_step="install the attn-deploy that wrote the model",
        )  # fmt: skip
    return form


def inline_functions(
    model: ir.Model, keep: frozenset[str] = frozenset(), apart_from: frozenset[str] = frozenset()
) -> None:
    """Puts the bodies in place of the operators, in place; forms named in `keep` stay operators, apart from the nodes
    named in `apart_from`.

    The names of what is put in start with the operator's own name, so that a profile shows to which site it belongs;
    onnx.inliner loses them. Raises AttnDeployError as check_functions does.
    """
    check_functions(model)
    for node in list(model.graph):
        if node.domain == DOMAIN and (node.op_type not in keep or node.name in apart_from):
            _inline(model, node)
    used = {(n.domain, n.op_type, "") for n in model.graph if n.domain == DOMAIN}
    for identifier in list(model.functions):
        if identifier not in used:
            del model.functions[identifier]
    if not used:
        model.opset_imports.pop(DOMAIN, None)


def _inline(model: ir.Model, node: ir.Node) -> None:
    function = model.functions[(node.domain, node.op_type, "")]
    values: dict[ir.Value, ir.Value | None] = dict(zip(function.inputs, node.inputs, strict=True))
    counter = itertools.count()
    made = []
    for inner in function:
        outputs = []
        for output in inner.outputs:
            value = ir.Value(name=f"{node.name}/{output.name}", type=output.type, shape=output.shape)
            values[output] = value
            outputs.append(value)
        attributes = [_resolve(a, node) for a in inner.attributes.values()]
        inputs = [None if i is None else values[i] for i in inner.inputs]
        copied = ir.Node(
            inner.domain, inner.op_type, inputs, attributes, outputs=outputs,
            name=f"{node.name}/{inner.op_type}_{next(counter)}",
        )  # fmt: skip
        made.append(copied)
    made[0].metadata_props.update(node.metadata_props)  # once: a stack trace is longer than a node
    results = [values[o] for o in function.outputs]
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, list(node.outputs), results)


def _resolve(attribute: ir.Attr, node: ir.Node) -> ir.Attr:
    """An attribute of the body, with a reference replaced by the value on the operator's node."""
    if attribute.ref_attr_name is None:
        return attribute
    return ir.Attr(attribute.name, attribute.type, node.attributes[attribute.ref_attr_name].value)
