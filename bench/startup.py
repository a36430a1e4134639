"""Time of `import attn_deploy`, and of loading the ViT-Tiny bundle in a fresh process. Goals: 0.15 s and 0.6 s."""

from __future__ import annotations

import subprocess
import sys

from common import save, vit_bundle

RUNS = 9
IMPORT = "import time; t = time.perf_counter(); import attn_deploy; print(time.perf_counter() - t)"
IMPORT_LOAD = "import time; t = time.perf_counter(); from attn_deploy import load; print(time.perf_counter() - t)"
LOAD = (
    "import sys, time; from attn_deploy import load; t = time.perf_counter(); load(sys.argv[1], threads=2); "
    "print(time.perf_counter() - t); assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
)


def median_s(code: str, *arguments: str) -> float:
    times = []
    for _ in range(RUNS):
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
        times.append(float(done.stdout))
    return round(sorted(times)[RUNS // 2], 4)


def main() -> None:
    result: dict[str, object] = {
        "import_s": median_s(IMPORT),
        "import_goal_s": 0.15,
        "import_with_load_s": median_s(IMPORT_LOAD),
    }
    bundle = vit_bundle()
    if bundle is not None:
        result |= {"load_vit_tiny_s": median_s(LOAD, str(bundle)), "load_goal_s": 0.6}
    save("startup", result)


if __name__ == "__main__":
    main()
