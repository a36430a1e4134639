"""Attention with its linear layers: query, key and value as one packed product, and the whole attention block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cpu_fuser import Fuser
from attn_deploy.export.lower.cpu_linear import LinearLayer, in_8_bits, only_reader, same_shape
from attn_deploy.export.lower.cuda_nodes import Nodes, dims
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.session import Array

Layers = Mapping[ir.Value, LinearLayer]


@dataclass(frozen=True)
class AttentionBlock:
    """`before` makes query, key and value for the site [batch, tokens, 3, heads, head_dim], `after` reads its result;
    either may be missing."""

    site: ir.Node
    before: LinearLayer | None
    after: LinearLayer | None

    @property
    def layers(self) -> tuple[LinearLayer, ...]:
        return tuple(layer for layer in (self.before, self.after) if layer is not None)

    @property
    def form(self) -> str:
        """The operator that holds all of it; empty where it is no block with norm and residual, or only one of its
        layers is in 8 bits."""
        before, after = self.before, self.after
        if before is None or after is None or before.norm is None or before.activation or before.residual is not None:
            return ""
        x = before.norm.x
        whole = after.norm is None and not after.activation and after.residual is x and len(dims(x)) == 3
        fits = before.shape[1] == 3 * before.shape[0] and after.shape == (before.shape[0], before.shape[0])
        if not whole or not fits or before.quantized != after.quantized:
            return ""
        form = self.site.op_type.replace("PackedAttention", "AttentionBlock", 1)
        return in_8_bits(form) if before.quantized else form


def attention_block(site: ir.Node, by_operand: Layers, by_result: Layers) -> AttentionBlock:
    """What stands around a PackedAttention, as far as nothing else reads it."""
    packed, result = site.inputs[0], site.outputs[0]
    reshape = packed.producer() if packed is not None and only_reader(packed) is site else None
    flat = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    before = by_result.get(flat) if flat is not None and only_reader(flat) is reshape else None
    if packed is None or before is None or dims(before.result)[:2] != dims(packed)[:2]:
        before = None
    reader = only_reader(result)
    after = by_operand.get(result)
    return AttentionBlock(site, before, after if after is not None and reader is after.product else None)


def fuse_attention_block(fuser: Fuser, block: AttentionBlock) -> None:
    before, after, site = block.before, block.after, block.site
    assert before is not None
    assert after is not None
    assert before.norm is not None
    inputs = [before.norm.x, *fuser.norm_constants(before.norm)]
    inputs += [*fuser.layer_constants(before), *fuser.layer_constants(after), *site.inputs[1:]]
    packed = site.inputs[0]
    assert packed is not None
    own = {name: a.value for name, a in site.attributes.items()}
    heads = dims(packed)[3]
    assert isinstance(heads, int)
    attributes = {"epsilon": before.norm.epsilon, "heads": heads, **own}
    fuser.make(block.form, inputs, attributes, named=site, last=after.nodes[-1])


# -- query, key and value of three layers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Packable:
    """An Attention that reads query, key and value of three layers of one value; `heads` and `head_dim` of each."""

    site: ir.Node
    layers: tuple[LinearLayer, ...]
    heads: int
    head_dim: int

    @property
    def form(self) -> str:
        return f"Packed{self.site.op_type}"


def packable(site: ir.Node, by_result: Layers) -> Packable | None:
    """Nothing stands between the layers and the site but the split into heads, and nothing else reads them."""
    if FORMS[site.op_type].operator != "Attention" or f"Packed{site.op_type}" not in FORMS:
        return None
    layers = []
    views = [v for v in site.inputs[:3] if v is not None]
    for view in views:
        reshape = view.producer() if only_reader(view) is site else None
        flat = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
        layer = by_result.get(flat) if flat is not None and only_reader(flat) is reshape else None
        if layer is None or layer.activation or layer.residual is not None or not same_shape(view, views[0]):
            return None
        layers.append(layer)
    _, _, heads, head_dim = dims(views[0])
    batch_tokens = dims(views[0])[:2]
    if not isinstance(heads, int) or not isinstance(head_dim, int) or len({layer.x for layer in layers}) != 1:
        return None
    if any(list(dims(layer.result)) != [*batch_tokens, heads * head_dim] for layer in layers):
        return None
    return Packable(site, tuple(layers), heads, head_dim)


def pack(model: ir.Model, found: Packable) -> ir.Node:
    """One product and PackedAttention in place of three and Attention, in place. The site keeps its name, its result
    name and shape. Returns the product."""
    site, first = found.site, found.layers[0]
    nodes = Nodes(model, site, named=first.product)
    x, width = first.product.inputs[0], 3 * found.heads * found.head_dim
    assert x is not None
    leading = list(dims(x))[:-1]
    result = nodes.op("MatMul", [x, nodes.const(_joined([layer.weight() for layer in found.layers], 1))], dtype=x.dtype)
    result.shape = ir.Shape([*leading, width])
    product = result.producer()
    assert product is not None
    result = nodes.op("Add", [result, nodes.const(_joined([layer.bias() for layer in found.layers], 0))], dtype=x.dtype)
    result.shape = ir.Shape([*leading, width])
    packed = nodes.reshape(result, 0, 0, 3, found.heads, found.head_dim)
    packed.shape = ir.Shape([*leading, 3, found.heads, found.head_dim])
    made = ir.Value(name=f"{site.name}/packed", shape=ir.Shape([*leading, width // 3]), type=x.type)
    inputs = [packed, *site.inputs[3:]]
    node = ir.Node(DOMAIN, found.form, inputs, list(site.attributes.values()), outputs=[made], name=site.name)
    node.metadata_props.update(site.metadata_props)
    model.graph.insert_before(site, node)
    _take_over(model, site, made, found)
    return product


def _joined(arrays: list[Array], axis: int) -> Array:
    return np.ascontiguousarray(np.concatenate(arrays, axis=axis), np.float32)


def _take_over(model: ir.Model, site: ir.Node, made: ir.Value, found: Packable) -> None:
    """The heads are joined already in `made`; who reads them apart gets them apart."""
    old = site.outputs[0]
    for reader in [reader for reader, _ in old.uses()]:
        joined = reader.outputs[0]
        if reader.op_type == "Reshape" and dims(joined) == dims(made) and not joined.is_graph_output():
            joined.replace_all_uses_with(made)
            made.name, joined.name = joined.name, f"{joined.name}/replaced"
    nodes = Nodes(model, site)
    apart = nodes.reshape(made, 0, 0, found.heads, found.head_dim)
    apart.type = old.type
    name, shape = old.name, old.shape
    old.replace_all_uses_with(apart, replace_graph_outputs=True)
    model.graph.remove(site, safe=True)
    apart.name, apart.shape = name, shape
