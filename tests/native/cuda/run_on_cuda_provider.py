"""Runs a model once with ONNX Runtime's CUDA provider and the library given, in a process of its own:

run_on_cuda_provider.py LIBRARY MODEL FEEDS.npz OUTPUTS.npz; prints each node and the provider that took it.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def main(library: str, model: str, feeds: str, outputs: str) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            print(node.op_type, part.ep_name)
    with np.load(feeds) as arrays:
        results = session.run(None, dict(arrays))
    np.savez(outputs, *results)


if __name__ == "__main__":
    main(*sys.argv[1:])
