"""Prints which kernel ONNX Runtime's CUDA provider takes for each attention of some models: run by the test beside it,
in a process of its own whose onnxruntime is the CUDA flavour upon stand-ins."""

from __future__ import annotations

import os
import sys

os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"

import numpy as np
import onnxruntime

KINDS = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}


def main(*models: str) -> None:
    for path in models:
        providers = [("CUDAExecutionProvider", {}), "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, providers=providers)
        inputs = session.get_inputs()
        feeds = {i.name: np.ones([d if isinstance(d, int) else 2 for d in i.shape], KINDS[i.type]) for i in inputs}
        session.run(None, feeds)


if __name__ == "__main__":
    main(*sys.argv[1:])
