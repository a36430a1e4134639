"""The native library: where it is, which ONNX operators it has, and why it is missing when it is.

Only finds and reads the library; `SessionOptions.register_custom_ops_library(str(library_path()))` makes ONNX Runtime
use it. Without it every operator runs as its ONNX function body.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attn_deploy.errors import UnavailableError

__all__ = [
    "ISA_VARIABLE", "NativeStatus", "kernel_names", "library_error", "library_folders", "library_instruction_set",
    "library_operators", "library_path", "library_text", "library_version", "session_library", "status",
]  # fmt: skip

ISA_VARIABLE = "ATTN_DEPLOY_NATIVE_ISA"
"""Forces an instruction set: avx512_vnni, avx512, avx_vnni, avx2, neon_dotprod, neon, or none. Those without VNNI or
dotprod do without it, whatever this CPU has; one that it lacks is an error. Read by the library, and once in a
process."""

_DISTRIBUTION = "attn-deploy"
_PACKAGE_FOLDER = Path("attn_deploy", "runtimes", "native")
_FILE_NAME = {"win32": "attn_deploy_native.dll", "darwin": "libattn_deploy_native.dylib"}.get(
    sys.platform, "libattn_deploy_native.so"
)
_COMPILERS = ("c++", "g++", "clang++", "cl")
_REINSTALL = "pip install --force-reinstall --no-deps ."


@dataclass(frozen=True)
class NativeStatus:
    """Whether operators can run natively here. `reason` says why not and what to do next; None when available.
    `instruction_set`: what kernels run with; None for a library that does not load, and where it does not matter.
    `fault`: it was asked for what is not here, by ISA_VARIABLE."""

    available: bool
    path: Path | None
    version: str | None
    operators: tuple[str, ...]
    reason: str | None
    instruction_set: str | None = None
    fault: bool = False


def library_path() -> Path | None:
    """The built library, or None. It may be there and still not load: `status` tells."""
    return next((folder / _FILE_NAME for folder in library_folders() if (folder / _FILE_NAME).is_file()), None)


def library_version(path: Path) -> str:
    """The version of the package that the library was built from; raises UnavailableError when it does not load."""
    return library_text(path, "attn_deploy_native_version")


def library_operators(path: Path) -> tuple[str, ...]:
    """The ONNX operator names that the library registers; raises UnavailableError when it does not load."""
    return tuple(filter(None, library_text(path, "attn_deploy_native_operators").split(",")))


def library_instruction_set(path: Path) -> str:
    """What kernels run with on this CPU, as ISA_VARIABLE names it; raises UnavailableError when it does not load."""
    return library_text(path, "attn_deploy_native_instruction_set")


def library_error(path: Path) -> str:
    """Why no kernel runs though ISA_VARIABLE forces an instruction set, else ""; raises UnavailableError when the
    library does not load."""
    return library_text(path, "attn_deploy_native_error")


def kernel_names() -> tuple[str, ...]:
    """The ONNX operator names that have a native kernel here: none when the library is missing or does not load, or has
    none for this CPU. Raises UnavailableError when ISA_VARIABLE forces an instruction set that is not here."""
    found = status()
    _require_forced(found)
    return found.operators


def session_library() -> Path | None:
    """The library that sessions register; None, and function bodies run, where it is missing or does not load. Raises
    UnavailableError as `kernel_names` does."""
    found = status()
    _require_forced(found)
    return found.path if found.version is not None else None


def status() -> NativeStatus:
    """What `doctor` shows; never raises."""
    path = library_path()
    if path is None:
        return NativeStatus(False, None, None, (), _reason_not_built())
    try:
        version, operators = library_version(path), library_operators(path)
        isa, error = library_instruction_set(path), library_error(path)
    except UnavailableError as refused:
        return NativeStatus(False, path, None, (), f"{refused.what}: {refused.got}; next: {refused.next_step}")
    reason = f"{error}; next: unset {ISA_VARIABLE}" if error else _reason_without_kernels(isa)
    return NativeStatus(reason is None, path, version, operators, reason, isa, fault=bool(error))


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


def _require_forced(found: NativeStatus) -> None:
    if found.fault:
        error, _, next_step = (found.reason or "").partition("; next: ")
        forced, _, here = error.partition(": this CPU has ")
        raise UnavailableError(
            "the instruction set that native kernels are forced to is not here",
            got=forced, expected=f"{here}; or none, to run function bodies", next_step=next_step,
        )  # fmt: skip


def _reason_without_kernels(isa: str) -> str | None:
    if isa != "none":
        return None
    if os.environ.get(ISA_VARIABLE) == "none":
        return f"switched off by {ISA_VARIABLE}=none; next: unset {ISA_VARIABLE}"
    return "this CPU has no instruction set that kernels are built for (AVX2 with FMA, AVX-512 or NEON)"


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
