"""Peak resident memory of opening and running something, measured in a process of its own.

The parent calls `measure_peak("package.module", payload)`. The module does its work under `serve`:

    if __name__ == "__main__":
        serve(lambda payload: open_and_run(payload["bundle"]))

1 MB is 10**6 bytes. The figure holds the interpreter and every library the module imported, as in an application.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from attn_deploy.errors import AttnDeployError, UnavailableError

BYTES_PER_MB = 10**6

_STDERR_TAIL_LINES = 15


class _Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    peak_rss_mb: float


def measure_peak(module: str, payload: dict[str, Any], *, timeout_s: float = 600.0) -> float:
    """Run `python -m module` with `payload` as JSON on stdin; the peak in MB that the child reports about itself.

    The child asks itself because the parent cannot: the ru_maxrss that wait4 returns survives exec, so that of a child
    of a large process starts at its parent's peak, with fork and with vfork.

    Raises AttnDeployError with the tail of its stderr when the child fails, is killed, reports nothing or takes longer
    than `timeout_s`; UnavailableError when there is no interpreter to start.
    """
    if not sys.executable:
        raise UnavailableError(
            "peak memory cannot be measured", got="a Python without sys.executable", expected="an interpreter to start"
        )
    try:
        # -P: a numpy.py in the current folder is not numpy, unless this process too would import it.
        child = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=msgspec.json.encode(payload),
            capture_output=True,
            timeout=timeout_s,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise AttnDeployError(
            "the process that measures peak memory did not end in time",
            where=module,
            got=f"more than {timeout_s:g} s; {_tail(error.stderr)}",
        ) from error
    if child.returncode != 0:
        raise AttnDeployError(
            "the process that measures peak memory failed",
            where=module,
            got=f"{_ending(child.returncode)}; {_tail(child.stderr)}",
        )
    peak_mb = _reported(child.stdout)
    if peak_mb is None:
        raise AttnDeployError(
            "the process that measures peak memory reported no figure",
            where=module,
            got=_tail(child.stderr),
            expected="a module that does its work under attn_deploy.memory.serve",
        )
    return peak_mb


def serve(run: Callable[[dict[str, Any]], object]) -> None:
    """The child's side: read the payload from stdin, run, report the peak of this process on stdout."""
    run(msgspec.json.decode(sys.stdin.buffer.read(), type=dict[str, Any]))
    report = msgspec.json.encode(_Report(peak_rss_mb=peak_rss_mb())).decode()
    print(f"\n{report}", flush=True)  # on a line of its own, whatever a library left on the one before


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB. Raises UnavailableError where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):  # begins anew at exec, as ru_maxrss does not
            return int(line.split()[1]) * 1024 / BYTES_PER_MB
    try:
        import resource
    except ImportError as error:
        raise UnavailableError(
            "peak memory cannot be measured", got=sys.platform, expected="a system with /proc or getrusage"
        ) from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / BYTES_PER_MB  # macOS counts bytes, others KiB


def _reported(stdout: bytes) -> float | None:
    """The figure on the last line that is a report; libraries may print before and after it."""
    for line in reversed(stdout.splitlines()):
        try:
            return msgspec.json.decode(line, type=_Report).peak_rss_mb
        except msgspec.MsgspecError:
            continue
    return None


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    if -returncode == signal.SIGKILL:
        return "killed by SIGKILL, as the kernel does when memory runs out"
    return f"killed by signal {-returncode}"


def _tail(stderr: bytes | None) -> str:
    lines = (stderr or b"").decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-_STDERR_TAIL_LINES:]) or "nothing on stderr"
