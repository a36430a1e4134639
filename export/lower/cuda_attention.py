"""Our attention operators as operators of ONNX Runtime that have fused CUDA kernels.

TABLE says what becomes of each form. The rest of a model's operators, and the sites whose shapes fit no operator, are
inlined afterwards: Lowered.notes says which and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attn_deploy.export.lower import cuda_windows
from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes, dims, same_dim, static
from attn_deploy.export.lower.cuda_operator import (
    KERNEL_MULTIPLE,
    Call,
    NotFused,
    Operator,
    attend,
    choose,
    slow_because,
)
from attn_deploy.export.lower.cuda_packed import Packed, unit
from attn_deploy.export.lower.cuda_scores import Added, Lengths, ScoreBias, rows_are_given
from attn_deploy.export.precision.insert import replace_node
from attn_deploy.ops import DOMAIN, FORMS

TABLE = {
    "Attention": "Attention (MultiHeadAttention below opset 23) on [batch, length, heads * head_dim], read in place",
    "PackedAttention": "Split, then the same; with a bias, Gathers that bring the key length to a multiple of 8",
    "...Causal": "is_causal; folded into the bias where there is a mask",
    "...Bias": "the operator's bias; memory-efficient or cuDNN kernels, flash has none",
    "...Mask": "a bias of 0 and -1e30, made once for the sites that share it; rows without a key are cut to 0",
    "...Grouped": "kv_num_heads; inlined below opset 23",
    "...Softcap": "softcap; inlined below opset 23",
    "...Cosine": "query and key divided by their lengths, then the same",
    "PackedAttentionIndexed...": "Gathers by window, the same with windows in the batch or the heads, one Gather back",
    "ChannelAttention...": "inlined: its head_dim would be the number of tokens, which no fused kernel takes",
    "RotaryEmbedding...": "com.microsoft RotaryEmbedding where the tables are constants, else inlined",
    "ContextPool, BranchPool, HardAttention": "inlined: no product of query and key",
}
"""Form -> what it becomes, for README and receipt."""

ATTENTION = frozenset({"Attention", "PackedAttention"})
"""Operators of ours, in all their forms, that this lowers."""


def fuse_attention(
    model: ir.Model, native: frozenset[str] = frozenset(), preferred: Operator = "Attention"
) -> tuple[str, ...]:
    """In place; forms named in `native` are left. `preferred`: the operator where two compute the same. Returns what
    was not fused, and why, a line for each site."""
    opset = model.opset_imports[""]
    shared = ScoreBias()
    notes = []
    for node in list(model.graph):
        form = FORMS.get(node.op_type) if node.domain == DOMAIN else None
        if form is None or form.operator not in ATTENTION or form.name in native:
            continue
        site = _Site(model, node, opset, preferred)
        reason = site.fuse(shared)
        if reason:
            notes.append(f"{node.name}: {reason}")
    return tuple(notes)


class _Site:
    """One attention node: `inputs` by the names of its form."""

    def __init__(self, model: ir.Model, node: ir.Node, opset: int, preferred: Operator) -> None:
        self.form = FORMS[node.op_type]
        self.model, self.node, self.opset, self.preferred = model, node, opset, preferred
        self.inputs = {i.name: v for i, v in zip(self.form.inputs, node.inputs, strict=True) if v is not None}
        self.scale = node.attributes["scale"].as_float()
        self.softcap = node.attributes["softcap"].as_float() if "softcap" in node.attributes else 0.0
        self.causal = "Causal" in self.form.name

    def fuse(self, shared: ScoreBias) -> str | None:
        """Replaces the node; returns why it was not, or why its kernels will not be fused."""
        call = self._shape()
        if isinstance(call, NotFused):
            return f"inlined: {call.reason}"
        nodes = Nodes(self.model, self.node)
        if "index" in self.inputs:
            return self._fuse_windows(nodes, call)
        lengths = Lengths(static(call.query, 1), static(call.key, 1))
        folded = replace(call, causal=False) if _folds_causal(call, lengths) else call
        operator = choose(folded, self.preferred, self.opset)
        mask = self.inputs.get("mask")
        if mask is not None and not rows_are_given(mask):
            operator = NotFused("a mask of unknown shape")
        if isinstance(operator, NotFused):
            return f"inlined: {operator.reason}"
        return self._fuse_whole(nodes, call, operator, shared)

    def _shape(self) -> Call | NotFused:
        """The call with its numbers alone; its tensors are made when it is known to fit."""
        query = self.inputs.get("qkv") or self.inputs["query"]
        key, value = self.inputs.get("key", query), self.inputs.get("value", query)
        packed = "qkv" in self.inputs
        sizes = [static(t, axis) for t in (query, key, value) for axis in ((3, 4) if packed else (2, 3))]
        if any(size is None for size in sizes):
            return NotFused(f"heads or head_dim are no numbers: {dims(query)}")
        heads, head_dim, kv_heads, _, _, value_dim = (size or 0 for size in sizes)
        return Call(
            query, key, value, heads, kv_heads, head_dim, value_dim, self.scale, causal=self.causal,
            square=same_dim(query, key, 1), softcap=self.softcap,
        )  # fmt: skip

    def _fuse_whole(self, nodes: Nodes, call: Call, operator: Operator, shared: ScoreBias) -> str | None:
        query_len, key_len = static(call.query, 1), static(call.key, 1)
        bias, mask = self.inputs.get("bias"), self.inputs.get("mask")
        has_bias = bias is not None or mask is not None
        extra = -key_len % KERNEL_MULTIPLE if key_len is not None and has_bias else 0
        if call.causal and query_len is None:
            extra = 0
        lengths = Lengths(query_len, key_len, extra)
        added = shared.added(
            nodes, bias, mask, call.causal, lengths, call.query, fold_causal=bool(extra) or _folds_causal(call, lengths)
        )
        query, key, value = self._tensors(nodes, lengths)
        call = replace(call, query=query, key=key, value=value, bias=added.bias, causal=added.causal)
        result = _cut(nodes, attend(nodes, call, operator), added, call)
        if "qkv" not in self.inputs:
            result = nodes.reshape(result, 0, 0, call.heads, call.value_dim)
        replace_node(self.model, self.node, result)
        reason = slow_because(call, None if key_len is None else key_len + extra)
        return f"one operator, but not a fused kernel: {reason}" if reason else None

    def _tensors(self, nodes: Nodes, lengths: Lengths) -> Iterator[ir.Value]:
        """query, key and value [batch, length, heads * head_dim], with extra keys that repeat the first."""
        head_scale = self.inputs.get("head_scale")
        if "qkv" in self.inputs:
            packed = Packed(nodes, self.inputs["qkv"], head_scale)
            if not lengths.extra:
                yield from packed.parts()
                return
            assert lengths.key is not None
            own = np.arange(lengths.key)
            for part, extra in enumerate((0, lengths.extra, lengths.extra)):
                yield packed.rows(part, np.concatenate([own, np.zeros(extra, np.int64)]))
            return
        for name in ("query", "key", "value"):
            tensor = self.inputs[name]
            if head_scale is not None and name != "value":
                tensor = unit(nodes, tensor, head_scale if name == "query" else None)
            merged = nodes.reshape(tensor, 0, 0, -1)
            if lengths.extra and name != "query":
                assert lengths.key is not None
                numbers = np.concatenate([np.arange(lengths.key), np.zeros(lengths.extra, np.int64)])
                merged = nodes.take(merged, numbers, axis=1)
            yield merged

    def _fuse_windows(self, nodes: Nodes, call: Call) -> str | None:
        windows = cuda_windows.plan(self.node, self.inputs, call.heads)
        if isinstance(windows, NotFused):
            return f"inlined: {windows.reason}"
        operator = choose(cuda_windows.folded(windows, call), self.preferred, self.opset)
        if isinstance(operator, NotFused):
            return f"inlined: {operator.reason}"
        if operator == "MultiHeadAttention":
            windows = replace(windows, queries=windows.keys)
        qkv = self.inputs["qkv"]
        packed = Packed(nodes, qkv, self.inputs.get("head_scale"))
        query, key, value = cuda_windows.gathered(nodes, packed, windows, self.inputs.get("fill"))
        bias = cuda_windows.bias_of(nodes, windows, self.inputs, qkv)
        call = cuda_windows.folded(windows, replace(call, query=query, key=key, value=value, bias=bias))
        result = attend(nodes, call, operator)
        replace_node(self.model, self.node, cuda_windows.scattered(nodes, windows, result, packed.channels))
        slow = slow_because(call, windows.keys.shape[1])
        return f"one operator, but not a fused kernel: {slow}" if slow else None


def _folds_causal(call: Call, lengths: Lengths) -> bool:
    """Query and key of other lengths: kernels differ in where the diagonal begins."""
    return call.causal and not call.square and lengths.known


def _cut(nodes: Nodes, result: ir.Value, added: Added, call: Call) -> ir.Value:
    """Rows without a key give 0."""
    if added.seen is None:
        return result
    shape = (0, 0, call.heads, call.value_dim)
    zero = nodes.const(np.zeros(1, np.float32))
    cut = nodes.op("Where", [added.seen, nodes.reshape(result, *shape), zero], dtype=FLOAT)
    return nodes.reshape(cut, 0, 0, call.heads * call.value_dim)
