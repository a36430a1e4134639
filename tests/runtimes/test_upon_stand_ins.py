"""Our CUDA sessions with the real ONNX Runtime and cuda-core, upon stand-ins for NVIDIA's libraries: what they call, in
which order, and what is left after an error. No kernel runs: nothing here is about numbers that a kernel computes."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cuda_stand_ins

import cuda_stand_ins

CHECKS = sorted(Path(__file__).with_name("upon_stand_ins").glob("check_*.py"))
RUN = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"

_REASON = cuda_stand_ins.missing_for_sessions()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


@pytest.mark.parametrize("file", CHECKS, ids=[path.stem for path in CHECKS])
def test_all_checks_pass_in_a_process_upon_the_stand_ins(file: Path) -> None:
    written = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    done = cuda_stand_ins.run_python("-c", RUN, "-p", "no:cacheprovider", "-rA", "--no-skip", file)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (name for name in written if name.startswith("test_")):
        assert f"::{name}" in done.stdout, f"{name} was not run:\n{done.stdout}"
