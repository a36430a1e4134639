"""The Linear and FeedForward kernels against ONNX Runtime's own operators, and against the machine's ceiling.

    python bench/linear_kernels.py [--threads 1 2] [--cases vit_small/qkv ...] [--library FILE]

Each case is one node. With the library its kernel runs; without it ONNX Runtime takes the node's function body and
optimizes that, so that LayerNormalization, Gemm or MatMul, Gelu and Add run in its own kernels. Both sessions take
turns in one process, with pauses in which the other's threads stop spinning (attn_deploy/latency.py); the ratio is the
median over rounds. The ceiling is what fused multiply-adds on registers reach on as many threads (bench/peak.cc), the
better of before and after a case. Prints a table and writes bench/results/linear_kernels.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from kernel_cases import opened, run_cases, side
from roofline import ceiling_gflops

from attn_deploy.latency import System, measure
from attn_deploy.ops import BLOCK_FORMS, DOMAIN, VERSION

Array = np.ndarray


@dataclass(frozen=True)
class Case:
    """`outputs`: the hidden layer's width for FeedForward."""

    name: str
    form: str
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs * (2 if self.form.startswith("FeedForward") else 1)


CASES = (
    Case("vit_small/gemm", "Linear", 197, 384, 1152),
    Case("vit_small/qkv", "NormLinear", 197, 384, 1152),
    Case("vit_small/out", "LinearResidual", 197, 384, 384),
    Case("vit_small/fc1", "NormLinearGelu", 197, 384, 1536),
    Case("vit_small/fc2", "LinearResidual", 197, 1536, 384),
    Case("vit_small/feed_forward", "FeedForwardGelu", 197, 384, 1536),
    Case("vit_tiny/qkv", "NormLinear", 197, 192, 576),
    Case("vit_tiny/feed_forward", "FeedForwardGelu", 197, 192, 768),
    Case("swin_tiny.1/qkv", "NormLinear", 3136, 96, 288),
    Case("swin_tiny.1/feed_forward", "FeedForwardGelu", 3136, 96, 384),
    Case("swin_tiny.2/fc1", "NormLinearGelu", 784, 192, 768),
    Case("swin_tiny.2/feed_forward", "FeedForwardGelu", 784, 192, 768),
    Case("swin_tiny.4/qkv", "NormLinear", 49, 768, 2304),
    Case("swin_tiny.4/feed_forward", "FeedForwardGelu", 49, 768, 3072),
    Case("head", "Linear", 1, 768, 1000),
)


def main() -> None:
    run_cases("linear_kernels", __doc__, CASES, measured, line)


def measured(case: Case, threads: int, seconds: float, library: Path) -> dict[str, Any]:
    model, feeds = one_node(case)
    ours, stock = (opened(model, threads, file) for file in (library, None))
    np.testing.assert_allclose(ours.run(None, feeds)[0], stock.run(None, feeds)[0], rtol=0, atol=1e-4)
    before = ceiling_gflops(threads)
    systems = [System("ours", lambda: ours.run(None, feeds)), System("onnxruntime", lambda: stock.run(None, feeds))]
    measurement = measure(systems, max_total_s=seconds)
    ceiling = max(before or 0.0, ceiling_gflops(threads) or 0.0) or None
    compared = measurement.compare("ours", "onnxruntime")
    row: dict[str, Any] = {"case": case.name, "form": case.form, "shape": [case.rows, case.inputs, case.outputs]}
    row |= {"threads": threads, "ceiling_gflops": ceiling, "ratio": compared.ratio, "ratio_ci95": compared.ratio_ci95}
    for name, samples in measurement.samples_ms.items():
        row[name] = side(samples, case.flops, ceiling)
    return row


def line(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row["shape"]))
    sides = "  ".join(
        f"{row[name]['p50_ms'] * 1e3:8.1f} us {row[name]['share'] or 0:4.0%}" for name in ("ours", "onnxruntime")
    )
    low, high = row["ratio_ci95"]
    return f"{row['threads']} {row['case']:26} {shape:14} {sides}  {row['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def one_node(case: Case) -> tuple[bytes, dict[str, Array]]:
    """A model of the one node, weights as initializers and its body beside it, and what it is fed."""
    form = BLOCK_FORMS[case.form]
    shapes = {
        "x": (case.rows, case.inputs), "residual": (case.rows, case.outputs),
        "norm_scale": (case.inputs,), "norm_bias": (case.inputs,),
        "weight": (case.inputs, case.outputs), "bias": (case.outputs,),
        "weight1": (case.inputs, case.outputs), "bias1": (case.outputs,),
        "weight2": (case.outputs, case.inputs), "bias2": (case.inputs,),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {i.name: (0.1 * rng.standard_normal(shapes[i.name])).astype(np.float32) for i in form.inputs}
    fed: dict[str, Array] = {name: arrays.pop(name) for name in ("x", "residual") if name in arrays}
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in fed.items()]
    output = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)
    epsilon = {"epsilon": 1e-6} if "epsilon" in form.attributes else {}
    node = onnx.helper.make_node(case.form, [i.name for i in form.inputs], ["output"], domain=DOMAIN, **epsilon)
    weights = [onnx.numpy_helper.from_array(v, name) for name, v in arrays.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", info, [output], weights),
        functions=[onnx.parser.parse_function(form.function_text())],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return bytes(model.SerializeToString()), fed


if __name__ == "__main__":
    main()
