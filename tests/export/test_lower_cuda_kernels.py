"""Which kernel the real onnxruntime-gpu takes for each lowered form: asked of itself, upon stand-ins for the GPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import onnx_ir as ir
import pytest

from attn_deploy.export.functions import inline_functions
from attn_deploy.export.lower.cuda_attention import fuse_attention
from attn_deploy.export.lower.cuda_kernels import half_kernels
from attn_deploy.export.lower.cuda_operator import Operator
from attn_deploy.export.precision.half import to_half
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parents[1] / "runtimes"))  # for cuda_stand_ins
sys.path.insert(0, str(Path(__file__).parent))  # for cuda_forms

import cuda_stand_ins
from cuda_forms import STANDARD, Sizes, case, model_of

pytestmark = pytest.mark.skipif(cuda_stand_ins.missing() is not None, reason=str(cuda_stand_ins.missing()))

FLASH, EFFICIENT, CUDNN, UNFUSED = "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_FLASH_ATTENTION", "MATH"

SIZES = Sizes(query_len=197, key_len=197, head_dim=64, length=49)
"""Lengths that are no multiple of anything: ViT's, and a 7 x 7 window's."""

STANDARD_KERNELS = {
    "Attention": (EFFICIENT, FLASH),
    "AttentionCausal": (EFFICIENT, FLASH),
    "AttentionGroupedCausal": (UNFUSED, FLASH),
    "AttentionSoftcap": (EFFICIENT, FLASH),
    "AttentionBias": (EFFICIENT, EFFICIENT),
    "AttentionMask": (EFFICIENT, EFFICIENT),
    "AttentionCausalBias": (EFFICIENT, EFFICIENT),
    "AttentionGroupedCausalMask": (UNFUSED, EFFICIENT),
    "PackedAttention": (EFFICIENT, FLASH),
    "PackedAttentionIndexed": (EFFICIENT, FLASH),
    "PackedAttentionIndexedBias": (EFFICIENT, EFFICIENT),
    "PackedAttentionIndexedPaddedCosineBias": (EFFICIENT, EFFICIENT),
}
"""Form -> the kernel in FP32, and in FP16 and BF16."""

MULTIHEAD = ("Attention", "AttentionCausal", "AttentionBias", "AttentionMask", "PackedAttentionIndexedBias")


def lowered(name: str, precision: Precision, preferred: Operator) -> ir.Model:
    model = model_of(case(name, SIZES, constants="bias windows_bias fill"), STANDARD)
    assert fuse_attention(model, preferred=preferred) == ()
    inline_functions(model)
    if precision is not Precision.FP32:
        to_half(model, precision, {}, kernels=half_kernels(precision, frozenset()))
    return model


def kernels(models: dict[str, ir.Model], folder: Path) -> dict[str, tuple[str, str]]:
    """Key -> (data type, kernel) of the one attention of each model."""
    for key, model in models.items():
        for node in model.graph:
            if node.op_type in ("Attention", "MultiHeadAttention"):
                node.name = key
        ir.save(model, folder / f"{key}.onnx")
    done = cuda_stand_ins.run_python(
        Path(__file__).with_name("attention_kernels.py"), *(folder / f"{key}.onnx" for key in models)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = re.findall(r"Node=(\S+) DataType=(\w+) SdpaKernel=(\w+)", done.stdout)
    return {key: (kind, kernel) for key, kind, kernel in told}


def test_every_form_takes_the_kernel_that_the_table_says(tmp_path: Path) -> None:
    expected = {
        f"{name}-{precision}": (str(precision), found[precision is not Precision.FP32])
        for name, found in STANDARD_KERNELS.items()
        for precision in (Precision.FP32, Precision.FP16, Precision.BF16)
    }
    models = {key: lowered(key.split("-")[0], Precision(key.split("-")[1]), "Attention") for key in expected}
    assert kernels(models, tmp_path) == expected


def test_the_other_operator_takes_cudnns_with_and_without_a_bias(tmp_path: Path) -> None:
    expected = {f"{name}-{p}": (str(p), CUDNN) for name in MULTIHEAD for p in (Precision.FP16, Precision.BF16)}
    models = {key: lowered(key.split("-")[0], Precision(key.split("-")[1]), "MultiHeadAttention") for key in expected}
    assert kernels(models, tmp_path) == expected
