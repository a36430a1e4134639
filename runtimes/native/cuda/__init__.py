"""The CUDA library: where it is, which ONNX operators it has, and why it is missing when it is.

Only finds and reads the library; `SessionOptions.register_custom_ops_library(str(library_path()))` makes ONNX Runtime's
CUDA provider use it. A session takes either it or the CPU library: both fill the domain `attn_deploy`, which ONNX
Runtime takes once. Every form is there for float32, float16 and bfloat16; all operands of a node but indices and masks
have its type. PackedAttention has head_dim up to MAX_HEAD_DIM; multiples of 8 are fast. Without the library every
operator runs as its ONNX function body. Reading it needs no GPU and no driver.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attn_deploy.errors import UnavailableError
from attn_deploy.runtimes import native
from attn_deploy.runtimes.native import NativeStatus

__all__ = [
    "BUILD", "MAX_HEAD_DIM", "CudaStatus", "cache_folder", "kernel_names", "library_architectures", "library_operators",
    "library_path", "library_version", "sources", "status",
]  # fmt: skip

BUILD = "python -m attn_deploy.runtimes.native.cuda.build"
"""The command that compiles the library."""

MAX_HEAD_DIM = 128
"""Of the PackedAttention kernels; kMaxHeadDim in packed_attention.h."""

FILE_NAME = "libattn_deploy_cuda.so"
_HERE = Path(__file__).resolve().parent
_SHARED_SOURCES = ("gate_plan.cc", "ort_adapter.cc", "registration.cc")
"""Of the folder above: what both libraries are made of."""


@dataclass(frozen=True)
class CudaStatus(NativeStatus):
    """`architectures` are CMake's names of what the library was compiled for: `75-real` machine code, `90` also PTX."""

    architectures: tuple[str, ...] = ()


def library_path() -> Path | None:
    """The built library, or None. It may be there and still not load: `status` tells."""
    return next((folder / FILE_NAME for folder in _folders() if (folder / FILE_NAME).is_file()), None)


def library_version(path: Path) -> str:
    """The version of the package that the library was built from; raises UnavailableError when it does not load."""
    return native.library_text(path, "attn_deploy_cuda_version", BUILD)


def library_operators(path: Path) -> tuple[str, ...]:
    """The ONNX operator names that the library registers; raises UnavailableError when it does not load."""
    return tuple(native.library_text(path, "attn_deploy_cuda_operators", BUILD).split(","))


def library_architectures(path: Path) -> tuple[str, ...]:
    """What the library was compiled for; raises UnavailableError when it does not load."""
    return tuple(native.library_text(path, "attn_deploy_cuda_architectures", BUILD).split(","))


def kernel_names() -> tuple[str, ...]:
    """The ONNX operator names that have a CUDA kernel here: none when the library is missing or does not load."""
    return status().operators


def status() -> CudaStatus:
    """What `doctor` shows; never raises."""
    path = library_path()
    if path is None:
        return CudaStatus(False, None, None, (), f"not built; next: {BUILD}")
    try:
        version, operators = library_version(path), library_operators(path)
        return CudaStatus(True, path, version, operators, None, architectures=library_architectures(path))
    except UnavailableError as error:
        return CudaStatus(False, path, None, (), f"{error.what}: {error.got}; next: {error.next_step}")


def sources() -> tuple[list[Path], list[Path]]:
    """The files that the library is compiled from, and their headers; none where the package has no sources."""
    shared = [_HERE.parent / name for name in _SHARED_SOURCES]
    if not all(file.is_file() for file in shared):
        return [], []
    compiled = [*sorted(_HERE.glob("*.cu")), *sorted(_HERE.glob("*.cc")), *shared]
    headers = [*sorted(_HERE.glob("*.cuh")), *sorted(_HERE.glob("*.h")), *sorted(_HERE.parent.glob("*.h"))]
    return compiled, headers


def cache_folder() -> Path:
    """Where a library built from this package's sources lies, and no other: the name holds their hash."""
    compiled, headers = sources()
    key = hashlib.sha256()
    for file in [*compiled, *headers]:
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attn-deploy" / "cuda" / key.hexdigest()[:16]


def _folders() -> Iterator[Path]:
    """Beside this file, where a wheel has it; in site-packages, for an editable install; in the cache, once built."""
    yield _HERE
    if sys.platform != "linux":  # CUDA kernels for others are not built
        return
    yield from (folder / "cuda" for folder in native.library_folders())
    yield cache_folder()
