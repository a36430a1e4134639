"""attn-deploy: export PyTorch models with attention, prove them, and run them without PyTorch.

Names are imported when they are used: `import attn_deploy` loads neither torch nor onnx, nor NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attn_deploy.benchmarking import benchmark
    from attn_deploy.errors import AttnDeployError
    from attn_deploy.loading import BundleSession, Prediction, load
    from attn_deploy.pipeline import ExportOptions, ExportResult, export_model
    from attn_deploy.validation import validate

__version__ = "0.1.0"

__all__ = [
    "AttnDeployError",
    "BundleSession",
    "ExportOptions",
    "ExportResult",
    "Prediction",
    "__version__",
    "benchmark",
    "export_model",
    "load",
    "validate",
]

_HOMES = {
    "AttnDeployError": "attn_deploy.errors",
    "BundleSession": "attn_deploy.loading",
    "ExportOptions": "attn_deploy.pipeline",
    "ExportResult": "attn_deploy.pipeline",
    "Prediction": "attn_deploy.loading",
    "benchmark": "attn_deploy.benchmarking",
    "export_model": "attn_deploy.pipeline",
    "load": "attn_deploy.loading",
    "validate": "attn_deploy.validation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attn_deploy' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
