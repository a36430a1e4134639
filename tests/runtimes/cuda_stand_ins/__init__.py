"""Stand-ins for NVIDIA's libraries: ONNX Runtime's real CUDA provider runs on a machine without a GPU.

They show which node goes to which provider, and execute the calls around it. No kernel runs: numbers mean nothing.
README.md says how to use them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_stand_ins.libraries import ROOT, build, environment, missing, missing_for_sessions

__all__ = [
    "CACHE", "Kernel", "Placement", "build", "kernels", "missing", "missing_for_sessions", "optimized", "placements",
    "run_python",
]  # fmt: skip

CACHE = ROOT / "build" / "cuda_stand_ins"


@dataclass(frozen=True)
class Placement:
    """A node and the execution provider that took it when the graph was partitioned."""

    node: str
    op_type: str
    domain: str
    provider: str


@dataclass(frozen=True)
class Kernel:
    """One kernel of ONNX Runtime: the operator's versions it serves, and the types of each type variable."""

    provider: str
    domain: str
    op_type: str
    since: int
    until: int
    types: dict[str, tuple[str, ...]]


def placements(model: bytes, options: dict[str, str] | None = None) -> list[Placement]:
    """Where ONNX Runtime's CUDA provider and its CPU provider divide a model between them.

    The nodes are those that partitioning saw: after constant folding, before the provider's own fusions. `options`
    are options of the CUDA provider. Raises AssertionError with ONNX Runtime's words when the model is rejected.
    """
    return [Placement(*row) for row in _ask("placements", model, options)]


def optimized(model: bytes, options: dict[str, str] | None = None) -> bytes:
    """The model as ONNX Runtime's CUDA session has it in the end, with all its fusions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        _ask("optimized", model, options, path)
        return path.read_bytes()


def kernels() -> list[Kernel]:
    """Every kernel of the wheel, of all its providers."""
    rows = _ask("kernels", b"", None)
    return [Kernel(*row[:-1], {name: tuple(types) for name, types in row[-1].items()}) for row in rows]


def run_python(*arguments: object, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, where `import onnxruntime` is the CUDA flavour upon the stand-ins."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(build(CACHE)),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _ask(question: str, model: bytes, options: dict[str, str] | None, *more: object) -> Any:
    """The answer of ask.py, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        answer = Path(folder) / "answer.json"
        script = Path(__file__).with_name("ask.py")
        done = run_python(script, question, path, answer, json.dumps(options or {}), *more)
        assert done.returncode == 0, (
            f"onnxruntime-gpu upon the stand-ins failed ({done.returncode}):\n{done.stderr[-4000:]}"
        )
        return json.loads(answer.read_text())
