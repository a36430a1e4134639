"""The tests of kernels once more: under AddressSanitizer and UBSan, and compiled for ARM under an emulator."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import native_build
import numpy as np
import pytest
from kernel_runner import Case, KernelRunner

HERE = Path(__file__).parent
SANITIZERS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"


def run_kernel_tests(runner: str, isas: str | None = None) -> None:
    """Every test with the fixture kernel_runner, in a pytest of its own with this runner."""
    environment = {**os.environ, "ATTN_DEPLOY_KERNEL_RUNNER": runner}
    if isas is not None:
        environment["ATTN_DEPLOY_KERNEL_ISAS"] = isas
    command = [sys.executable, "-m", "pytest", str(HERE), f"--ignore={HERE / 'cuda'}", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=native_build.ROOT, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 0


@pytest.fixture(scope="session")
def sanitized() -> Path:
    if not native_build.can_build():
        pytest.skip("no cmake and c++ to build kernel_runner")
    options = ["-DATTN_DEPLOY_STRICT=OFF", f"-DCMAKE_CXX_FLAGS={SANITIZERS}"]  # instrumented code has false warnings
    return native_build.runner_in(native_build.build("sanitized", *options, targets=["kernel_runner"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [("read_beyond", "heap-buffer-overflow"), ("overflow_int", "signed integer overflow")]
)
def test_sanitizers_stop_at_faults(sanitized: Path, fault: str, said: str) -> None:
    case = Case(fault, [np.ones(5, np.float32)], ints=[1])
    isas = ("avx512", "avx2", "neon")
    run = next(runner for isa in isas if (runner := KernelRunner((str(sanitized),), isa)).available())
    with pytest.raises(AssertionError, match=said):
        run([case])


@pytest.mark.slow
def test_kernels_pass_under_sanitizers(sanitized: Path) -> None:
    run_kernel_tests(str(sanitized))


@pytest.fixture(scope="session")
def neon_build() -> Path:
    """The library and kernel_runner cross-compiled for 64-bit ARM."""
    if not native_build.can_build():
        pytest.skip("no cmake to build with")
    if not any(shutil.which(f"aarch64-linux-gnu-g++{version}") for version in ("", "-14", "-13", "-12")):
        pytest.skip("no cross-compiler for ARM: apt install g++-aarch64-linux-gnu")
    return native_build.build("neon", f"-DCMAKE_TOOLCHAIN_FILE={HERE / 'aarch64.cmake'}")


@pytest.mark.slow
def test_the_library_compiles_for_arm(neon_build: Path) -> None:
    machine = int.from_bytes(native_build.library_in(neon_build).read_bytes()[18:20], "little")
    assert machine == 183  # EM_AARCH64 of the ELF header


@pytest.mark.slow
def test_kernels_pass_on_neon_under_an_emulator(neon_build: Path) -> None:
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64-static", "qemu-aarch64"))), None)
    if emulator is None:
        pytest.skip("no emulator for ARM: apt install qemu-user-static")
    run_kernel_tests(f"{emulator} {native_build.runner_in(neon_build)}", isas="neon")
