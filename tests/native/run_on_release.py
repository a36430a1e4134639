"""run_on_release.py LIBRARY FOLDER: every model of the folder on whichever ONNX Runtime this process finds, with its
kernel out of the library, against the expected output beside it; the same bits for 1, 2, 3 and 8 threads. Imports
nothing but NumPy and onnxruntime, so that any release can run it. Prints the release and the number of models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(library: str, folder: Path) -> None:
    faults = []
    models = sorted(folder.glob("*.onnx"))
    for model in models:
        feeds = dict(np.load(model.with_suffix(".npz")))
        expected = feeds.pop("expected")
        try:
            outputs = [run(model, library, feeds, threads) for threads in (1, 2, 3, 8)]
        except Exception as error:
            faults.append(f"{model.stem}: {error}")
            continue
        scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
        if outputs[0].shape != expected.shape or not np.abs(outputs[0] - expected).max(initial=0.0) <= 1e-5 * scale:
            faults.append(f"{model.stem}: not the reference")
        if any(not np.array_equal(outputs[0], other) for other in outputs[1:]):
            faults.append(f"{model.stem}: threads change the bits")
    print(onnxruntime.__version__, len(models))
    sys.exit("\n".join(faults) or 0)


def run(model: Path, library: str, feeds: dict[str, np.ndarray], threads: int) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, feeds)[0]
    return output


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
