"""What FP16, BF16, INT8 and FP8 for GPUs cost ViT-Tiny with its trained weights, by the graphs that are lowered for
them, their roundings emulated on the CPU: no GPU is asked, and no time is measured.

    ATTN_DEPLOY_DATA=... python bench/emulated_precision.py

Photographs in the order of numpy's default_rng(0).shuffle: the first 48 calibrate, those from 180 on are judged. The
ones in between were looked at while INT8's choice of ranges was made, so they judge nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from common import data_folder, save

from attn_deploy import runtimes
from attn_deploy.export.capture import capture
from attn_deploy.export.lower import RECIPES
from attn_deploy.export.lower.tensorrt import standard
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import SourceRequest, load_source
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.parity import Moments
from attn_deploy.preprocess import prepare_batch
from attn_deploy.session import Array, DimBounds
from attn_deploy.target import Precision, Target

CALIBRATED, JUDGED_FROM, BATCH = 48, 180, 8
CASES = [
    (Target.ONNXRUNTIME_CUDA, Precision.FP16),
    (Target.ONNXRUNTIME_CUDA, Precision.BF16),
    (Target.TENSORRT, Precision.FP16),
    (Target.TENSORRT, Precision.BF16),
    (Target.TENSORRT, Precision.INT8),
    (Target.TENSORRT, Precision.FP8),
]


def main() -> int:
    data = data_folder()
    if data is None:
        print("skipped: ATTN_DEPLOY_DATA is not set")
        return 0
    weights = str(data / "vit_tiny_patch16_224.safetensors")
    source = load_source("timm:vit_tiny_patch16_224", SourceRequest("", weights, {}, ()))
    assert source.preprocess is not None
    captured = capture(source, {"batch": DimBounds()})
    canonical = to_onnx(rewrite(captured, recognize(captured)), opset=20)
    files = sorted((data / "imagenet_compatible_500").glob("*/*.jpg"))
    np.random.default_rng(0).shuffle(files)  # type: ignore[arg-type]

    def batches(chosen: list[Path]) -> Iterator[tuple[dict[str, Array], list[int]]]:
        for start in range(0, len(chosen), BATCH):
            part = chosen[start : start + BATCH]
            feeds = {source.inputs[0].name: prepare_batch([str(f) for f in part], source.preprocess)}
            yield feeds, [int(f.parent.name) for f in part]

    judged = [(feeds, labels, captured.reference(feeds)) for feeds, labels in batches(files[JUDGED_FROM:])]
    rows = [judge("PyTorch", lambda feeds: captured.reference(feeds), judged)]
    for target, precision in CASES:
        lowered = RECIPES[target].lower(
            canonical, precision, calibration=lambda: (feeds for feeds, _ in batches(files[:CALIBRATED])),
            open_model=open_model,
        )  # fmt: skip
        run = open_model(emulate(standard(lowered.model)))
        rows.append({**judge(f"{target} {precision}", run, judged), "kept_in_float32": list(lowered.notes)})
        rows[-1]["blocks_put_back"] = sum(block.kept for block in lowered.blocks)
    save("emulated_precision", {"calibrated_on": CALIBRATED, "rows": rows})
    return 0


def open_model(model: ir.Model) -> Any:
    return runtimes.open_session(Target.ONNXRUNTIME_CPU, ir.to_proto(model).SerializeToString()).run


def judge(name: str, run: Any, judged: list[tuple[dict[str, Array], list[int], dict[str, Array]]]) -> dict[str, Any]:
    moments, correct, agreed, count = Moments(), 0, 0, 0
    for feeds, labels, expected in judged:
        scores, reference = next(iter(run(feeds).values())), next(iter(expected.values()))
        moments.add(reference, scores)
        correct += int((scores.argmax(1) == np.asarray(labels)).sum())
        agreed += int((scores.argmax(1) == reference.argmax(1)).sum())
        count += len(labels)
    row = {"name": name, "images": count, "top1_percent": 100 * correct / count, "agreement": agreed / count,
           "sqnr_db": moments.fidelity().sqnr_db}  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
