"""The native library: where it is, which ONNX operators it has, and why it is missing when it is.

Only finds and reads the library; `SessionOptions.register_custom_ops_library(str(library_path()))` makes ONNX Runtime
use it. Without it every operator runs as its ONNX function body.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attn_deploy.errors import UnavailableError

__all__ = [
    "NativeStatus", "kernel_names", "library_folders", "library_operators", "library_path", "library_text",
    "library_version", "status",
]  # fmt: skip

_DISTRIBUTION = "attn-deploy"
_PACKAGE_FOLDER = Path("attn_deploy", "runtimes", "native")
_FILE_NAME = {"win32": "attn_deploy_native.dll", "darwin": "libattn_deploy_native.dylib"}.get(
    sys.platform, "libattn_deploy_native.so"
)
_COMPILERS = ("c++", "g++", "clang++", "cl")
_REINSTALL = "pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class NativeStatus:
    """Whether operators can run natively here. `reason` says why not and what to do next; None when available."""

    available: bool
    path: Path | None
    version: str | None
    operators: tuple[str, ...]
    reason: str | None


def library_path() -> Path | None:
    """The built library, or None. It may be there and still not load: `status` tells."""
    return next((folder / _FILE_NAME for folder in library_folders() if (folder / _FILE_NAME).is_file()), None)


def library_version(path: Path) -> str:
    """The version of the package that the library was built from; raises UnavailableError when it does not load."""
    return library_text(path, "attn_deploy_native_version")


def library_operators(path: Path) -> tuple[str, ...]:
    """The ONNX operator names that the library registers; raises UnavailableError when it does not load."""
    return tuple(library_text(path, "attn_deploy_native_operators").split(","))


def kernel_names() -> tuple[str, ...]:
    """The ONNX operator names that have a native kernel here: none when the library is missing or does not load."""
    return status().operators


def status() -> NativeStatus:
    """What `doctor` shows; never raises."""
    path = library_path()
    if path is None:
        return NativeStatus(False, None, None, (), _reason_not_built())
    try:
        return NativeStatus(True, path, library_version(path), library_operators(path), None)
    except UnavailableError as error:
        return NativeStatus(False, path, None, (), f"{error.what}: {error.got}; next: {error.next_step}")


def library_folders() -> Iterator[Path]:
    """Where the library can lie: beside this file in a wheel; in site-packages, with this file in the source tree, in
    an editable install."""
    yield Path(__file__).resolve().parent
    yield from (Path(folder) for folder in __path__)
    try:
        installed = importlib.metadata.distribution(_DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    yield from (Path(file.locate()).parent for file in installed if file.name == _FILE_NAME)
    yield from (Path(sysconfig.get_path(name)) / _PACKAGE_FOLDER for name in ("platlib", "purelib"))


def _reason_not_built() -> str:
    if any(shutil.which(compiler) for compiler in _COMPILERS):
        return f"not built: the package was not installed, or without a C++ compiler; next: {_REINSTALL}"
    return f"not built: no C++ compiler at install time; next: apt install g++ && {_REINSTALL}"


def library_text(path: Path, function_name: str, next_step: str = _REINSTALL) -> str:
    """The text that a library's `const char*(void)` function returns; raises UnavailableError, with `next_step`, when
    the library does not load or lacks the function."""
    try:
        function = getattr(ctypes.CDLL(str(path)), function_name)
    except (OSError, AttributeError) as error:
        raise UnavailableError(
            "the native library does not load", got=error, where=str(path), next_step=next_step
        ) from error
    function.argtypes = []
    function.restype = ctypes.c_char_p
    text: bytes = function()
    return text.decode()
