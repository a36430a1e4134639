"""What needs an extra says so before it fails on an import."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from attn_deploy.errors import UnavailableError

EXPORT_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")


LOWERING_PACKAGES = ("onnx", "onnx_ir", "safetensors")


def require_lowering() -> None:
    """Raises UnavailableError when a package that lowering a canonical model needs is not installed: no torch."""
    missing = _missing(LOWERING_PACKAGES)
    if missing:
        raise UnavailableError(
            "lowering a model anew needs onnx, onnx_ir and safetensors",
            got=f"{', '.join(missing)} not installed",
            next_step=f"pip install {' '.join(missing)}",
        )


def _missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def require_export() -> None:
    """Raises UnavailableError, with the command that helps, when a package that exporting needs is not installed."""
    missing = _missing(EXPORT_PACKAGES)
    if missing:
        raise UnavailableError(
            "reading PyTorch models needs the export extra",
            got=f"{', '.join(missing)} not installed",
            expected="torch, onnx, onnx_ir, onnxscript and safetensors",
            next_step="pip install '.[export]' in the attn-deploy source folder",
        )
