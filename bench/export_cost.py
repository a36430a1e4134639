"""Time and memory of exporting ViT-Tiny in FP32 and INT8 with parity, accuracy on 200 images and latency.

Goals on 2 cores: 3 minutes, 3 GB.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time

from common import BUILD, data_folder, save, vit_arguments


def main() -> None:
    data = data_folder()
    if data is None:
        print("skipped: ATTN_DEPLOY_DATA is not set")
        return
    out = BUILD / "vit.attn"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "attn_deploy.cli", "export", *vit_arguments(data), "--out", str(out), "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took_s = time.perf_counter() - began
    peak_kb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    receipt = json.loads(done.stdout)["receipt"]
    candidates = [
        {
            "id": c["id"], "status": c["status"], "sqnr_db": round(c["parity"]["sqnr_db"], 1),
            "top1_agreement": c["parity"]["top1_agreement"], "top1": c["accuracy"]["value"],
            "reference_top1": c["accuracy"]["reference"], "int8_share": c["weighted_dtype_share"].get("int8", 0.0),
            "p50_ms": round(c["latency"]["p50_ms"], 2), "storage_mb": c["storage_mb"], "peak_mb": c["memory"],
        }
        for c in receipt["candidates"]
    ]  # fmt: skip
    save(
        "export_cost",
        {
            "model": "timm:vit_tiny_patch16_224, real weights, fp32 and int8, 200 judged images",
            "took_s": round(took_s, 1),
            "goal_s": 180,
            "peak_mb": round(peak_kb / 1000, 0),
            "goal_mb": 3000,
            "stages": done.stderr.splitlines(),
            "judged": receipt["data"]["judgement"],
            "candidates": candidates,
            "peers": receipt["peers"],
            "chosen": receipt["chosen"],
        },
    )


if __name__ == "__main__":
    main()
