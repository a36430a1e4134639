"""ATTN_DEPLOY_NATIVE_ISA, each time in a process of its own, since the library reads it once: which kernels run, and
what is said where none do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attn_deploy.doctor import kernels_check
from attn_deploy.runtimes.native import NativeStatus

SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
from attn_deploy.doctor import kernels_check
from attn_deploy.errors import AttnDeployError
from attn_deploy.runtimes import native, onnxruntime

native.library_folders = lambda: iter([Path(sys.argv[1]).parent])
status = native.status()
said = {"status": dataclasses.asdict(status), "doctor": kernels_check("kernels", status, "function bodies").found,
        "healthy": kernels_check("kernels", status, "function bodies").ok is not False}
try:
    said["kernels"] = native.kernel_names()
    session = onnxruntime.open_session(Path(sys.argv[2]), threads=1, library=True)
    import numpy as np
    ones = np.ones((1, 2), np.float32)
    said["output"] = session.run({"x": ones, "gate": ones})["output"].tolist()
except AttnDeployError as error:
    said["error"] = {"exit": error.exit_code, "what": error.what, **dict(error.details())}
print(json.dumps(said, default=str))
"""


SETS_BELOW = {
    "avx512_vnni": ("avx512", "avx2"), "avx512": ("avx2",), "avx_vnni": ("avx2",), "avx2": (),
    "neon_dotprod": ("neon",), "neon": (),
}  # fmt: skip
"""Instruction sets that a CPU with this one has too."""


def in_a_process(library: Path, model: Path, isa: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library), str(model)], env={**os.environ, "ATTN_DEPLOY_NATIVE_ISA": isa},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.fixture
def model(make_gate_model: Any, tmp_path: Path) -> Path:
    path = tmp_path / "gate.onnx"
    path.write_bytes(make_gate_model("GateRelu"))
    return path


def test_each_instruction_set_of_this_cpu_can_be_forced(library: Path, model: Path) -> None:
    widest = in_a_process(library, model, "")["status"]["instruction_set"]
    assert widest != "none", "tests of kernels need a CPU that has them"
    assert widest in SETS_BELOW
    for isa in (widest, *SETS_BELOW[widest]):
        said = in_a_process(library, model, isa)
        assert said["status"]["instruction_set"] == isa
        assert "GateRelu" in said["kernels"]
        assert f"operators with {isa}" in said["doctor"]
        assert said["output"] == [[1.0, 1.0]]


def test_with_none_the_bodies_run_and_doctor_says_so(library: Path, model: Path) -> None:
    said = in_a_process(library, model, "none")
    assert said["kernels"] == []
    assert said["output"] == [[1.0, 1.0]]
    assert not said["status"]["available"]
    assert said["doctor"] == "switched off by ATTN_DEPLOY_NATIVE_ISA=none: function bodies run instead"
    assert said["healthy"]


@pytest.mark.parametrize("isa", ["sse2", "avx512 ", "AVX2"])
def test_one_that_is_not_here_is_an_error(library: Path, model: Path, isa: str) -> None:
    said = in_a_process(library, model, isa)
    assert not said["healthy"]
    assert f"ATTN_DEPLOY_NATIVE_ISA={isa}: this CPU has " in said["doctor"]
    error = said["error"]
    assert error["exit"] == 6
    assert "forced" in error["what"]
    assert error["got"] == f"ATTN_DEPLOY_NATIVE_ISA={isa}"
    assert any(name in error["expected"] for name in ("avx512", "avx2", "neon"))
    assert error["next"] == "unset ATTN_DEPLOY_NATIVE_ISA"
    assert "kernels" not in said


def test_the_command_line_ends_with_the_error_and_its_exit_code(library: Path, tmp_path: Path) -> None:
    """The library is found as an installed one would be: beside the package's Python files."""
    script = (
        "import sys; from pathlib import Path; from attn_deploy.runtimes import native\n"
        "from attn_deploy.cli import main\n"
        f"native.library_folders = lambda: iter([Path({str(library.parent)!r})]); sys.exit(main())"
    )
    arguments = ["export", "demo", "--out", str(tmp_path / "o.attn"), "--precision", "fp32", "--threads", "1"]
    environment = {**os.environ, "ATTN_DEPLOY_NATIVE_ISA": "sse2"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert "ATTN_DEPLOY_NATIVE_ISA=sse2" in done.stderr
    assert not (tmp_path / "o.attn").exists()


def test_a_cpu_without_any_is_said_by_doctor() -> None:
    """What `status` gives there; such a CPU cannot be forced."""
    reason = "this CPU has no instruction set that kernels are built for (AVX2 with FMA, AVX-512 or NEON)"
    check = kernels_check("native kernels", NativeStatus(False, Path("x"), "0.1.0", (), reason, "none"), "bodies")
    assert (check.ok, check.found, check.next_step) == (None, f"{reason}: bodies run instead", None)
