"""The INT8 that others' tools make of a plain ONNX model. Run as a program, so that what a tool leaves in its process
spoils no measurement:

    python bench/int8_peers.py openvino|onnxruntime PLAIN.onnx CALIBRATION.npz OUT transformer|mixed|plain
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from int8_cases import Kind

from attn_deploy import environment
from attn_deploy.runtimes import onnxruntime as ort_runtime
from attn_deploy.runtimes import openvino as openvino_runtime

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

TOOLS = {"openvino": ("openvino", "nncf"), "onnxruntime": ("onnxruntime",)}
"""The packages whose versions decide what a tool makes."""


def opened(tool: str, model: Path, threads: int) -> Run:
    """A session on what `quantized` gave."""
    if tool == "openvino":
        return openvino_runtime.open_session(model, threads=threads).run
    session = ort_runtime.create_session(model, ort_runtime.cpu_settings(threads, False))
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def quantized(tool: str, plain: Path, calibration: Path, kind: Kind, kept_in: Path) -> Path:
    """The quantized model, made by a process of its own where it is not there from an earlier run.

    Raises RuntimeError with the last line that the tool printed when it fails.
    """
    key = hashlib.sha256(f"{tool} {kind} {[environment.versions().get(p) for p in TOOLS[tool]]}".encode())
    for file in (Path(__file__), plain, calibration):
        key.update(file.read_bytes())
    out = kept_in / key.hexdigest()[:16] / ("model.xml" if tool == "openvino" else "model.onnx")
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, tool, str(plain), str(calibration), str(out), kind]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            out.unlink(missing_ok=True)
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise RuntimeError(f"it fails on this model: {said}")
    return out


def _feeds(calibration: Path) -> list[dict[str, np.ndarray]]:
    """Of an .npz with one array [samples, ...] for each input: one feed of batch 1 for each sample."""
    with np.load(calibration) as arrays:
        held = {name: arrays[name] for name in arrays.files}
    return [{name: array[i : i + 1] for name, array in held.items()} for i in range(len(next(iter(held.values()))))]


def by_nncf(plain: Path, calibration: Path, out: Path, kind: Kind) -> None:
    """NNCF's post-training quantization for OpenVINO on a CPU."""
    import nncf
    import openvino

    feeds = _feeds(calibration)
    settings: dict[str, Any] = {}
    if kind is Kind.TRANSFORMER:  # SmoothQuant, and the preset `mixed`
        settings["model_type"] = nncf.ModelType.TRANSFORMER
    elif kind is Kind.MIXED:
        settings["preset"] = nncf.QuantizationPreset.MIXED
    model = nncf.quantize(
        openvino.Core().read_model(str(plain)), nncf.Dataset(feeds), target_device=nncf.TargetDevice.CPU,
        subset_size=len(feeds), fast_bias_correction=True, **settings,
    )  # fmt: skip
    openvino.save_model(model, str(out), compress_to_fp16=False)


def by_onnxruntime(plain: Path, calibration: Path, out: Path, kind: Kind) -> None:
    """quantize_static as its documentation advises for a CPU: QDQ, weights per channel, activations unsigned; weights
    of 7 bits where there is no VNNI. Of a transformer the products with weights only: with all that it quantizes by
    default ViT-Tiny's top-1 is 0.4 %."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = out.with_name("prepared.onnx")
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    exact = {"avx512_vnni", "avx_vnni", "neon_dotprod"} & set(environment.instruction_sets())
    quantize_static(
        str(prepared), str(out), _Reader(_feeds(calibration)), quant_format=QuantFormat.QDQ, per_channel=True,
        reduce_range=not exact, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"] if kind is Kind.TRANSFORMER else None,
        calibrate_method=CalibrationMethod.MinMax, extra_options={"MatMulConstBOnly": True},
    )  # fmt: skip
    prepared.unlink()


class _Reader:
    """Feeds one by one, in the form of onnxruntime.quantization.CalibrationDataReader."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def main() -> int:
    tool, plain, calibration, out, kind = sys.argv[1:]
    logging.getLogger().setLevel(logging.ERROR)
    make = by_nncf if tool == "openvino" else by_onnxruntime
    make(Path(plain), Path(calibration), Path(out), Kind(kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
