"""One attention as an operator that ONNX Runtime's CUDA provider has fused kernels for.

`Attention` of ONNX (opset 23) and com.microsoft `MultiHeadAttention` both read [batch, length, heads * head_dim] in
place. Which kernels they take was asked of onnxruntime-gpu 1.31.1 itself, run upon stand-ins for NVIDIA's libraries
(compute capability 9; tests/export/test_lower_cuda_kernels.py):

| | Attention | MultiHeadAttention |
| --- | --- | --- |
| FP16, BF16 | flash; memory-efficient with a bias | cuDNN, with and without a bias |
| FP32 | memory-efficient; products and a softmax for grouped heads | products and a softmax below 256 tokens |
| grouped heads, soft cap | yes | no |
| causal | from the first key | from the last: query and key must be equally long |
| opset | 23 and later | any |

A bias needs a key length that is a multiple of 4 for the memory-efficient kernels. Which of the two is faster depends
on the device, so both are offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes

Operator = Literal["Attention", "MultiHeadAttention"]

STANDARD_OPSET = 23
"""From here on Attention is an operator of ONNX."""

MAX_HEADS = 1024
"""MultiHeadAttention and the transposes of the unfused kernels give each head a thread of one block."""

KERNEL_MULTIPLE = 8
"""head_dim of the fused kernels; the key length is brought to it where there is a bias, for aligned loads of halves."""


@dataclass(frozen=True)
class Call:
    """query [batch, query_len, heads * head_dim], key [batch, key_len, kv_heads * head_dim], value [batch, key_len,
    kv_heads * value_dim]; bias [batch|1, heads|1, query_len, key_len] or None, added to the scaled scores.

    `square`: query and key are known to be equally long.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    bias: ir.Value | None = None
    causal: bool = False
    square: bool = True
    softcap: float = 0.0


@dataclass(frozen=True)
class NotFused:
    """Why no operator computes a call."""

    reason: str


def choose(call: Call, preferred: Operator, opset: int) -> Operator | NotFused:
    """The operator that computes the call, `preferred` where both do."""
    if call.scale <= 0:
        return NotFused(f"scale {call.scale:g} is not positive")
    if call.kv_heads != call.heads and call.head_dim != call.value_dim:
        return NotFused(f"grouped heads with head_dim {call.head_dim} and value_dim {call.value_dim}")
    reason = _beyond_multi_head(call)
    if opset >= STANDARD_OPSET and (preferred == "Attention" or reason is not None):
        return "Attention"
    return "MultiHeadAttention" if reason is None else NotFused(f"{reason} below opset {STANDARD_OPSET}")


def _beyond_multi_head(call: Call) -> str | None:
    """Why MultiHeadAttention does not compute the call."""
    if call.kv_heads != call.heads:
        return "grouped heads"
    if call.softcap:
        return "a soft cap"
    if call.causal and not call.square:
        return "causal with a query and key of other lengths"
    if call.heads > MAX_HEADS:
        return f"{call.heads} heads"
    return None


def attend(nodes: Nodes, call: Call, operator: Operator) -> ir.Value:
    """[batch, query_len, heads * value_dim], by the operator that `choose` gave for the call."""
    tensors: list[ir.Value | None] = [call.query, call.key, call.value]
    if operator == "Attention":
        return nodes.op(
            "Attention", [*tensors, call.bias] if call.bias is not None else tensors, dtype=FLOAT,
            q_num_heads=call.heads, kv_num_heads=call.kv_heads, is_causal=int(call.causal), scale=call.scale,
            softcap=call.softcap,
        )  # fmt: skip
    inputs = [*tensors, None, None, call.bias] if call.bias is not None else tensors
    return nodes.op(
        "MultiHeadAttention", inputs, domain="com.microsoft", dtype=FLOAT,
        num_heads=call.heads, unidirectional=int(call.causal), scale=call.scale,
    )  # fmt: skip


def slow_because(call: Call, key_len: int | None) -> str | None:
    """Why the operator runs as products and a softmax; None when a fused kernel fits, as far as the shapes tell."""
    if call.head_dim % KERNEL_MULTIPLE or call.value_dim % KERNEL_MULTIPLE:
        return f"head_dim {call.head_dim} is no multiple of {KERNEL_MULTIPLE}"
    if call.bias is not None and key_len is not None and key_len % KERNEL_MULTIPLE:
        return f"key length {key_len} is no multiple of {KERNEL_MULTIPLE}"
    return None
