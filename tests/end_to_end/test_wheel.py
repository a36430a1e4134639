"""The wheel alone, in a fresh environment without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attn_deploy
import attn_deploy.demo as demo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

RUN = """
import importlib.util, json, sys
import numpy as np
import attn_deploy
with attn_deploy.load(sys.argv[1], threads=1) as session:
    scores = session(np.load(sys.argv[2])["image"][:5])
    label = session.classify(sys.argv[3])[0][0].label
absent = [p for p in ("torch", "onnx", "onnx_ir", "timm") if importlib.util.find_spec(p) is None]
print(json.dumps({"scores": scores.tolist(), "label": label, "absent": absent, "file": attn_deploy.__file__}))
"""


class Environment:
    """A fresh virtual environment with the wheel and ONNX Runtime."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | variables
        wheels = folder / "wheels"
        self.call(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-w", str(wheels))
        (self.wheel,) = wheels.glob("attn_deploy-*.whl")
        self.call(sys.executable, "-m", "venv", str(folder / "venv"))
        self.python = str(folder / "venv" / "bin" / "python")
        self.call(self.python, "-m", "pip", "install", "--quiet", f"{self.wheel}[cpu]")

    def call(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.variables)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def native_kernels(self) -> Any:
        checks = json.loads(self.call(self.python, "-m", "attn_deploy.cli", "doctor", "--json"))["checks"]
        return next(c for c in checks if c["name"] == "native kernels")


def test_the_wheel_alone_runs_a_bundle_with_the_same_numbers_and_without_torch(
    demo_bundle: Path, tmp_path: Path
) -> None:
    fresh = Environment(tmp_path)
    image = demo.SAMPLE_IMAGES / "7_0.png"
    found = json.loads(fresh.call(fresh.python, "-c", RUN, str(demo_bundle), str(demo.HELD_OUT), str(image)))
    assert found["absent"] == ["torch", "onnx", "onnx_ir", "timm"]
    assert found["file"].startswith(str(tmp_path))
    assert found["label"] == "7"
    with np.load(demo.HELD_OUT) as held_out, attn_deploy.load(demo_bundle, threads=1) as session:
        np.testing.assert_allclose(found["scores"], session(held_out["image"][:5]), rtol=1e-5, atol=1e-5)
    assert fresh.native_kernels()["ok"] is True


def test_without_a_working_compiler_the_package_still_installs_and_doctor_says_so(
    demo_bundle: Path, tmp_path: Path
) -> None:
    bare = Environment(tmp_path, CC="/bin/false", CXX="/bin/false")
    check = bare.native_kernels()
    assert check["ok"] is None
    assert "function bodies run instead" in check["found"]
    assert "pip install" in check["next_step"]
    image = demo.SAMPLE_IMAGES / "3_0.png"
    found = json.loads(bare.call(bare.python, "-c", RUN, str(demo_bundle), str(demo.HELD_OUT), str(image)))
    assert found["label"] == "3"
