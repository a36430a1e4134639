"""The FP32 ceiling of this machine, taken beside a measurement: bench/peak.cc compiled here and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from common import BUILD

SOURCE = Path(__file__).with_name("peak.cc")
SECONDS = 0.3


def ceiling_gflops(threads: int) -> float | None:
    """GFLOP/s of so many threads at once; None without a C++ compiler or a fused multiply-add."""
    program = _program()
    if program is None:
        return None
    done = subprocess.run([str(program), str(threads), str(SECONDS)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _program() -> Path | None:
    program = BUILD / "peak"
    if program.is_file() and program.stat().st_mtime >= SOURCE.stat().st_mtime:
        return program
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++17", "-O2", "-march=native", "-pthread", str(SOURCE), "-o", str(program)]
    return program if subprocess.run(command, check=False).returncode == 0 else None
