"""The declarations of ONNX Runtime's C ABI: generated from the table, and checked when the official header is given."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_generated_files_are_up_to_date(source: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(source / "generate_abi.py"), "--output-dir", str(tmp_path)], check=True)
    for name in ("ort_c_abi.h", "ort_abi_check.cc"):
        assert (tmp_path / name).read_text() == (source / name).read_text(), f"run {source}/generate_abi.py"


def compile_check(source: Path, official_header: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "onnxruntime_c_api.h").write_text(official_header)
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{source}", str(source / "ort_abi_check.cc")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def stand_in_header(source: Path) -> str:
    """Our own declarations under the official names, since the Python package brings no headers."""
    if not shutil.which("c++"):
        pytest.skip("no c++")
    text = (source / "ort_c_abi.h").read_text()
    text = text.replace("ATTN_DEPLOY_ORT_CALL", "ORT_API_CALL")
    return re.sub(r"^.*namespace attn_deploy::ort.*$", "", text, flags=re.MULTILINE)


def test_the_check_accepts_a_header_that_agrees(source: Path, stand_in_header: str, tmp_path: Path) -> None:
    done = compile_check(source, stand_in_header, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs", "complaint"),
    [
        pytest.param("unused_29[22]", "unused_29[23]", "GetTensorMutableData", id="index"),
        pytest.param("OrtValue* value, void** out", "OrtValue* value, int** out", "GetTensorMutableData", id="type"),
        pytest.param("  uint32_t version;\n", "  uint32_t version;\n  void* extra;\n", "CreateKernel", id="field"),
        pytest.param("_FLOAT16 = 10", "_FLOAT16 = 12", "FLOAT16", id="enum"),
    ],
)
def test_the_check_refuses_a_header_that_differs(
    source: Path, stand_in_header: str, tmp_path: Path, ours: str, theirs: str, complaint: str
) -> None:
    assert stand_in_header.count(ours) == 1
    # The differing header must compile by itself: its own static_asserts are not what is tested.
    differing = re.sub(r"^static_assert.*$", "", stand_in_header.replace(ours, theirs), flags=re.MULTILINE)
    done = compile_check(source, differing, tmp_path)
    assert done.returncode != 0
    assert "static assertion failed" in done.stderr
    assert complaint in done.stderr
