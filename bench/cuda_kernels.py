"""Our windowed attention on a GPU against the decomposed graph and PyTorch, FP16: `python bench/cuda_kernels.py`.

Needs an NVIDIA GPU, onnxruntime-gpu and our CUDA library; PyTorch with CUDA is measured where it is installed. On a
bare machine with CUDA 13, Python 3.12 and the carried wheel of onnxruntime-gpu:

    python3 -m pip install --no-index --no-deps --target /tmp/site .whl/onnxruntime_gpu-*.whl
    export PYTHONPATH=/tmp/site:/tmp/package    # attn_deploy/, export/ as attn_deploy/export, runtimes/ likewise
    python3 -m attn_deploy.runtimes.native.cuda.build --architectures 90 && python3 bench/cuda_kernels.py

Every way computes the same layer: packed query, key and value of Swin-T's stages to the layer's output, shift and
partition included. `ours` is PackedAttentionIndexedBias through the library; `decomposed` is the same node without the
library, its ONNX body of Gather, MatMul, Add, Softmax, MatMul and Gather on ONNX Runtime's CUDA provider; `torch` is
index, scaled_dot_product_attention with the bias and index. Inputs and outputs stay on the GPU (IO binding); the two
sessions run by turns, so that a clock that drifts does so for both; times are of whole calls, on CUDA events for torch
and on the host around a synchronized run for ONNX Runtime. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from attn_deploy import runtimes
from attn_deploy.ops import DOMAIN, FORMS, VERSION
from attn_deploy.runtimes.native import cuda
from attn_deploy.target import Target

FORM = "PackedAttentionIndexedBias"
HEAD_DIM = 32


@dataclass(frozen=True)
class Stage:
    """A layer of Swin-T (Liu et al. 2021, table 7) at 224 x 224: a square map in windows of 7 x 7, shifted or not."""

    name: str
    side: int
    heads: int
    shift: int
    window: int = 7

    def index(self) -> np.ndarray:
        """[windows, length]: the tokens of each window of the map rolled by the shift."""
        rolled = np.roll(np.arange(self.side**2).reshape(self.side, self.side), (-self.shift, -self.shift), (0, 1))
        across = self.side // self.window
        parts = rolled.reshape(across, self.window, across, self.window).transpose(0, 2, 1, 3)
        return parts.reshape(across**2, self.window**2).copy()


STAGES = (
    Stage("stage1", 56, 3, 0),
    Stage("stage1-shifted", 56, 3, 3),
    Stage("stage2", 28, 6, 3),
    Stage("stage3", 14, 12, 3),
    Stage("stage4", 7, 24, 0),
)


def constants(stage: Stage) -> dict[str, np.ndarray]:
    """Index map, and biases as a shifted layer has them: 4 distinct ones, most windows with the first."""
    rng = np.random.default_rng(0)
    index = stage.index()
    items = 4 if stage.shift else 1
    which = np.zeros(len(index), np.int64)
    which[-items:] = np.arange(items)
    length = index.shape[1]
    bias = rng.standard_normal((items, stage.heads, length, length)).astype(np.float16)
    return {"index": index, "windows_bias": bias, "bias_index": which}


def layer_model(stage: Stage, batch: int, *, with_body: bool) -> bytes:
    made = constants(stage)
    tokens, half = stage.side**2, onnx.TensorProto.FLOAT16
    shape = [batch, tokens, 3, stage.heads, HEAD_DIM]
    attributes = {"scale": HEAD_DIM**-0.5, "tokens": tokens}
    node = onnx.helper.make_node(FORM, ["qkv", *made], ["output"], domain=DOMAIN, name="attention", **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "layer",
            [onnx.helper.make_tensor_value_info("qkv", half, shape)],
            [onnx.helper.make_tensor_value_info("output", half, [batch, tokens, stage.heads * HEAD_DIM])],
            [onnx.numpy_helper.from_array(value, name) for name, value in made.items()],
        ),
        functions=[half_body(FORMS[FORM].function_text())] if with_body else [],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def half_body(text: str) -> onnx.FunctionProto:
    """The body with its one float32 constant, the scale, cast to float16."""
    scale = "scale_value = Constant <value_float: float = @scale> ()"
    assert text.count(scale) == 1
    cast = "scale_float = Constant <value_float: float = @scale> ()\n  scale_value = Cast <to: int = 10> (scale_float)"
    return onnx.parser.parse_function(text.replace(scale, cast))


def bound_session(model: bytes, qkv: np.ndarray, library: bool) -> tuple[Callable[[], None], Callable[[], np.ndarray]]:
    """A call that runs the layer and waits for it, and one that fetches its output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(cuda.library_path()))
    session = onnxruntime.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("qkv", onnxruntime.OrtValue.ortvalue_from_numpy(qkv, "cuda", 0))
    binding.bind_output("output", "cuda", 0)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run, lambda: binding.copy_outputs_to_cpu()[0]


