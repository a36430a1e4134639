"""What needs an extra says so before it fails on an import."""

from __future__ import annotations

import importlib.util

from attn_deploy.errors import UnavailableError

EXPORT_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors")


def require_export() -> None:
    """Raises UnavailableError, with the command that helps, when a package that exporting needs is not installed."""
    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(
            "reading PyTorch models needs the export extra",
            got=f"{', '.join(missing)} not installed",
            expected="torch, onnx, onnx_ir, onnxscript and safetensors",
            next_step="pip install '.[export]' in the attn-deploy source folder",
        )
