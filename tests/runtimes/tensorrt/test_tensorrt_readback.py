"""Sites and dtype shares of an engine's layers (tests/runtimes/tensorrt/, once readback.py follows `covers`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for test_tensorrt_inspect

from test_tensorrt_inspect import BLOCK, block, nodes

from attn_deploy.readback import dtype_shares, site_runs

SITE = f"{BLOCK}/Attention"


def test_a_fused_attention_is_the_one_kernel_of_its_site() -> None:
    (run,) = site_runs([("encoder.layers.3", SITE)], nodes(block()))
    assert run.implementation == "trt:gemm_mha_v2"
    assert run.provider == "TensorRT"
    assert run.one_kernel


def test_an_engine_in_fp32_where_fp16_was_asked_has_no_share_of_fp16() -> None:
    assert dtype_shares(nodes(block()), [SITE]) == ({"float16": 1.0}, {"float16": 1.0})
    assert dtype_shares(nodes(block("Float", "f32")), [SITE]) == ({"float32": 1.0}, {"float32": 1.0})
