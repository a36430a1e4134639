"""Swin-T's largest layer on a real GPU: many blocks at once, several samples to a block, and again on what a run left.

The numbers of every form and size run on a real GPU through test_packed_attention.py and test_gate_and_pool.py, by the
same mark. How to have both on a bare machine stands in bench/cuda_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attn_deploy.ops import FORMS
from attn_deploy.runtimes.native import cuda

pytestmark = pytest.mark.gpu

FORM = "PackedAttentionIndexedBias"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_swin_stage_one_at_batch_32(
    make_model: Callable[..., bytes],
    open_model: Callable[..., Any],
    round_to: Callable[[np.ndarray, str], np.ndarray],
    dtype: str,
) -> None:
    rng = np.random.default_rng(0)
    index = np.roll(np.arange(3136).reshape(56, 56), (-3, -3), (0, 1)).reshape(8, 7, 8, 7).transpose(0, 2, 1, 3)
    feeds = {
        "qkv": round_to(2 * rng.standard_normal((32, 3136, 3, 3, 32)), dtype),
        "index": index.reshape(64, 49),
        "windows_bias": round_to(rng.standard_normal((4, 3, 49, 49)), dtype),
        "bias_index": rng.integers(0, 4, 64),
    }
    attributes = {"scale": 32**-0.5, "tokens": 3136}
    constants = {"index": feeds["index"], "bias_index": feeds["bias_index"]}
    library = cuda.library_path()
    assert library is not None
    session = open_model(make_model(FORM, dtype, attributes, constants=constants), library, "CUDAExecutionProvider")
    given = {name: value for name, value in feeds.items() if name not in constants}
    first, second = session.run(None, given)[0], session.run(None, given)[0]
    np.testing.assert_array_equal(first, second)
    rounding = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for sample in (0, 17, 31):
        (expected,) = FORMS[FORM].reference(feeds["qkv"][sample : sample + 1], *list(feeds.values())[1:], **attributes)
        allowed = np.abs(feeds["qkv"]).max() * (2 * rounding + 2.0**-18)
        assert np.abs(first[sample] - expected[0]).max() <= allowed
