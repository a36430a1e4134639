"""The attention kernels against ONNX Runtime's own operators, PyTorch's, and the machine's ceiling.

    python bench/attention_kernels.py [--threads 1 2] [--cases vit_small ...] [--library FILE]

Each case is one node. With the library its kernel runs; without it ONNX Runtime takes the node's function body and
optimizes that. Where the form has no more than query, key and value, torch's scaled_dot_product_attention joins, on
[batch, heads, tokens, head_dim] as it likes them best. All take turns in one process, with pauses in which the other's
threads stop spinning (attn_deploy/latency.py); a ratio is the median over rounds. The ceiling is what fused
multiply-adds on registers reach on as many threads (bench/peak.cc), the better of before and after a case. Prints a
table and writes bench/results/attention_kernels.json.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import torch
from kernel_cases import opened, run_cases, side
from roofline import ceiling_gflops

from attn_deploy.latency import System, measure
from attn_deploy.ops import DOMAIN, FORMS, VERSION

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """`windows`: on a side of a square map of windows of 7 x 7; 0: all tokens see each other."""

    name: str
    form: str
    tokens: int
    heads: int
    head_dim: int
    windows: int = 0

    @property
    def flops(self) -> int:
        seen = 49 if self.windows else self.tokens
        return 4 * self.tokens * seen * self.heads * self.head_dim


CASES = (
    Case("vit_small", "PackedAttention", 197, 6, 64),
    Case("vit_tiny", "PackedAttention", 197, 3, 64),
    Case("swin_tiny.1", "PackedAttentionIndexedBias", 3136, 3, 32, windows=8),
    Case("swin_tiny.2", "PackedAttentionIndexedBias", 784, 6, 32, windows=4),
    Case("swin_tiny.3", "PackedAttentionIndexedBias", 196, 12, 32, windows=2),
    Case("swin_tiny.4", "PackedAttentionIndexedBias", 49, 24, 32, windows=1),
    Case("bert_base.128", "AttentionMask", 128, 12, 64),
    Case("4096_tokens", "Attention", 4096, 8, 64),
)


def main() -> None:
    run_cases("attention_kernels", __doc__, CASES, measured, line)


def measured(case: Case, threads: int, seconds: float, library: Path) -> dict[str, Any]:
    feeds, constants = arrays_of(case)
    model = one_node(case, feeds, constants)
    ours, stock = (opened(model, threads, file) for file in (library, None))
    np.testing.assert_allclose(ours.run(None, feeds)[0], stock.run(None, feeds)[0], rtol=0, atol=1e-5)
    systems = [System("ours", lambda: ours.run(None, feeds)), System("onnxruntime", lambda: stock.run(None, feeds))]
    if case.form == "Attention":
        systems.append(System("torch", torch_call(case, feeds, threads)))
    before = ceiling_gflops(threads)
    measurement = measure(systems, max_total_s=seconds)
    ceiling = max(before or 0.0, ceiling_gflops(threads) or 0.0) or None
    row: dict[str, Any] = {"case": case.name, "form": case.form, "threads": threads, "ceiling_gflops": ceiling}
    for name, samples in measurement.samples_ms.items():
        row[name] = side(samples, case.flops, ceiling)
        if name != "ours":
            compared = measurement.compare("ours", name)
            row[name] |= {"ratio": compared.ratio, "ratio_ci95": compared.ratio_ci95}
    return row


def line(row: dict[str, Any]) -> str:
    text = f"{row['threads']} {row['case']:14}"
    for name in ("ours", "onnxruntime", "torch"):
        if name in row:
            text += f"  {name} {row[name]['p50_ms'] * 1e3:9.1f} us {row[name]['share'] or 0:4.0%}"
        if "ratio" in row.get(name, {}):
            low, high = row[name]["ratio_ci95"]
            text += f" {row[name]['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return text


def arrays_of(case: Case) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the node is fed, and what stands in the model."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    if not case.form.startswith("Packed"):
        feeds = {name: normal(1, case.tokens, case.heads, case.head_dim) for name in ("query", "key", "value")}
        if case.form == "AttentionMask":
            feeds["mask"] = np.arange(case.tokens)[None, None, None, :] < case.tokens - 28  # a sentence padded
        return feeds, {}
    feeds = {"qkv": normal(1, case.tokens, 3, case.heads, case.head_dim)}
    if not case.windows:
        return feeds, {}
    side = 7 * case.windows
    numbers = np.arange(side * side).reshape(case.windows, 7, case.windows, 7)
    constants = {
        "index": numbers.transpose(0, 2, 1, 3).reshape(-1, 49),
        "windows_bias": normal(1, case.heads, 49, 49),
        "bias_index": np.zeros(case.windows**2, np.int64),
    }
    return feeds, constants


def one_node(case: Case, feeds: dict[str, Array], constants: dict[str, Array]) -> bytes:
    form = FORMS[case.form]
    attributes: dict[str, float | int] = {"scale": case.head_dim**-0.5}
    if "tokens" in form.attributes:
        attributes["tokens"] = case.tokens
    inputs = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)
    node = onnx.helper.make_node(case.form, [i.name for i in form.inputs], ["output"], domain=DOMAIN, **attributes)
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", inputs, [output], initializers),
        functions=[onnx.parser.parse_function(form.function_text())],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def torch_call(case: Case, feeds: dict[str, Array], threads: int) -> Callable[[], object]:
    torch.set_num_threads(threads)
    query, key, value = (torch.from_numpy(feeds[name]).transpose(1, 2).contiguous() for name in feeds)

    def call() -> object:
        with torch.inference_mode():
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=case.head_dim**-0.5)

    return call


if __name__ == "__main__":
    main()
