"""The operators as torch.library ops, so that the rewritten graph still runs in PyTorch.

Here an absent optional input is None; the exporter picks the ONNX form from what is given. Implementations use
PyTorch's own functions and know nothing of the ONNX function bodies: comparing the two is a real comparison.
"""

from __future__ import annotations

from attn_deploy.export.torch_ops.attention import attention, packed_attention, packed_attention_indexed
from attn_deploy.export.torch_ops.channel_attention import channel_attention
from attn_deploy.export.torch_ops.gate import channel_pool_max, channel_pool_mean, channel_pool_mean_max, gate
from attn_deploy.export.torch_ops.pooling import branch_pool, context_pool, hard_attention, spatial_pool
from attn_deploy.export.torch_ops.rotary import rotary_embedding

__all__ = [
    "attention",
    "branch_pool",
    "channel_attention",
    "channel_pool_max",
    "channel_pool_mean",
    "channel_pool_mean_max",
    "context_pool",
    "gate",
    "hard_attention",
    "packed_attention",
    "packed_attention_indexed",
    "rotary_embedding",
    "spatial_pool",
]
