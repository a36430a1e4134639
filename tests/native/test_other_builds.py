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


def run_kernel_tests(runner: str, isas: str | None = None, *options: str) -> None:
    """Every test with the fixture kernel_runner, in a pytest of its own with this runner and these options."""
    environment = {"ATTN_DEPLOY_KERNEL_RUNNER": runner}
    run_tests(environment if isas is None else {**environment, "ATTN_DEPLOY_KERNEL_ISAS": isas}, *options)


def run_tests(variables: dict[str, str], *options: str) -> None:
    environment = {**os.environ, **variables}
    others = [f"--ignore={HERE / 'cuda'}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(HERE), *others, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=native_build.ROOT, check=False)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 0


@pytest.fixture(scope="session")
def sanitized_build() -> Path:
    if not native_build.can_build():
        pytest.skip("no cmake and c++ to build kernel_runner")
    # Not strict: instrumented code has false warnings. A build type of its own: no -O2, which takes twice as long.
    options = ["-DATTN_DEPLOY_STRICT=OFF", "-DCMAKE_BUILD_TYPE=Sanitized", f"-DCMAKE_CXX_FLAGS={SANITIZERS}"]
    return native_build.build("sanitized", *options)


@pytest.fixture(scope="session")
def sanitized(sanitized_build: Path) -> Path:
    return native_build.runner_in(sanitized_build)


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


@pytest.mark.slow
def test_operators_pass_under_sanitizers(sanitized_build: Path) -> None:
    """The library in an ONNX Runtime that is not instrumented: the sanitizers' runtime has to be there before all."""
    compiler = str(native_build.tool("c++"))
    names = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last for exceptions that cross it
    commands = [[compiler, f"-print-file-name={name}"] for name in names]
    runtimes = [subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in commands]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip(f"{compiler} has no sanitizer runtimes to preload")
    variables = {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",  # Python and ONNX Runtime free little at exit
        "ATTN_DEPLOY_TEST_LIBRARY": str(native_build.library_in(sanitized_build)),
    }
    left_out = [f"--ignore={HERE / name}.py" for name in ("test_library", "test_instruction_set")]  # not operators
    run_tests(variables, "-m", "not slow", *left_out)


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
    # Two minutes of emulation, for what does not depend on the instruction set.
    run_kernel_tests(f"{emulator} {native_build.runner_in(neon_build)}", "neon", "-k", "not scratch_memory")
