"""On an NVIDIA GPU: our lowering against its peers, in interleaved runs, and where the time goes.

    make bench-gpu        (or: python bench/gpu.py [--models vit swin ...] [--batches 1 32])

For ViT-B/16, Swin-T, SE-ResNet50 and BERT-base in FP16: the export's own proof (parity, 45 dB or more), then latency
with everything resident on the GPU against eager PyTorch, torch.compile max-autotune, plain ONNX Runtime CUDA and,
where it is installed, TensorRT of the plain ONNX, at batches 1, 8, 32 and 128; the sum of the kernels' times of one
call by CUPTI (through torch.profiler), against the latency with CUDA graphs. Skips with the reason without a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import BUILD, save

import attn_deploy
from attn_deploy import runtimes
from attn_deploy.bundle import open_bundle
from attn_deploy.inputs import make_feeds
from attn_deploy.target import Target

MODELS = {
    "vit": "torchvision:vit_b_16",
    "swin": "torchvision:swin_t",
    "seresnet": "timm:seresnet50",
    "bert": f"hf:{Path(__file__).parent / 'configs' / 'bert_base'}",
}
BATCHES = (1, 8, 32, 128)
PROFILED_CALLS = 20


def main() -> int:
    arguments = parse()
    target = Target(arguments.target)
    reason = runtimes.availability(target)
    if reason is not None:
        print(f"skipped: {target} cannot run here: {reason}")
        return 0
    result: dict[str, Any] = {"command": " ".join(sys.argv), "target": str(target), "models": {}}
    for name in arguments.models:
        started = time.time()
        bundle = export(name, target, arguments.precision)
        found = measure(bundle, target, arguments)
        found["seconds"] = time.time() - started
        result["models"][name] = found
        save(f"gpu_{target}_{arguments.precision}", result)  # after each: a lease may end at any time
        print(name, *(summary(row) for row in found["rows"]), sep="\n  ", flush=True)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--target", default="onnxruntime-cuda", choices=["onnxruntime-cuda", "tensorrt"])
    parser.add_argument("--precision", default="fp16", choices=["fp32", "fp16", "bf16", "int8"])
    parser.add_argument("--against", default="eager,compile,onnxruntime,tensorrt")
    parser.add_argument("--seconds", type=float, default=10.0, help="time budget of each batch size")
    return parser.parse_args()


def export(name: str, target: Target, precision: str) -> Path:
    """The bundle of one model, proven on this GPU."""
    from attn_deploy.target import Precision

    out = BUILD / f"{name}-{target}-{precision}.attn"
    options = attn_deploy.ExportOptions(
        source=MODELS[name], weights="init:0", targets=(target,), precisions=(Precision(precision),),
        precisions_asked=True, force=True,
    )  # fmt: skip
    return attn_deploy.export_model(out, options).path


def measure(bundle: Path, target: Target, arguments: argparse.Namespace) -> dict[str, Any]:
    receipt = open_bundle(bundle).receipt()
    benched = attn_deploy.benchmark(
        [str(bundle)], against=arguments.against.split(","), batches=arguments.batches, target=str(target),
        seconds=arguments.seconds, copies=False,
    )  # fmt: skip
    kernels = {batch: kernel_sum_ms(bundle, target, batch) for batch in arguments.batches}
    return {
        "candidates": [
            {"id": c.id, "status": c.status, "reason": c.reason, "sqnr_db": c.parity.sqnr_db if c.parity else None,
             "sites": msgspec.to_builtins(c.sites), "dtype_share": c.weighted_dtype_share,
             "latency": msgspec.to_builtins(c.latency)}
            for c in receipt.candidates
        ],
        "chosen": receipt.chosen,
        "rows": msgspec.to_builtins(benched.rows),
        "kernel_sum_ms": kernels,
        "host": benched.host,
        "versions": benched.versions,
        "warnings": benched.warnings,
    }  # fmt: skip


def kernel_sum_ms(bundle: Path, target: Target, batch: int) -> float | None:
    """Sum of the durations of all kernels of one call, the median over calls, by CUPTI; None without torch for it."""
    import torch

    with attn_deploy.load(bundle, target=str(target)) as session:
        feeds = make_feeds(session.manifest.graphs[session.graph].examples, batch=batch, seed=31)
        tensors = {name: torch.from_numpy(array).cuda() for name, array in feeds.items()}
        for _ in range(3):
            session.run_device(tensors)
        torch.cuda.synchronize()
        sums = []
        for _ in range(PROFILED_CALLS):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                session.run_device(tensors)
                torch.cuda.synchronize()
            events = [e for e in profile.events() if e.device_type.name == "CUDA"]
            sums.append(sum(e.device_time_total for e in events) / 1e3)
    return float(np.median(sums)) if sums else None


def summary(row: dict[str, Any]) -> str:
    device = row.get("device")
    on_device = f", {device['p50_ms']:.3f} ms by events" if device else ""
    against = f", {row['ratio']:.2f}x ({row['verdict']})" if row["ratio"] else ""
    return f"batch {row['latency']['batch']}: {row['system']}: {row['latency']['p50_ms']:.3f} ms{on_device}{against}"


if __name__ == "__main__":
    sys.exit(main())
