"""The native library and kernel_runner, built once with warnings as errors, and one-node models that use them."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from attn_deploy.ops import DOMAIN, FORMS, VERSION
from attn_deploy.runtimes import native

sys.path.insert(0, str(Path(__file__).parent))  # for native_build and kernel_runner, here and in tests

import native_build
from kernel_runner import KernelRunner

RUNNER_VARIABLE = "ATTN_DEPLOY_KERNEL_RUNNER"
"""The command of a kernel_runner built otherwise (sanitizers, another processor under an emulator): only the tests of
kernels are run, with it."""

ISAS_VARIABLE = "ATTN_DEPLOY_KERNEL_ISAS"
"""The instruction sets of that runner, separated by commas [default: those of this machine's architecture]."""

LIBRARY_VARIABLE = "ATTN_DEPLOY_TEST_LIBRARY"
"""A library built otherwise: only the tests of operators are run, with it."""

ISAS_OF_THIS_MACHINE = "neon" if platform.machine() in ("aarch64", "arm64") else "avx2,avx512"

ISAS = os.environ.get(ISAS_VARIABLE, ISAS_OF_THIS_MACHINE).split(",")

WITH_INT8_PRODUCTS = {"avx2": "avx_vnni", "avx512": "avx512_vnni", "neon": "neon_dotprod"}
"""Instruction sets for which only kernels on 8-bit integers are compiled, beside those that they extend."""

Dims = list[str | int | None]
Feeds = Mapping[str, np.ndarray]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With a runner or a library built otherwise, only the tests that it is built for run."""
    runner, library = os.environ.get(RUNNER_VARIABLE), os.environ.get(LIBRARY_VARIABLE)
    if not runner and not library:
        return

    def is_meant(item: pytest.Item) -> bool:
        names = getattr(item, "fixturenames", ())
        runs_kernels = "kernel_runner" in names or "int8_kernel_runner" in names
        return runs_kernels if runner else "library" in names and not runs_kernels

    others = [item for item in items if not is_meant(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.fixture(scope="session")
def source() -> Path:
    return native_build.SOURCE


@pytest.fixture(scope="session")
def library() -> Path:
    """The library of this source tree; the installed one where nothing can be built."""
    if os.environ.get(LIBRARY_VARIABLE):
        return Path(os.environ[LIBRARY_VARIABLE])
    if native_build.can_build():
        return native_build.library_in(native_build.build("release"))
    installed = native.library_path()
    if installed is None:
        pytest.skip("no native library is installed, and no cmake and c++ to build it")
    return installed


@pytest.fixture(scope="session", params=ISAS)
def kernel_runner(request: pytest.FixtureRequest) -> KernelRunner:
    """Runs kernels on arrays, once with each instruction set that was compiled."""
    return _runner_on(request.param)


@pytest.fixture(scope="session", params=[*ISAS, *(WITH_INT8_PRODUCTS[isa] for isa in ISAS)])
def int8_kernel_runner(request: pytest.FixtureRequest) -> KernelRunner:
    """The same for kernels on 8-bit integers, which are compiled for more instruction sets."""
    return _runner_on(request.param)


def _runner_on(isa: str) -> KernelRunner:
    command = tuple(shlex.split(os.environ.get(RUNNER_VARIABLE, "")))
    if not command:
        if not native_build.can_build():
            pytest.skip("no cmake and c++ to build kernel_runner")
        command = (str(native_build.runner_in(native_build.build("release"))),)
    runner = KernelRunner(command, isa)
    if not runner.available():
        pytest.skip(f"this CPU has no {runner.isa}")
    return runner


def one_node_model(
    form_name: str,
    *,
    node_name: str = "block/node",
    attributes: Mapping[str, float | int] | None = None,
    constants: Feeds | None = None,
    shapes: Mapping[str, Dims | None] | None = None,
    dtype: str = "FLOAT",
    with_body: bool = True,
) -> bytes:
    """One node of a form, its function body beside it. `constants`: the inputs that are initializers, as weights are.
    Inputs have no shape in the graph unless `shapes` gives one; those that are float32 in the form are of `dtype`."""
    form = FORMS[form_name]
    constants, shapes = constants or {}, shapes or {}
    element_types = {"float32": onnx.TensorProto.DataType.Value(dtype), "int64": onnx.TensorProto.INT64,
                     "bool": onnx.TensorProto.BOOL, "uint8": onnx.TensorProto.UINT8}  # fmt: skip
    inputs = [
        onnx.helper.make_tensor_value_info(i.name, element_types[i.dtype], shapes.get(i.name))
        for i in form.inputs
        if i.name not in constants
    ]
    outputs = [
        onnx.helper.make_tensor_value_info(name, element_types[form.output_dtype], None) for name in form.outputs
    ]
    node = onnx.helper.make_node(
        form_name, [i.name for i in form.inputs], form.outputs, domain=DOMAIN, name=node_name, **(attributes or {})
    )
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_node", inputs, outputs, initializers),
        functions=[onnx.parser.parse_function(form.function_text())] if with_body else [],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def gate_model(
    form: str, *, node_name: str = "block/gate", with_body: bool = True, dtype: str = "FLOAT", x: Dims | None = None
) -> bytes:
    return one_node_model(form, node_name=node_name, with_body=with_body, dtype=dtype, shapes={"x": x})


def open_session(
    model: bytes, *, library: Path | None, threads: int = 1, profile_to: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # failed runs are raised; they need no log
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass
class FormRunner:
    """Runs a form's kernel in ONNX Runtime; keeps its sessions, since opening one costs more than most cases here."""

    library: Path
    sessions: dict[tuple[object, ...], onnxruntime.InferenceSession] = field(default_factory=dict)

    def __call__(
        self,
        form: str,
        feeds: Feeds,
        *,
        threads: int = 1,
        attributes: Mapping[str, float | int] | None = None,
        constants: Feeds | None = None,
    ) -> list[np.ndarray]:
        """The form's outputs; without the library's kernel the model does not load."""
        attributes, constants = attributes or {}, constants or {}
        weights = ((name, v.shape, v.dtype, hashlib.sha256(v.tobytes()).digest()) for name, v in constants.items())
        key = (form, threads, *attributes.items(), *weights)
        if key not in self.sessions:
            model = one_node_model(form, attributes=attributes, constants=constants, with_body=False)
            self.sessions[key] = open_session(model, library=self.library, threads=threads)
        outputs: list[np.ndarray] = self.sessions[key].run(None, dict(feeds))
        return outputs


@pytest.fixture(scope="session")
def run_form(library: Path) -> FormRunner:
    return FormRunner(library)


@pytest.fixture(scope="session")
def run_gate(run_form: FormRunner) -> Callable[..., np.ndarray]:
    return lambda form, feeds, threads=1: run_form(form, feeds, threads=threads)[0]


@pytest.fixture(scope="session")
def make_model() -> Callable[..., bytes]:
    return one_node_model


@pytest.fixture(scope="session")
def make_gate_model() -> Callable[..., bytes]:
    return gate_model


@pytest.fixture(scope="session")
def open_model() -> Callable[..., onnxruntime.InferenceSession]:
    return open_session
