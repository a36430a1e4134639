"""RotaryEmbedding with tables that are constants as ONNX Runtime's operator of that name: one kernel for seven.

Ours has an entry of cos and sin for each channel; the runtime's has one for each pair, so the two of a pair have to be
the same, as they are in every model of Su et al. 2021. Positions count from 0 in each sample: position_ids is [0],
which does not depend on the batch.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes, constant_of, static
from attn_deploy.export.precision.insert import replace_node
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.session import Array

ROUNDING = 1e-6
"""Both entries of a pair are the same cosine, computed at two places of a vectorized loop: 3e-7 apart were seen."""


def fuse_rotary(model: ir.Model, native: frozenset[str] = frozenset()) -> int:
    """In place; forms named in `native` are left, and those with tables that are computed. Returns how many."""
    fused = 0
    for node in list(model.graph):
        if node.domain != DOMAIN or node.op_type in native or FORMS[node.op_type].operator != "RotaryEmbedding":
            continue
        x, cos, sin = node.inputs
        assert x is not None
        interleaved = node.op_type.endswith("Interleaved")
        tables = [_by_pair(table, interleaved) for table in (cos, sin)]
        heads, head_dim = static(x, 2), static(x, 3)
        if heads is None or head_dim is None or any(table is None for table in tables):
            continue
        nodes = Nodes(model, node)
        merged = nodes.reshape(x, 0, 0, heads * head_dim)
        caches = [nodes.const(table) for table in tables if table is not None]
        turned = nodes.op(
            "RotaryEmbedding", [merged, nodes.ints(0), *caches], domain="com.microsoft", dtype=FLOAT,
            interleaved=int(interleaved),
        )  # fmt: skip
        replace_node(model, node, nodes.reshape(turned, 0, 0, heads, head_dim))
        fused += 1
    return fused


def _by_pair(table: ir.Value | None, interleaved: bool) -> Array | None:
    """[1, tokens, head_dim] -> [tokens, head_dim / 2], where both channels of every pair have the same entry."""
    array = constant_of(table)
    if array is None or array.shape[0] != 1:
        return None
    half = array.shape[2] // 2
    first, second = (array[0, :, ::2], array[0, :, 1::2]) if interleaved else (array[0, :, :half], array[0, :, half:])
    same = np.abs(first - second).max(initial=0.0) <= ROUNDING
    return np.ascontiguousarray(first) if same else None
