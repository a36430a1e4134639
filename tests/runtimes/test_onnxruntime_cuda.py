"""ONNX Runtime on CUDA where it cannot run: what is missing is named with its command. And which nodes must be on the
GPU.

What needs a session is in upon_stand_ins/ (calls) and test_gpu_onnxruntime.py (numbers, on a GPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from attn_deploy.errors import NotAsAskedError, UnavailableError
from attn_deploy.runtimes import RunNode, TensorInfo, onnxruntime_cuda
from attn_deploy.runtimes.cuda_array import is_device_tensor
from attn_deploy.runtimes.cuda_errors import is_out_of_memory

sys.path.insert(0, str(Path(__file__).parent))  # for cuda_stand_ins

import cuda_stand_ins
from cuda_stand_ins import libraries

GPU, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
_REASON = cuda_stand_ins.missing_for_sessions()
needs_wheel = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
TELL = "from attn_deploy.runtimes import onnxruntime_cuda; print(onnxruntime_cuda.availability())"


def told(environment: dict[str, str]) -> str:
    """The reason that a process in this environment gives."""
    done = subprocess.run([sys.executable, "-c", TELL], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(GPU in onnxruntime.get_available_providers(), reason="the CUDA flavour is installed here")
def test_the_cpu_flavour_is_told_with_the_command_that_replaces_it() -> None:
    reason = str(onnxruntime_cuda.availability())
    assert f"onnxruntime {onnxruntime.__version__} is the CPU flavour" in reason
    assert reason.endswith("pip install 'onnxruntime-gpu[cuda,cudnn]' 'cuda-core[cu13]'")
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && " in reason
    with pytest.raises(UnavailableError, match="onnxruntime-cuda cannot run here") as caught:
        onnxruntime_cuda.open_session(b"")
    assert (caught.value.got, caught.value.exit_code) == (reason, 6)


def test_without_onnxruntime_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert str(onnxruntime_cuda.availability()).startswith("onnxruntime-gpu is not installed")


def test_a_damaged_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())  # type: ignore[arg-type]
    assert "two flavours over each other" in str(onnxruntime_cuda.availability())


@needs_wheel
def test_without_cuda_core_the_command_is_told(tmp_path: Path) -> None:
    environment = libraries.environment(cuda_stand_ins.build(cuda_stand_ins.CACHE))
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['cuda.core'] = None\n")
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    reason = told(environment)
    assert reason.startswith("cuda-core is not installed")
    assert reason.endswith("pip install 'cuda-core[cu13]'")


@needs_wheel
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="a driver is here")
def test_without_a_driver_the_driver_is_asked_for(tmp_path: Path) -> None:
    environment = libraries.environment(tmp_path)  # no stand-ins
    reason = told(environment)
    assert reason.startswith("no NVIDIA driver")
    assert "install NVIDIA driver 580 or newer" in reason


def with_some_libraries(folder: Path) -> dict[str, str]:
    """The environment of a process that finds all of NVIDIA's libraries but cuRAND and cuDNN."""
    stand_ins = cuda_stand_ins.build(cuda_stand_ins.CACHE)
    for library in set(libraries.LIBRARIES) - {"libcurand.so.10", "libcudnn.so.9"}:
        (folder / library).symlink_to(stand_ins / library)
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['nvidia'] = None\n")  # no pip packages
    environment = libraries.environment(folder)
    return {**environment, "PYTHONPATH": os.pathsep.join([str(folder), environment["PYTHONPATH"]])}


@needs_wheel
def test_cuda_libraries_that_do_not_load_are_named(tmp_path: Path) -> None:
    reason = told(with_some_libraries(tmp_path))
    assert "is built for CUDA 13 and cuDNN 9" in reason
    assert "does not find libcurand.so.10, libcudnn.so.9: pip install nvidia-cuda-runtime nvidia-cuda-nvrtc" in reason
    assert reason.endswith("nvidia-cudnn-cu13")


@needs_wheel
def test_cuda_libraries_are_found_in_pip_packages(tmp_path: Path) -> None:
    environment = with_some_libraries(tmp_path)
    (tmp_path / "sitecustomize.py").unlink()
    for library, package in (("libcurand.so.10", "cu13"), ("libcudnn.so.9", "cudnn")):
        folder = tmp_path / "nvidia" / package / "lib"
        folder.mkdir(parents=True)
        (folder / library).symlink_to(cuda_stand_ins.build(cuda_stand_ins.CACHE) / library)
    assert told(environment) == "None"


@needs_wheel
def test_an_older_driver_is_told_with_both_versions() -> None:
    environment = libraries.environment(cuda_stand_ins.build(cuda_stand_ins.CACHE))
    assert told(environment | {"STAND_IN_DRIVER": "12040"}).startswith("the driver supports CUDA 12.4, and CUDA 13")
    assert told(environment) == "None"


# -- what must be on the GPU ------------------------------------------------------------------------------------------


def node(op_type: str, provider: str, *operands: tuple[str, tuple[int, ...]]) -> RunNode:
    infos = tuple(TensorInfo(dtype, shape) for dtype, shape in operands)
    return RunNode(f"block.0/{op_type}", op_type, provider, infos, infos[:1], 1.0)


def test_nodes_on_the_gpu_and_shapes_on_the_cpu_are_as_asked() -> None:
    onnxruntime_cuda.check_nodes([
        node("MatMul", GPU, ("float16", (8, 768))),
        node("Concat", CPU, ("int64", (4,))),
        node("Mul", CPU, ("float32", (4,))),  # a Resize's scales
        node("Range", CPU, ("int64", (512,))),
    ])  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        node("Softmax", CPU, ("float32", (4,))),
        node("Add", CPU, ("float32", (1, 197, 768))),
        node("Cast", CPU, ("float16", (17,))),
        node("Transpose", CPU, ("bfloat16", (64, 64))),
    ],
    ids=lambda n: n.op_type,
)
def test_a_node_that_computes_elsewhere_is_named(wrong: RunNode) -> None:
    with pytest.raises(NotAsAskedError, match="do not run on the GPU") as caught:
        onnxruntime_cuda.check_nodes([node("MatMul", GPU, ("float16", (8, 768))), wrong])
    assert caught.value.got == f"1 of 2 elsewhere: block.0/{wrong.op_type} ({wrong.op_type})"
    assert caught.value.exit_code == 4


def test_long_lists_of_nodes_are_cut() -> None:
    assigned = [(f"n{i}", "Softmax", CPU) for i in range(20)]
    with pytest.raises(NotAsAskedError) as caught:
        onnxruntime_cuda.check_assignment(assigned)
    shown = ", ".join(f"n{i} (Softmax)" for i in range(8))
    assert caught.value.got == f"20 of 20 elsewhere: {shown}, ..."


# -- small rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [np.zeros(3), torch.zeros(3), torch.zeros(3, requires_grad=True), [1.0], "text"], ids=repr
)
def test_what_is_in_host_memory_is_no_tensor_of_the_gpu(value: Any) -> None:
    assert not is_device_tensor(value)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA_ERROR_OUT_OF_MEMORY: The API call failed",
        "CUDA failure 2: out of memory ; GPU=0",
        "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1073741824",
        "bfc_arena.cc:359 Available memory of 3 is smaller than requested bytes of 9",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_out_of_memory_is_known_in_the_words_of_each_library(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text[:10]))
