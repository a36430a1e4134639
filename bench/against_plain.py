"""The chosen candidate of each model against plain ONNX Runtime and eager PyTorch, in one interleaved run each.

Weights do not change the time, so all but ViT-Tiny come from the project's initializer. Goal: never slower than plain
ONNX Runtime by more than the noise of the run. Precisions are the defaults: INT8 that misses parity on made inputs is a
row of the receipt, and FP32 is measured.
"""

from __future__ import annotations

import msgspec
from common import BUILD, demo_bundle, export, save, vit_bundle

import attn_deploy

MODELS = (
    "timm:seresnet50", "timm:mobilenetv3_small_100", "timm:efficientnet_b0", "timm:swin_tiny_patch4_window7_224",
)  # fmt: skip


def main() -> None:
    bundles = [demo_bundle(), vit_bundle()]
    bundles += [export([model], BUILD / f"{model.split(':')[1]}.attn") for model in MODELS]
    rows = []
    for bundle in bundles:
        if bundle is None:
            continue
        result = attn_deploy.benchmark([str(bundle)], against=("onnxruntime", "eager"), seconds=30.0)
        for row in result.rows:
            rows.append({**msgspec.to_builtins(row), "variant": result.rows[0].system})
            print(row.item, row.system, f"{row.latency.p50_ms:.2f} ms", row.ratio, row.verdict, flush=True)
    save("against_plain", {"host": result.host, "versions": result.versions, "threads": "all cores", "rows": rows})


if __name__ == "__main__":
    main()
