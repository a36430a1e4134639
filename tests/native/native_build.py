"""Builds of the native library and of kernel_runner, kept below build/native_tests and brought up to date by their own
build tool, so that only what changed is compiled again. Processes that want one at the same time take turns."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "runtimes" / "native"
BUILDS = ROOT / "build" / "native_tests"

TOOL_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
"""The environment's own cmake and ninja count, activated or not."""


def tool(name: str) -> str | None:
    return shutil.which(name, path=TOOL_PATH)


def can_build() -> bool:
    return tool("cmake") is not None and tool("c++") is not None


def build(name: str, *options: str, targets: Sequence[str] = ()) -> Path:
    """The folder of a build with warnings as errors and kernel_runner in it; `options` are CMake's."""
    command = ["cmake", "-S", str(SOURCE), "-DATTN_DEPLOY_STRICT=ON", "-DATTN_DEPLOY_KERNEL_TESTS=ON", *options]
    command += ["-G", "Ninja"] if tool("ninja") else []
    key = hashlib.sha256(" ".join([*command, str(tool("cmake")), str(tool("c++"))]).encode()).hexdigest()[:8]
    folder = BUILDS / f"{name}-{key}"
    with _turn(folder):
        if not (folder / "CMakeCache.txt").is_file():
            _run([*command, "-B", str(folder)])
        wanted = [word for target in targets for word in ("--target", target)]
        _run(["cmake", "--build", str(folder), "--config", "Release", *wanted])
    return folder


def library_in(folder: Path) -> Path:
    return next(folder.rglob("libattn_deploy_native.*"))


def runner_in(folder: Path) -> Path:
    return folder / "runner" / "kernel_runner"


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    environment = {**os.environ, "PATH": TOOL_PATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
