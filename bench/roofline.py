"""The ceilings of this machine, taken beside a measurement: bench/peak.cc (FP32) and bench/peak_int8.cc (INT8) compiled
here and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from common import BUILD

HERE = Path(__file__).parent
FRAME = HERE / "peak.h"
SECONDS = 0.3


def ceiling_gflops(threads: int) -> float | None:
    """GFLOP/s of so many threads at once; None without a C++ compiler or a fused multiply-add."""
    return _ceiling(HERE / "peak.cc", threads)


def ceiling_int8_gops(threads: int) -> float | None:
    """GOP/s of so many threads at once; None without a C++ compiler or a dot product of bytes (VNNI, dotprod)."""
    return _ceiling(HERE / "peak_int8.cc", threads)


def _ceiling(source: Path, threads: int) -> float | None:
    program = _program(source)
    if program is None:
        return None
    done = subprocess.run([str(program), str(threads), str(SECONDS)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _program(source: Path) -> Path | None:
    program = BUILD / source.stem
    newest = max(file.stat().st_mtime for file in (source, FRAME))
    if program.is_file() and program.stat().st_mtime >= newest:
        return program
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, "-std=c++17", "-O2", "-march=native", "-pthread", str(source), "-o", str(program)]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    if compiled.returncode:
        print(f"no ceiling: {source.name}: {compiled.stderr.strip().splitlines()[0]}", flush=True)
        return None
    return program
