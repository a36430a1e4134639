"""Answers one question about a model with the real onnxruntime-gpu: run by cuda_stand_ins in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state


def main(question: str, model: Path, answer: Path, options: dict[str, str], *more: str) -> None:
    answer.write_text(json.dumps(QUESTIONS[question](model, options, *more)))


def placements(model: Path, options: dict[str, str]) -> list[tuple[str, str, str, str]]:
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = _session(model, settings, options)
    return [
        (node.name, node.op_type, node.domain, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def optimized(model: Path, options: dict[str, str], out: str) -> None:
    settings = onnxruntime.SessionOptions()
    settings.optimized_model_filepath = out
    _session(model, settings, options)


def kernels(model: Path, options: dict[str, str]) -> list[tuple[str, str, str, int, int, dict[str, list[str]]]]:
    rows = []
    for kernel in onnxruntime_pybind11_state.get_all_opkernel_def():
        since, until = kernel.version_range
        rows.append((kernel.provider, kernel.domain, kernel.op_name, since, until, kernel.type_constraints))
    return rows


def _session(
    model: Path, settings: onnxruntime.SessionOptions, options: dict[str, str]
) -> onnxruntime.InferenceSession:
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(str(model), settings, providers=[("CUDAExecutionProvider", options)])


QUESTIONS = {"placements": placements, "optimized": optimized, "kernels": kernels}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]), *sys.argv[5:])
