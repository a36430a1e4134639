"""What the benchmarks of single kernels share: their command line, their sessions, and a system's row."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime
from common import save

from attn_deploy import environment
from attn_deploy.runtimes import native


class Case(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Case)


def run_cases(
    benchmark: str, text: str | None, cases: Sequence[C], measured: Callable[[C, int, float, Path], dict[str, Any]],
    line: Callable[[dict[str, Any]], str],
) -> None:  # fmt: skip
    """Measures the cases that the command line names, prints a line for each and saves all."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in cases], metavar="CASE")
    parser.add_argument("--seconds", type=float, default=4.0, help="of measuring, for each case")
    parser.add_argument("--library", type=Path, default=native.library_path())
    arguments = parser.parse_args()
    if arguments.library is None:
        parser.error("no native library is installed; name one with --library")
    rows = []
    for threads in arguments.threads:
        for case in cases:
            if not arguments.cases or case.name in arguments.cases:
                rows.append(measured(case, threads, arguments.seconds, arguments.library))
                print(line(rows[-1]), flush=True)
    save(benchmark, {"host": environment.host(), "versions": environment.versions(), "rows": rows})


def opened(model: bytes, threads: int, library: Path | None) -> onnxruntime.InferenceSession:
    """With the library's kernels, or without it on the function bodies."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Denormals count as zero in our kernels: in ONNX Runtime's here too.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def side(samples_ms: np.ndarray, flops: int, ceiling: float | None) -> dict[str, float | None]:
    """One system's part of a row; `share` of the ceiling, in GFLOP/s, where that is known."""
    ms = float(np.median(samples_ms))
    gflops = flops / ms / 1e6
    return {
        "p10_ms": float(np.percentile(samples_ms, 10)), "p50_ms": ms, "gflops": gflops,
        "share": gflops / ceiling if ceiling else None,
    }  # fmt: skip
