"""What ONNX Runtime's CUDA provider has half kernels for: read from the kernel table of onnxruntime-gpu 1.31.1.

A node whose type has no kernel runs on the CPU, with a copy to the host and back around it.
"""

from __future__ import annotations

import onnx_ir as ir

from attn_deploy.export.lower.cuda_opset import NO_KERNEL_AT_22
from attn_deploy.export.precision.half_rules import STATISTICS, HalfKernels
from attn_deploy.target import Precision

NO_FP16 = frozenset({"EyeLike", "GridSample", "Range"})
"""Operators with an FP32 kernel and no FP16 one, opsets 20 to 23."""

NO_BF16 = NO_FP16 | frozenset(
    {"ArgMax", "ArgMin", "BatchNormalization", "Ceil", "Clip", "ConvTranspose", "CumSum", "DepthToSpace",
     "DequantizeLinear", "Einsum", "Equal", "Floor", "GRU", "GlobalAveragePool", "GlobalMaxPool", "Greater",
     "GreaterOrEqual", "LRN", "LSTM", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "NonZero", "OneHot",
     "PRelu", "Pad", "QuantizeLinear", "RNN", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp",
     "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSumSquare", "Resize", "Round", "Shrink", "SpaceToDepth", "TopK"}
) | NO_KERNEL_AT_22  # fmt: skip
"""The same for BF16, at opsets 22 and 23."""

NO_BF16_CONTRIB = frozenset({"BiasAdd", "FusedConv", "NhwcConv", "RelativePositionBias", "BiasSplitGelu"})


NATIVE_MAX_HEAD_DIM = 128
"""Of PackedAttention in our CUDA library (MAX_HEAD_DIM of runtimes/native/cuda; a test holds the two together)."""


def half_kernels(precision: Precision, native: frozenset[str]) -> HalfKernels:
    """`native`: forms of ours that the target's library has a kernel for in either half type.

    Softmax and LayerNormalization of half operands add up in FP32 here; SkipLayerNormalization does in its strict mode,
    which the recipe asks for.
    """
    lacking = NO_BF16 if precision is Precision.BF16 else NO_FP16

    def lacks(node: ir.Node) -> bool:
        if node.domain == "com.microsoft":
            return precision is Precision.BF16 and node.op_type in NO_BF16_CONTRIB
        return node.domain == "" and node.op_type in lacking

    return HalfKernels(statistics=STATISTICS, own=native, lacks=lacks)
