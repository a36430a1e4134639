"""One attention as an operator that ONNX Runtime's CUDA provider has fused kernels for.

Read from onnxruntime-gpu 1.31.1: its table of kernels and the messages in its CUDA library, with the sources of that
time for the conditions.

ai.onnx `Attention` (opset 23) is taken where the model can be at opset 23. Its kernels for FP32, FP16 and BF16 are
tried in this order: cuDNN (FP16 and BF16, compute capability 9 and later), flash (FP16 and BF16, no bias, head_dim a
multiple of 8 up to 256), memory-efficient (a bias needs a key length that is a multiple of 4; grouped heads only in
FP16 and BF16, head_dim a multiple of 8), else products and a softmax. It takes kv_heads fewer than heads, a soft cap
before the bias, and reads [batch, length, heads * head_dim] in place.

com.microsoft `MultiHeadAttention` is taken below opset 23. It has the same kernels, reads the same layout, but knows
neither grouped heads nor a cap, and counts a causal row from the last key: so query and key must be equally long.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from attn_deploy.export.lower.cuda_nodes import FLOAT, Nodes

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


def unsupported(call: Call, opset: int) -> str | None:
    """Why neither operator computes the call; None when one does."""
    if call.scale <= 0:
        return f"scale {call.scale:g} is not positive"
    if call.kv_heads != call.heads and call.head_dim != call.value_dim:
        return f"grouped heads with head_dim {call.head_dim} and value_dim {call.value_dim}"
    if opset >= STANDARD_OPSET:
        return None
    if call.kv_heads != call.heads:
        return f"grouped heads below opset {STANDARD_OPSET}"
    if call.softcap:
        return f"a soft cap below opset {STANDARD_OPSET}"
    if call.causal and not call.square:
        return f"causal with a query and key of other lengths below opset {STANDARD_OPSET}"
    if call.heads > MAX_HEADS:
        return f"{call.heads} heads"
    return None


def attend(nodes: Nodes, call: Call, opset: int) -> ir.Value:
    """[batch, query_len, heads * value_dim]. `unsupported` gave None for the call."""
    tensors: list[ir.Value | None] = [call.query, call.key, call.value]
    if opset >= STANDARD_OPSET:
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
