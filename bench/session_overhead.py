"""What a call through our session costs more than the bare ONNX Runtime call on the same model. Goal: 30 us at most."""

from __future__ import annotations

import numpy as np
import onnxruntime
from common import demo_bundle, save

import attn_deploy
from attn_deploy.latency import System, measure

GOAL_US = 30.0


def main() -> None:
    bundle = demo_bundle()
    session = attn_deploy.load(bundle, threads=1)
    variant = next(iter(session.manifest.graphs.values())).variants[session.variant]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    if variant.library is not None:
        from attn_deploy.runtimes import native

        options.register_custom_ops_library(str(native.library_path()))
    bare = onnxruntime.InferenceSession(str(bundle / variant.files[0]), options, providers=["CPUExecutionProvider"])
    feeds = {"image": np.zeros((1, 1, 16, 16), np.float32)}
    measured = measure(
        [System("ours", lambda: session.run(feeds)), System("bare", lambda: bare.run(None, feeds))],
        max_total_s=20.0, rounds=40, calls_per_round=200, pause_s=0.01,
    )  # fmt: skip
    per_round = np.median(measured.samples_ms["ours"], axis=1) - np.median(measured.samples_ms["bare"], axis=1)
    save(
        "session_overhead",
        {
            "model": f"demo, {session.variant}, batch 1, 1 thread",
            "bare_p50_us": round(float(np.median(measured.samples_ms["bare"])) * 1000, 2),
            "ours_p50_us": round(float(np.median(measured.samples_ms["ours"])) * 1000, 2),
            "overhead_us": round(float(np.median(per_round)) * 1000, 2),
            "goal_us": GOAL_US,
        },
    )


if __name__ == "__main__":
    main()
