"""The CUDA library compiled for the host's emulation of a GPU, and one-node models that run on it in ONNX Runtime.

The emulation (emulation/) replaces only device.cuh and the CUDA runtime: kernels, launchers and the adapter are the
sources that nvcc compiles. Its operators are registered for the CPU provider, so that the installed ONNX Runtime runs
them. With `make test-gpu` the same tests run on a real GPU, through the library that
`python -m attn_deploy.runtimes.native.cuda.build` made.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from attn_deploy.ops import DOMAIN, FORMS, VERSION
from attn_deploy.runtimes import availability
from attn_deploy.runtimes.native import cuda
from attn_deploy.target import Target

NATIVE = Path(__file__).parents[3] / "runtimes" / "native"
CUDA = NATIVE / "cuda"
EMULATION = Path(__file__).parent / "emulation"
BUILT = Path(__file__).parents[3] / "build" / "emulated_cuda"

ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""NumPy's name -> TensorProto.DataType."""

Feeds = dict[str, np.ndarray]


def compile_emulated(name: str, *options: str, extra: Sequence[Path] = (), program: bool = False) -> Path:
    """The library's sources and the emulation, compiled with g++ or clang++; a program has only the kernels and what
    `extra` has. Kept below build/ under the hash of all that it is made from: it takes longer than the tests."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ to compile the emulation")
    defines = ["EMULATION", "PROVIDER=emulation::Provider()", 'VERSION="0"', 'CUDA_ARCHITECTURES="emulated"']
    adapter = [*sorted(CUDA.glob("*.cc")), NATIVE / "ort_adapter.cc", NATIVE / "registration.cc"]
    sources = [EMULATION / "simulator.cc", EMULATION / "runtime.cc", NATIVE / "gate_plan.cc", *extra]
    sources += [] if program else adapter
    command = [
        compiler, "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *options,
        *(f"-DATTN_DEPLOY_{define}" for define in defines), f"-I{EMULATION}", f"-I{CUDA}",
        *([] if program else ["-shared", "-Wl,--no-undefined"]), *map(str, sources),
        "-x", "c++", *map(str, sorted(CUDA.glob("*.cu"))),
    ]  # fmt: skip
    key = hashlib.sha256(" ".join(command).encode())
    for file in sorted([*EMULATION.iterdir(), *CUDA.glob("*.[ch]*"), *NATIVE.glob("*.cc"), *NATIVE.glob("*.h")]):
        key.update(file.read_bytes())
    target = BUILT / key.hexdigest()[:16] / name
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_name(f"{name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        made.replace(target)
    return target


@pytest.fixture(scope="session")
def emulated() -> Path:
    return compile_emulated("libattn_deploy_cuda_emulated.so", "-O1")


@dataclass
class Gpu:
    """What tests can set of the GPU they run on: nothing of a real one, which has no `functions`."""

    functions: ctypes.CDLL | None = None

    def set(self, *, multiprocessors: int = 1, compute_capability: int = 90, order: int = 0) -> None:
        """`order` 0: threads take turns in their order; others are seeds of random ones."""
        if self.functions is not None:
            self.functions.emulation_set_device(multiprocessors, compute_capability)
            self.functions.emulation_set_order(order)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to what `dtype` can hold, ties to even."""
    values = values.astype(np.float32)
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return values


def one_node_model(
    form_name: str,
    dtype: str,
    attributes: dict[str, float | int] | None = None,
    constants: Feeds | None = None,
    shapes: dict[str, list[int | str]] | None = None,
    node_name: str = "block/attention",
) -> bytes:
    """A node of the form between casts: inputs and outputs are float32, the node computes in `dtype`."""
    form = FORMS[form_name]
    element = ELEMENT_TYPES[dtype]
    constants, shapes = constants or {}, shapes or {}
    inputs, nodes, names = [], [], []
    for operand in form.inputs:
        own = {"int64": onnx.TensorProto.INT64, "bool": onnx.TensorProto.BOOL}.get(operand.dtype)
        if operand.name not in constants:
            onnx_type = own or onnx.TensorProto.FLOAT
            inputs.append(onnx.helper.make_tensor_value_info(operand.name, onnx_type, shapes.get(operand.name)))
        names.append(operand.name if own else f"{operand.name}_cast")
        if not own:
            nodes.append(onnx.helper.make_node("Cast", [operand.name], [names[-1]], to=element))
    results = [f"{name}_typed" for name in form.outputs]
    nodes.append(onnx.helper.make_node(form_name, names, results, domain=DOMAIN, name=node_name, **(attributes or {})))
    for name, typed in zip(form.outputs, results, strict=True):
        nodes.append(onnx.helper.make_node("Cast", [typed], [name], to=onnx.TensorProto.FLOAT))
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in form.outputs]
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "one_node", inputs, outputs, initializers),
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def open_session(model: bytes, library: Path, provider: str = "CPUExecutionProvider") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4  # failed runs are raised; they need no log
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=[provider])


@dataclass
class Runner:
    """Runs a form on one GPU; keeps its sessions."""

    library: Path
    provider: str
    gpu: Gpu
    sessions: dict[tuple[object, ...], onnxruntime.InferenceSession] = field(default_factory=dict)

    def __call__(
        self, form: str, dtype: str, feeds: Feeds, device: tuple[int, int] = (1, 90), **attributes: float
    ) -> list[np.ndarray]:
        """The form's outputs. A kernel learns its device when its session opens: `device` tells sessions apart."""
        key = (form, dtype, device, *attributes.items())
        if key not in self.sessions:
            model = one_node_model(form, dtype, dict(attributes))
            self.sessions[key] = open_session(model, self.library, self.provider)
        outputs: list[np.ndarray] = self.sessions[key].run(None, feeds)
        return outputs


@functools.cache
def missing_for_a_real_gpu() -> str | None:
    """Why tests cannot run on a real GPU here, and what to do; None when they can."""
    return availability(Target.ONNXRUNTIME_CUDA) or (None if cuda.library_path() else cuda.status().reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Here and not in a fixture: the skips are then one line of the summary."""
    if item.get_closest_marker("gpu") is not None and (reason := missing_for_a_real_gpu()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session", params=["emulated", pytest.param("real", marks=pytest.mark.gpu)])
def run_form(request: pytest.FixtureRequest) -> Runner:
    """The same tests run on the emulated GPU and on a real one."""
    if request.param == "real":
        library = cuda.library_path()
        assert library is not None
        return Runner(library, "CUDAExecutionProvider", Gpu())
    emulated = request.getfixturevalue("emulated")
    return Runner(emulated, "CPUExecutionProvider", Gpu(ctypes.CDLL(str(emulated))))


@pytest.fixture
def gpu(run_form: Runner) -> Gpu:
    run_form.gpu.set()
    return run_form.gpu


@pytest.fixture(scope="session")
def round_to() -> Callable[[np.ndarray, str], np.ndarray]:
    return rounded


@pytest.fixture(scope="session")
def make_model() -> Callable[..., bytes]:
    return one_node_model


@pytest.fixture(scope="session")
def open_model() -> Callable[..., onnxruntime.InferenceSession]:
    return open_session


@pytest.fixture(scope="session")
def build_emulated() -> Callable[..., Path]:
    return compile_emulated
