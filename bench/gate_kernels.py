"""Our gates, pools and activations against ONNX Runtime's own nodes, FP32: `python bench/gate_kernels.py`.

Maps are those of EfficientNet-B0, SE-ResNet-50 and MobileNetV3 at 224 x 224. Every case is a graph of one operator of
ours and one of ONNX Runtime's nodes that compute the same, on the same tensors (IO binding: no copies), in turns
(attn_deploy/latency.py). `ratio` is ONNX Runtime's time over ours, the median over rounds with its 95 % bootstrap
interval. `share_of_copy` is the rate at which we move the bytes that the operator has to read and write, over that of
a plain copy of its input by one thread, taken in the same turns: with two threads, or from caches, it may exceed 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from common import save
from onnx.helper import make_node

from attn_deploy import environment
from attn_deploy.latency import System, measure
from attn_deploy.ops import DOMAIN, VERSION
from attn_deploy.runtimes import native

MAPS = ((32, 112), (96, 56), (256, 56), (480, 14), (2048, 7))
"""Channels, height and width."""

CHANNELS = onnx.numpy_helper.from_array(np.array([1]), "channels_axis")

SILU = {"domain": "com.microsoft", "alpha": 1.0}
"""QuickGelu with alpha 1: what ONNX Runtime makes of x * sigmoid(x)."""


@dataclass(frozen=True)
class Case:
    """`moved`: how many tensors of x's size are read and written at the least."""

    operator: str
    stock: Sequence[onnx.NodeProto]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)
    moved: float = 2.0
    blocked: bool = False


CASES = (
    Case("Gate", [make_node("Mul", ["x", "gate"], ["y"])], ("x", "gate")),
    Case(
        "GateSilu",
        [make_node("Mul", ["x", "gate"], ["m"]), make_node("QuickGelu", ["m"], ["y"], **SILU)],
        ("x", "gate"),
    ),
    Case(
        "GateResidualRelu",
        [
            make_node("Mul", ["x", "gate"], ["m"]),
            make_node("Add", ["m", "residual"], ["s"]),
            make_node("Relu", ["s"], ["y"]),
        ],
        ("x", "gate", "residual"),
        moved=3.0,
    ),
    Case("ChannelPoolMean", [make_node("GlobalAveragePool", ["x"], ["y"])], ("x",), moved=1.0),
    Case(
        "ChannelPoolMeanMax",
        [make_node("GlobalAveragePool", ["x"], ["y"]), make_node("GlobalMaxPool", ["x"], ["z"])],
        ("x",),
        ("y", "z"),
        moved=1.0,
    ),
    Case(
        "SpatialPoolMeanMax",
        [
            make_node("ReduceMean", ["x", "channels_axis"], ["a"]),
            make_node("ReduceMax", ["x", "channels_axis"], ["b"]),
            make_node("Concat", ["a", "b"], ["y"], axis=1),
        ],
        ("x",),
        moved=1.0,
    ),
    Case("BlockedActivateSilu", [make_node("QuickGelu", ["x"], ["y"], **SILU)], ("x",), blocked=True),
    Case("BlockedActivateHardswish", [make_node("HardSwish", ["x"], ["y"])], ("x",), blocked=True),
    Case("BlockedPool", [make_node("GlobalAveragePool", ["x"], ["y"])], ("x",), moved=1.0, blocked=True),
)
"""The blocked ones run on x as it is: bytes are bytes, though a pool of them in another order has other values."""


def main() -> int:
    arguments = parse()
    library = arguments.library or native.library_path()
    if library is None:
        print(native.status().reason, file=sys.stderr)
        return 1
    block = 16 if native.library_instruction_set(library).startswith("avx512") else 8
    rows = []
    for case in CASES:
        for channels, side in MAPS if case.operator in arguments.cases else ():
            rows.append(row_of(case, channels, side, block, library, arguments))
            print(rows[-1], flush=True)
    result = {
        "threads": arguments.threads,
        "host": {k: v for k, v in environment.host().items() if v is not None},
        "versions": {"onnxruntime": onnxruntime.__version__},
        "instruction_set": native.library_text(library, "attn_deploy_native_instruction_set"),
        "rows": rows,
    }
    save("gate_kernels", result)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.operator for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="OPERATOR")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--library", type=Path, help="another build")
    return parser.parse_args()


def row_of(
    case: Case, channels: int, side: int, block: int, library: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, channels, side, side), "gate": (1, channels, 1, 1), "residual": (1, channels, side, side)}
    feeds = {name: rng.standard_normal(shapes[name], dtype=np.float32) for name in case.inputs}
    attributes = {"block": block, "channels": channels} if case.blocked else {}
    ours = make_node(case.operator, case.inputs, case.outputs, domain=DOMAIN, name="ours", **attributes)
    x, copied = feeds["x"], np.empty_like(feeds["x"])
    systems = [
        System("ours", call_of([ours], case, feeds, library, arguments.threads)),
        System("onnxruntime", call_of(case.stock, case, feeds, library, arguments.threads)),
        System("copy", lambda: np.copyto(copied, x)),
    ]
    measurement = measure(
        systems, max_total_s=60.0, rounds=arguments.rounds, calls_per_round=30, warmup_s=0.05, pause_s=0.06
    )
    compared = measurement.compare("ours", "onnxruntime")
    micros = {s.name: round(float(np.median(measurement.samples_ms[s.name])) * 1e3, 1) for s in systems}
    copy_rate = 2 * x.nbytes / micros["copy"]
    return {
        "operator": case.operator, "map": f"{channels}x{side}x{side}", "ours_us": micros["ours"],
        "onnxruntime_us": micros["onnxruntime"], "ratio": round(compared.ratio, 2),
        "ratio_ci95": [round(v, 2) for v in compared.ratio_ci95], "verdict": compared.verdict,
        "gigabytes_per_s": round(case.moved * x.nbytes / micros["ours"] / 1e3, 1),
        "share_of_copy": round(case.moved * x.nbytes / micros["ours"] / copy_rate, 2),
    }  # fmt: skip


def call_of(
    nodes: Sequence[onnx.NodeProto], case: Case, feeds: Mapping[str, np.ndarray], library: Path, threads: int
) -> Callable[[], object]:
    """Runs a graph of these nodes on the feeds where they are; outputs stay where they were made first."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "one",
        [value(name, onnx.TensorProto.FLOAT, feed.shape) for name, feed in feeds.items()],
        [value(name, onnx.TensorProto.FLOAT, None) for name in case.outputs],
        [CHANNELS],
    )
    opsets = [("", 20), (DOMAIN, VERSION), ("com.microsoft", 1)]
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(*opset) for opset in opsets], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(os.fspath(library))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, feed in feeds.items():
        binding.bind_cpu_input(name, feed)
    for name, output in zip(case.outputs, session.run(None, dict(feeds)), strict=True):
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.empty_like(output)))
    return lambda: session.run_with_iobinding(binding)


if __name__ == "__main__":
    sys.exit(main())
