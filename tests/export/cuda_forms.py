"""One attention of ours as a model, with random operands, for the tests of its lowering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from attn_deploy.export.functions import attach_functions
from attn_deploy.ops import DOMAIN, FORMS, Form

Array = np.ndarray[Any, Any]

BELOW, STANDARD = 20, 23
"""Opsets without and with an Attention of ONNX."""


@dataclass(frozen=True)
class Sizes:
    batch: int = 1
    query_len: int = 5
    key_len: int = 7
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    windows: int = 4
    length: int = 7


@dataclass(frozen=True)
class Case:
    """One site: `operands` in the form's order; those named in `constants` are initializers."""

    form: Form
    operands: Mapping[str, Array]
    attributes: Mapping[str, Any]
    constants: frozenset[str] = field(default=frozenset({"index", "bias_index"}))


def case(name: str, sizes: Sizes, *, constants: str = "", seed: int = 0, clear_row: bool = True) -> Case:
    """Random operands; with a mask, the first row of the last sample sees nothing (`clear_row`)."""
    form, rng = FORMS[name], np.random.default_rng(seed)
    packed, indexed = form.operator == "PackedAttention", "Indexed" in name
    tokens = sizes.windows * sizes.length - (3 if "Padded" in name else 0)
    query_len = key_len = sizes.length
    if not indexed:
        query_len, key_len = (sizes.key_len,) * 2 if packed else (sizes.query_len, sizes.key_len)
    kv_heads = sizes.kv_heads if "Grouped" in name else sizes.heads
    numbers = rng.permutation(sizes.windows * sizes.length)
    index = np.where(numbers < tokens - 1, numbers, -1) if "Padded" in name else numbers
    mask = rng.random((sizes.batch, 1, query_len, key_len)) < 0.7
    mask[..., 0] = True
    if clear_row:
        mask[-1, :, 0] = False
    shapes = {
        "query": (sizes.batch, query_len, sizes.heads, sizes.head_dim),
        "key": (sizes.batch, key_len, kv_heads, sizes.head_dim),
        "value": (sizes.batch, key_len, kv_heads, sizes.head_dim),
        "qkv": (sizes.batch, tokens if indexed else key_len, 3, sizes.heads, sizes.head_dim),
        "fill": (3, sizes.heads, sizes.head_dim),
        "bias": (1, sizes.heads, query_len, key_len),
        "windows_bias": (3, sizes.heads, sizes.length, sizes.length),
    }
    given = {
        "mask": mask,
        "index": index.reshape(sizes.windows, sizes.length),
        "bias_index": np.arange(sizes.windows) % 3,
        "head_scale": rng.random(sizes.heads).astype(np.float32) * 5 + 5,
    }
    operands = {
        i.name: given[i.name] if i.name in given else rng.standard_normal(shapes[i.name]).astype(np.float32)
        for i in form.inputs
    }
    attributes: dict[str, Any] = {"scale": 0.6, "softcap": 2.0, "tokens": tokens}
    kept = {key: attributes[key] for key in form.attributes}
    return Case(form, operands, kept, frozenset({"index", "bias_index", *constants.split()}))


KINDS = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "bool": ir.DataType.BOOL}


def model_of(site: Case, opset: int, *, symbols: Mapping[int, str] | None = None) -> ir.Model:
    """A model of the one node `block.attn/FORM`. The batch is a symbol; `symbols`: other sizes that are."""
    named = dict(symbols or {})
    inputs = []
    for operand in site.form.inputs:
        array = site.operands[operand.name]
        value = ir.Value(name=operand.name, type=ir.TensorType(KINDS[str(array.dtype)]))
        if operand.name in site.constants:
            value.const_value = ir.tensor(array, name=operand.name)
        batched = operand.name in ("x", "query", "key", "value", "qkv", "mask")
        value.shape = ir.Shape(
            ["batch" if axis == 0 and batched else named.get(size, size) for axis, size in enumerate(array.shape)]
        )
        inputs.append(value)
    output = ir.Value(name="output", type=ir.TensorType(ir.DataType.FLOAT))
    output.shape = ir.Shape([None] * (3 if site.form.operator == "PackedAttention" else 4))
    node = ir.node(
        site.form.name, inputs, dict(site.attributes), domain=DOMAIN, outputs=[output],
        name=f"block.attn/{site.form.name}",
    )  # fmt: skip
    fed = [v for v in inputs if v.name not in site.constants]
    held = [v for v in inputs if v.name in site.constants]
    graph = ir.Graph(fed, [output], nodes=[node], initializers=held, opset_imports={"": opset, DOMAIN: 1}, name="site")
    model = ir.Model(graph, ir_version=10)
    attach_functions(model)
    return model
