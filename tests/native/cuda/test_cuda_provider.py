"""The adapter with the real onnxruntime-gpu: its CUDA provider takes the operators and hands them its own memory.

It runs upon the stand-ins of tests/runtimes, whose device memory is the host's: there the emulated kernels' numbers are
real.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from attn_deploy.ops import DOMAIN, FORMS

sys.path.insert(0, str(Path(__file__).parents[2] / "runtimes"))
import cuda_stand_ins

pytestmark = pytest.mark.skipif(cuda_stand_ins.missing() is not None, reason=str(cuda_stand_ins.missing()))

SCRIPT = Path(__file__).with_name("run_on_cuda_provider.py")


def model_of(form: str, dtype: type, constants: dict[str, np.ndarray], attributes: dict[str, float | int]) -> bytes:
    """One node and no casts, which no kernel would run for."""
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    names = [operand.name for operand in FORMS[form].inputs]
    inputs = [onnx.helper.make_tensor_value_info(n, element, None) for n in names if n not in constants]
    node = onnx.helper.make_node(form, names, list(FORMS[form].outputs), domain=DOMAIN, name="attention", **attributes)
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [node],
            "one_node",
            inputs,
            [onnx.helper.make_tensor_value_info(name, element, None) for name in FORMS[form].outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def run(tmp_path: Path, library: Path, model: bytes, feeds: dict[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    (tmp_path / "model.onnx").write_bytes(model)
    np.savez(tmp_path / "feeds.npz", **feeds)  # type: ignore[arg-type]
    out = tmp_path / "outputs.npz"
    done = cuda_stand_ins.run_python(SCRIPT, library, tmp_path / "model.onnx", tmp_path / "feeds.npz", out)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as arrays:
        return done.stdout.split("\n")[:-1], arrays["arr_0"]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_windowed_attention_runs_on_the_cuda_provider(
    tmp_path: Path, emulated: Path, monkeypatch: pytest.MonkeyPatch, dtype: type
) -> None:
    """Constants are in device memory by the time that the index map is checked."""
    monkeypatch.setenv("EMULATED_PROVIDER", "CUDAExecutionProvider")
    rng = np.random.default_rng(0)
    form = "PackedAttentionIndexedPaddedBias"
    constants = {
        "index": np.array([[3, 0, 2], [1, -1, 4]]),
        "fill": rng.standard_normal((3, 2, 8)).astype(dtype),
        "windows_bias": rng.standard_normal((1, 2, 3, 3)).astype(dtype),
        "bias_index": np.zeros(2, np.int64),
    }
    qkv = rng.standard_normal((2, 5, 3, 2, 8)).astype(dtype)
    attributes = {"scale": 0.5, "tokens": 5}
    nodes, output = run(tmp_path, emulated, model_of(form, dtype, constants, attributes), {"qkv": qkv})
    assert nodes == [f"{form} CUDAExecutionProvider"]
    (expected,) = FORMS[form].reference(qkv, *constants.values(), **attributes)
    np.testing.assert_allclose(output, expected, atol=5e-3 if dtype is np.float16 else 1e-5)


def test_without_its_kernel_the_cuda_provider_does_not_take_the_node(
    tmp_path: Path, emulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library registered for the CPU: what the test above sees is the registration's doing."""
    monkeypatch.setenv("EMULATED_PROVIDER", "CPUExecutionProvider")
    x, gate = np.ones((1, 2, 3, 3), np.float32), np.full((1, 2, 1, 1), 2, np.float32)
    nodes, output = run(tmp_path, emulated, model_of("GateRelu", np.float32, {}, {}), {"x": x, "gate": gate})
    assert nodes == ["GateRelu CPUExecutionProvider"]
    np.testing.assert_array_equal(output, 2 * x)
