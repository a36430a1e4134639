"""What a made TensorRT is told to do wrong: by a model's metadata `made_tensorrt`, or the variable MADE_TENSORRT.

errors          rows (node, operator, text) that the parser gives
fails_to_build  the ErrorCodeTRT that the builder reports
capturable      false: no run of the engine can be captured into a CUDA graph
widens          true: the engine's layers compute in FP32 where the model says FP16
log             a file that gets a line for every engine that is built (only in the variable)
"""

from __future__ import annotations

import json
import os
from typing import Any

import onnx

KEY = "made_tensorrt"
VARIABLE = "MADE_TENSORRT"


def told(model: onnx.ModelProto | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ.get(VARIABLE, "{}"))
    for entry in model.metadata_props if model is not None else ():
        if entry.key == KEY:
            found |= json.loads(entry.value)
    return found
