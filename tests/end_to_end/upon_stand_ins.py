"""The command line in a process upon the stand-ins for CUDA, where `tensorrt` is the made one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtimes"))  # for cuda_stand_ins

import cuda_stand_ins

TENSORRT = Path(cuda_stand_ins.__file__).parents[1] / "tensorrt_stand_in"

CLI = """
import functools, sys
from attn_deploy import benchmarking, cli, latency, proving, validation
validation.LATENCY_BUDGET_S = 0.5  # figures are not judged here
benchmarking.measure = proving.measure = functools.partial(latency.measure, warmup_s=0.02, pause_s=0.0)
sys.exit(cli.main(sys.argv[1:]))
"""

_REASON = cuda_stand_ins.missing_for_sessions()
needed = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


class Host:
    """A made host with a GPU, and TensorRT where it is asked for; what is kept for its device is in `cache`."""

    def __init__(self, patch: pytest.MonkeyPatch, cache: Path, *, tensorrt: bool) -> None:
        self._patch = patch
        self._log = cache / "engines"
        patch.setenv("XDG_CACHE_HOME", str(cache))
        if tensorrt:
            patch.setenv("PYTHONPATH", str(TENSORRT))

    def run(self, script: str, *arguments: object, **faults: object) -> subprocess.CompletedProcess[str]:
        """Python code; `faults` are those of tests/runtimes/tensorrt_stand_in/tensorrt/faults.py."""
        self._patch.setenv("MADE_TENSORRT", json.dumps({"log": str(self._log), **faults}))
        return cuda_stand_ins.run_python("-c", script, *arguments)

    def cli(self, *arguments: object, **faults: object) -> subprocess.CompletedProcess[str]:
        return self.run(CLI, *arguments, **faults)

    @property
    def engines_built(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.is_file() else 0
