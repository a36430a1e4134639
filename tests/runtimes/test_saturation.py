"""Products of unsigned by signed 8-bit integers on CPUs without VNNI: nothing saturates."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from attn_deploy import environment
from attn_deploy.runtimes import native, onnxruntime, saturation

sys.path.insert(0, str(Path(__file__).parents[1] / "native"))

from test_releases import RELEASES, install

Array = np.ndarray[Any, Any]

EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
SCRIPT = Path(__file__).with_name("run_as_on_a_cpu.py")
CHANNELS, PIXELS = 32, 10

RNG = np.random.default_rng(0)
WEIGHT = RNG.choice(np.array([127, -127, 120], np.int8), (CHANNELS, CHANNELS), p=[0.6, 0.2, 0.2])
"""Most products have one sign: two neighbours of them do not fit into 16 bits."""

MODELS = {
    "convolution": f"""
      agraph (float[1, {CHANNELS}, {PIXELS}, {PIXELS}] x) => (float[1, {CHANNELS}, {PIXELS}, {PIXELS}] y)
      {{
        q = QuantizeLinear (x, sx, zx)
        d = DequantizeLinear (q, sx, zx)
        e = DequantizeLinear <axis: int = 0> (w, sw, zw)
        c = Conv (d, e)
        r = QuantizeLinear (c, sy, zy)
        y = DequantizeLinear (r, sy, zy)
      }}""",
    "product": f"""
      agraph (float[{PIXELS}, {CHANNELS}] x) => (float[{PIXELS}, {CHANNELS}] y)
      {{
        q = QuantizeLinear (x, sx, zx)
        d = DequantizeLinear (q, sx, zx)
        e = DequantizeLinear <axis: int = 1> (w, sw, zw)
        y = MatMul (d, e)
      }}""",
}


def made(name: str) -> tuple[bytes, Array]:
    """A model, and its input: values near the end of their range."""
    is_product = name == "product"
    constants = {
        "sx": np.array(1 / 255, np.float32), "zx": np.array(0, np.uint8), "sw": np.full(CHANNELS, 0.01, np.float32),
        "w": WEIGHT if is_product else WEIGHT[..., None, None], "zw": np.zeros(CHANNELS, np.int8),
        "sy": np.array(0.2, np.float32), "zy": np.array(0, np.uint8),
    }  # fmt: skip
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>{MODELS[name]}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in constants.items())
    shape = (PIXELS, CHANNELS) if is_product else (1, CHANNELS, PIXELS, PIXELS)
    return model.SerializeToString(), np.random.default_rng(1).uniform(0.8, 1.0, shape).astype(np.float32)


def expected(name: str, x: Array, *, saturating: bool = False) -> Array:
    """In integers without end, or in pairs that are cut off at 16 bits."""
    levels = np.clip(np.rint(x * np.float32(255)), 0, 255).astype(np.int64)
    weight = WEIGHT.astype(np.int64) if name == "product" else WEIGHT.T.astype(np.int64)
    rows = levels if name == "product" else levels[0].reshape(CHANNELS, -1).T
    products = rows[:, :, None] * weight
    if saturating:
        products = np.clip(products[:, ::2] + products[:, 1::2], -(2**15), 2**15 - 1)
    sums = products.sum(axis=1) * (0.01 / 255)
    if name == "product":
        return sums
    return (np.clip(np.rint(sums / np.float32(0.2)), 0, 255) * np.float32(0.2)).T.reshape(x.shape)


def test_the_models_would_saturate() -> None:
    for name in MODELS:
        _, x = made(name)
        right = expected(name, x)
        assert np.abs(expected(name, x, saturating=True) - right).max() > 0.3 * np.abs(right).max()


@pytest.mark.skipif(EMULATOR is None or platform.machine() != "x86_64", reason="no qemu-x86_64 to emulate a CPU with")
@pytest.mark.parametrize("release", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in RELEASES)])
def test_a_cpu_without_vnni_gives_the_right_numbers(release: str | None, tmp_path: Path) -> None:
    """Haswell, which has AVX2 and no VNNI, under an emulator. By itself ONNX Runtime is wrong there, which shows that
    the emulator runs the kernels in question."""
    paths = [] if release is None else [str(install(release))]
    inputs = {}
    for name in MODELS:
        content, inputs[name] = made(name)
        (tmp_path / f"{name}.onnx").write_bytes(content)
        np.savez(tmp_path / f"{name}.npz", x=inputs[name])
    done = subprocess.run(
        [str(EMULATOR), "-cpu", "Haswell", sys.executable, str(SCRIPT), *(str(tmp_path / f"{n}.onnx") for n in MODELS)],
        # the emulator shows the host's /proc/cpuinfo: the variable says what there is
        env={**os.environ, native.ISA_VARIABLE: "avx2", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([*paths, *(str(Path(p).resolve()) for p in sys.path if p)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, x in inputs.items():
        right, got = expected(name, x), np.load(tmp_path / f"{name}.out.npz")
        assert np.abs(got["ours"] - right).max() < 1e-3 * np.abs(right).max(), name
        assert np.abs(got["stock"] - right).max() > 0.1 * np.abs(right).max(), name


# -- what is known of a CPU --------------------------------------------------------------------------------------------

CASES = {
    # architecture, what the library says, what the system says, forced -> saturates
    "AVX-512 VNNI": ("x86_64", "avx512_vnni", ("avx2", "avx512f", "avx512_vnni"), "", False),
    "AVX-VNNI without a library": ("x86_64", "none", ("avx2", "avx_vnni"), "", False),
    "AVX2": ("x86_64", "avx2", ("avx2",), "", True),
    "AVX-512 without VNNI": ("AMD64", "avx512", (), "", True),
    "nothing known": ("AMD64", "none", (), "", True),
    "forced to AVX2": ("x86_64", "avx2", ("avx2", "avx512_vnni"), "avx2", True),
    "bodies are forced": ("x86_64", "none", ("avx2", "avx512_vnni"), "none", False),
    "ARM": ("aarch64", "neon", ("neon",), "", False),
}


@pytest.fixture
def fresh() -> Iterator[None]:
    saturation.saturates.cache_clear()
    yield
    saturation.saturates.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("case", CASES)
def test_which_cpus_saturate(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, kernels, known, forced, answer = CASES[case]
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(saturation, "_kernels", lambda: kernels)
    monkeypatch.setattr(environment, "instruction_sets", lambda: known)
    monkeypatch.setenv(native.ISA_VARIABLE, forced)
    assert saturation.saturates() == answer
    option = saturation.EXACT
    settings = onnxruntime.cpu_settings(1, library=False)
    if answer:
        assert settings.get_session_config_entry(option) == "1"
    else:
        with pytest.raises(RuntimeError, match=option):
            settings.get_session_config_entry(option)
