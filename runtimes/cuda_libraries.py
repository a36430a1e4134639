"""NVIDIA's libraries that ONNX Runtime's CUDA provider wants: loaded from where pip puts them, or named as missing."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path


def missing_libraries(cuda_major: int) -> list[str]:
    """Loads what the provider will look for by name, and says what is nowhere; only known for Linux.

    pip puts the libraries below site-packages/nvidia, where the loader does not look: one that is loaded already is
    found by its name.
    """
    if not sys.platform.startswith("linux"):
        return []
    blas, fft = (13, 12) if cuda_major >= 13 else (12, 11)
    wanted = [
        f"libcudart.so.{cuda_major}", f"libnvrtc.so.{cuda_major}", f"libcublasLt.so.{blas}", f"libcublas.so.{blas}",
        "libcurand.so.10", f"libcufft.so.{fft}", "libcudnn.so.9",
    ]  # fmt: skip
    return [library for library in wanted if not _loads(library)]


def packages(cuda_major: int) -> str:
    """The command that installs them all."""
    suffix = "" if cuda_major >= 13 else f"-cu{cuda_major}"
    names = [f"nvidia-{part}{suffix}" for part in ("cuda-runtime", "cuda-nvrtc", "cublas", "curand", "cufft")]
    return f"pip install {' '.join(names)} nvidia-cudnn-cu{cuda_major}"


def _loads(library: str) -> bool:
    """By its name, as the loader finds it, or from a pip package."""
    for place in (library, *_in_packages(library)):
        try:
            ctypes.CDLL(str(place))
        except OSError:
            continue
        return True
    return False


def _in_packages(library: str) -> Iterator[Path]:
    try:
        package = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return
    for folder in (package.submodule_search_locations or ()) if package is not None else ():
        yield from sorted(Path(folder).glob(f"*/lib/{library}"))
