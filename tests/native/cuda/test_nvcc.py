"""What nvcc makes of the kernels, where it is installed; no GPU needed. Minutes of compiling: `make test-all`."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attn_deploy.errors import UnavailableError
from attn_deploy.runtimes.native import cuda
from attn_deploy.runtimes.native.cuda import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiler() -> build.Compiler:
    try:
        return build.find_compiler()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(compiler: build.Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.build(tmp_path_factory.mktemp("cuda_library"), ["90"])


def test_the_library_loads_without_a_driver_and_exports_four_functions(compiled: Path, emulated: Path) -> None:
    assert cuda.library_architectures(compiled) == ("90",)
    assert cuda.library_operators(compiled) == cuda.library_operators(emulated)
    if shutil.which("nm"):
        command = ["nm", "-D", "--defined-only", "--format=just-symbols", str(compiled)]
        symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert sorted(symbols) == [
            "RegisterCustomOps", "attn_deploy_cuda_architectures", "attn_deploy_cuda_operators",
            "attn_deploy_cuda_version",
        ]  # fmt: skip


def test_onnxruntime_takes_the_library(
    compiled: Path, make_model: Callable[..., bytes], open_model: Callable[..., Any]
) -> None:
    """The schema is there; the CPU has no kernel, which only the CUDA provider's would be."""
    with pytest.raises(Exception, match=r"(implementation|kernel) for .*GateRelu"):
        open_model(make_model("GateRelu", "float16"), compiled)


@pytest.mark.parametrize("architecture", [name.partition("-")[0] for name in build.ARCHITECTURES])
@pytest.mark.parametrize("source", sorted(Path(cuda.__file__).parent.glob("*.cu")), ids=lambda path: path.stem)
def test_no_kernel_spills_registers(compiler: build.Compiler, tmp_path: Path, source: Path, architecture: str) -> None:
    if not build.supported(compiler, [architecture]):
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    command = [
        str(compiler.nvcc), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v",
        *(f"-I{folder}" for folder in compiler.includes), "-o", str(tmp_path / "kernels.cubin"), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert spilled == [0] * len(spilled)
    assert spilled or source.stem == "packed_attention"  # which only chooses among the others' kernels
