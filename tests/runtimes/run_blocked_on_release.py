"""Rewrites models with the ONNX Runtime that is first on the path: `python run_blocked_on_release.py LIBRARY_FOLDER
MODEL...` prints its version, and for each model a line of JSON: why not or null, and the operators that run."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path

import onnx
import onnxruntime

from attn_deploy.runtimes import native, onnxruntime_blocked


def main(folder: str, *models: str) -> None:
    native.library_folders = lambda: iter([Path(folder)])
    onnxruntime_blocked.TESTED = (onnxruntime.__version__,)
    print(onnxruntime.__version__)
    for model in models:
        reason = onnxruntime_blocked.prepare(Path(model), library=False)
        found = onnxruntime_blocked.find(Path(model))
        nodes = onnx.load_from_string(found).graph.node if isinstance(found, bytes) else []
        print(json.dumps([reason, dict(collections.Counter(node.op_type for node in nodes))]))


if __name__ == "__main__":
    main(*sys.argv[1:])
