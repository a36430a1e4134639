"""Runs every benchmark in turn, each alone: parallel jobs spoil timings. Results go to bench/results/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CASES = (
    "export_cost", "startup", "session_overhead", "against_plain", "attention_kernels", "linear_kernels",
    "gate_kernels", "cpu_models", "int8_models",
)  # fmt: skip
"""The last two print the tables that the README shows."""


def main() -> int:
    here = Path(__file__).resolve().parent
    return max(subprocess.run([sys.executable, str(here / f"{case}.py")], check=False).returncode for case in CASES)


if __name__ == "__main__":
    sys.exit(main())
