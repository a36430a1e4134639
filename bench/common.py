"""What every benchmark shares: where results go, what they say of the host, and the bundles they run on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
BUILD = ROOT / "build" / "bench"
HELD_OUT = ROOT / "attn_deploy" / "demo" / "held_out.npz"


def data_folder() -> Path | None:
    """The real weights and images, where they are at hand."""
    folder = os.environ.get("ATTN_DEPLOY_DATA")
    return Path(folder) if folder else None


def export(arguments: list[str], out: Path) -> Path:
    """Exports by the command line when `out` is not there yet; networks of this folder are found as sources."""
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "attn_deploy.cli", "export", *arguments, "--out", str(out), "--json"]
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path})
    return out


def demo_bundle() -> Path:
    return export(["demo", "--data", str(HELD_OUT)], BUILD / "demo.attn")


def vit_arguments(data: Path) -> list[str]:
    """The export that the README shows: ViT-Tiny with its real weights, judged on real photographs."""
    return [
        "timm:vit_tiny_patch16_224", "--weights", str(data / "vit_tiny_patch16_224.safetensors"),
        "--data", str(data / "imagenet_compatible_500"), "--precision", "fp32", "--precision", "int8",
    ]  # fmt: skip


def vit_bundle() -> Path | None:
    """None, said, without the data."""
    data = data_folder()
    if data is None:
        print("skipped: ATTN_DEPLOY_DATA is not set")
        return None
    return export(vit_arguments(data), BUILD / "vit.attn")


def save(name: str, result: dict[str, Any]) -> None:
    """Prints a result and writes it with the command, the time and the load it was taken under."""
    load = os.getloadavg()
    stamped = {
        "command": f"python bench/{name}.py",
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "load_average_after": [round(x, 2) for x in load],
        **result,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stamped, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
