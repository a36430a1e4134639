"""The blocked layout in every release of ONNX Runtime that it is used with, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attn_deploy.runtimes.onnxruntime_blocked import TESTED

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

import blocked_models
import native_build
from test_releases import install

SCRIPT = Path(__file__).with_name("run_blocked_on_release.py")
EXPECTED = {
    "se_resnet": "BlockedPointwiseOutputGateResidualRelu", "eca_resnet": "BlockedEca",
    "efficientnet": "BlockedExpandDepthwisePoolSilu", "hardswish": "BlockedExpandDepthwisePoolHardswish",
    "mobilenetv3": "BlockedExciteReluHardSigmoid",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("release", TESTED)
def test_a_release_that_is_used_rewrites_and_computes_the_same(release: str, tmp_path: Path) -> None:
    if not native_build.can_build():
        pytest.skip("no cmake and c++ to build the native library")
    models = {
        "se_resnet": blocked_models.residual_block("se"), "eca_resnet": blocked_models.residual_block("eca"),
        "efficientnet": blocked_models.bottlenecks("Silu"), "hardswish": blocked_models.bottlenecks("HardSwish"),
        "mobilenetv3": blocked_models.hard_gates(),
    }  # fmt: skip
    for name, content in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    library = native_build.library_in(native_build.build("release")).parent
    paths = [str(Path(p).resolve()) for p in sys.path if p]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(library), *(str(tmp_path / f"{name}.onnx") for name in models)],
        env={
            **os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join([str(install(release)), *paths]),
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    version, *rows = done.stdout.splitlines()
    assert version == release
    for (name, operator), row in zip(EXPECTED.items(), rows, strict=True):
        reason, operators = json.loads(row)
        assert reason is None, name
        assert operator in operators, (name, operators)