def by_turns(runs: dict[str, Callable[[], None]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds per call of each, a value for each round; the ways take turns round by round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(20):
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return times


def torch_run(stage: Stage, qkv: np.ndarray) -> tuple[Callable[[], None], Callable[[], np.ndarray]] | None:
    """The layer in PyTorch, None where there is no PyTorch with CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    made = {name: torch.from_numpy(value).cuda() for name, value in constants(stage).items()}
    packed = torch.from_numpy(qkv).cuda()
    inverse = torch.argsort(made["index"].reshape(-1))
    bias = made["windows_bias"][made["bias_index"]]
    result = [packed]

    def run() -> None:
        windows = packed[:, made["index"]]  # [batch, windows, length, 3, heads, head_dim]
        query, key, value = windows.permute(3, 0, 1, 4, 2, 5)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        result[0] = out.transpose(2, 3).reshape(len(packed), len(inverse), -1)[:, inverse]
        torch.cuda.synchronize()

    return run, lambda: result[0].cpu().numpy()


def measure(stage: Stage, batch: int, rounds: int, calls: int) -> dict[str, object]:
    rng = np.random.default_rng(1)
    qkv = rng.standard_normal((batch, stage.side**2, 3, stage.heads, HEAD_DIM)).astype(np.float16)
    ways = {
        "ours": bound_session(layer_model(stage, batch, with_body=False), qkv, library=True),
        "decomposed": bound_session(layer_model(stage, batch, with_body=True), qkv, library=False),
    }
    in_torch = torch_run(stage, qkv)
    if in_torch is not None:
        ways["torch"] = in_torch
    times = by_turns({name: run for name, (run, _) in ways.items()}, rounds, calls)
    made = constants(stage)
    (expected,) = FORMS[FORM].reference(qkv[:1], *made.values(), scale=HEAD_DIM**-0.5, tokens=stage.side**2)
    errors = {name: float(np.abs(fetch()[:1] - expected).max()) for name, (_, fetch) in ways.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "case": stage.name,
        "batch": batch,
        "median_us": {name: round(value, 2) for name, value in medians.items()},
        "spread_us": {name: [round(min(v), 2), round(max(v), 2)] for name, v in times.items()},
        "speedup": {name: round(value / medians["ours"], 2) for name, value in medians.items() if name != "ours"},
        "largest_error": {name: round(error, 6) for name, error in errors.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Windowed attention on a GPU: ours, decomposed, PyTorch.")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=50)
    arguments = parser.parse_args()
    reason = runtimes.availability(Target.ONNXRUNTIME_CUDA)
    if reason is not None:
        print(f"skipped: {reason}")
        return 0
    status = cuda.status()
    if not status.available:
        print(f"the CUDA library is missing: {status.reason}", file=sys.stderr)
        return 6
    print(json.dumps({"onnxruntime": onnxruntime.__version__, "library": status.architectures}))
    for stage in STAGES:
        for batch in arguments.batch:
            print(json.dumps(measure(stage, batch, arguments.rounds, arguments.calls)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
