"""Compile the CUDA library with the machine's nvcc: `python -m attn_deploy.runtimes.native.cuda.build`.

Needs a C++ compiler and nvcc 11.8 or later: of a CUDA toolkit (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda), or the pip
packages nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-cccl and nvidia-cuda-runtime. No GPU. The library
goes where `library_path` looks for it: into the user's cache, under the hash of its sources.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.runtimes.native import cuda

ARCHITECTURES = ("75-real", "80-real", "86-real", "89-real", "90")
"""CMake's names, as in CMakeLists.txt: machine code for Turing to Hopper, and the last one's PTX, which the driver
compiles for newer GPUs."""

PACKAGES = "nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl nvidia-cuda-runtime"
INSTALL = f"install a CUDA toolkit, or: pip install {PACKAGES}"


@dataclass(frozen=True)
class Compiler:
    """nvcc and the folders of headers and libraries it does not find by itself."""

    nvcc: Path
    includes: tuple[Path, ...] = ()
    libraries: tuple[Path, ...] = ()


def find_compiler() -> Compiler:
    """Raises UnavailableError where there is no nvcc."""
    for nvcc in _candidates():
        if nvcc.is_file() and os.access(nvcc, os.X_OK):
            root = nvcc.resolve().parent.parent
            # Packages of PyPI keep their libraries in `lib`, where nvcc does not look, and may lie in several folders.
            roots = [root] if root.parent.name != "nvidia" else [root, *_package_roots()]
            includes = [r / "include" for r in roots] + [r / "include" / "cccl" for r in roots]
            libraries = [r / name for r in roots for name in ("lib", "lib64")]
            return Compiler(
                nvcc,
                tuple(dict.fromkeys(i for i in includes if i.is_dir())),
                tuple(dict.fromkeys(f for f in libraries if f.is_dir())),
            )
    raise UnavailableError("no CUDA compiler", expected="nvcc 11.8 or later", next_step=INSTALL)


def _candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    yield from (root / "bin" / "nvcc" for root in _package_roots())
    found = shutil.which("nvcc")
    if found:
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")


def _package_roots() -> list[Path]:
    """Folders of NVIDIA's pip packages, as site-packages/nvidia/cu13."""
    found = (root for entry in sys.path if entry for root in sorted(Path(entry).glob("nvidia/cu[0-9]*")))
    return [root for root in found if root.is_dir()]


def compile_command(compiler: Compiler, target: Path, architectures: Sequence[str] = ARCHITECTURES) -> list[str]:
    """The one call of nvcc that makes the library. The CUDA runtime is linked in: it keeps no state of its own that
    another copy, as ONNX Runtime's, would need to know; both use the device's primary context."""
    compiled, _ = cuda.sources()
    if not compiled:
        raise UnavailableError(
            "the package has no CUDA sources", where=str(Path(__file__).parent), next_step="install it from source"
        )
    exports = target.parent / "exports.map"
    exports.write_text("{ global: RegisterCustomOps; attn_deploy_cuda_*; local: *; };\n")
    # nodelete: sessions keep pointers into the library.
    linker = f"--version-script={exports},-z,nodelete,--no-undefined"
    return [
        str(compiler.nvcc), "-shared", "-std=c++17", "-O3", "--cudart", "static", "--threads", "0",
        "-Xfatbin", "-compress-all",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden", "-Xlinker", linker,
        f'-DATTN_DEPLOY_VERSION="{_version()}"',
        f'-DATTN_DEPLOY_CUDA_ARCHITECTURES="{",".join(architectures)}"',
        *(flag for name in architectures for flag in _architecture_flags(name)),
        *(f"-I{folder}" for folder in compiler.includes), *(f"-L{folder}" for folder in compiler.libraries),
        "-o", str(target), *map(str, compiled),
    ]  # fmt: skip


def _architecture_flags(name: str) -> list[str]:
    number, _, kind = name.partition("-")
    machine, portable = f"sm_{number}", f"compute_{number}"
    codes = {"real": [machine], "virtual": [portable]}.get(kind, [machine, portable])
    return ["-gencode", f"arch=compute_{number},code=[{','.join(codes)}]"]


def _version() -> str:
    try:
        return importlib.metadata.version("attn-deploy")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def supported(compiler: Compiler, architectures: Sequence[str] = ARCHITECTURES) -> tuple[str, ...]:
    """The architectures that this nvcc knows."""
    done = subprocess.run([compiler.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"sm_(\d+)", done.stdout))
    return tuple(a for a in architectures if a.partition("-")[0] in known)


def build(folder: Path | None = None, architectures: Sequence[str] | None = None) -> Path:
    """Compiles the library into `folder`, the cache where None; the file appears whole or not at all. Takes a minute or
    two. Raises UnavailableError without a compiler, and with the compiler's words when it fails."""
    if sys.platform != "linux":
        raise UnavailableError("the CUDA library cannot be built", got=sys.platform, expected="linux")
    compiler = find_compiler()
    chosen = tuple(architectures) if architectures else supported(compiler)
    folder = folder or cuda.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / cuda.FILE_NAME
        done = subprocess.run(compile_command(compiler, made, chosen), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise UnavailableError(
                "nvcc could not compile the CUDA library",
                got=(done.stderr or done.stdout).strip()[-2000:],
                where=str(compiler.nvcc),
                next_step=INSTALL,
            )
        return made.replace(folder / cuda.FILE_NAME)


def main() -> int:
    parser = argparse.ArgumentParser(prog=cuda.BUILD, description="Compile the CUDA library with this machine's nvcc.")
    parser.add_argument("--folder", type=Path, help="where to put it (default: the user's cache)")
    parser.add_argument("--architectures", help=f"CMake's names, with commas (default: {','.join(ARCHITECTURES)})")
    arguments = parser.parse_args()
    chosen = arguments.architectures.split(",") if arguments.architectures else None
    try:
        path = build(arguments.folder, chosen)
    except AttnDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{path}: {', '.join(cuda.library_architectures(path))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
