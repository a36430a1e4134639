"""The native library, built once with warnings as errors, and one-node models that use it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from attn_deploy.ops import DOMAIN, FORMS, VERSION
from attn_deploy.runtimes import native

SOURCE = Path(__file__).parents[2] / "runtimes" / "native"

TOOL_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
"""The environment's own cmake and ninja count, activated or not."""

Dims = list[str | int | None]
Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def source() -> Path:
    return SOURCE


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of this source tree; the installed one where nothing can be built."""
    if all(shutil.which(tool, path=TOOL_PATH) for tool in ("cmake", "c++")):
        return _build(tmp_path_factory.mktemp("native_build"))
    installed = native.library_path()
    if installed is None:
        pytest.skip("no native library is installed, and no cmake and c++ to build it")
    return installed


def _build(folder: Path) -> Path:
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=TOOL_PATH) else []
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), *generator, "-DATTN_DEPLOY_STRICT=ON"],
        ["cmake", "--build", str(folder), "--config", "Release"],
    ):
        environment = {**os.environ, "PATH": TOOL_PATH}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return next(folder.rglob("libattn_deploy_native.*"))


def gate_model(
    form: str, *, node_name: str = "block/gate", with_body: bool = True, dtype: str = "FLOAT", x: Dims | None = None
) -> bytes:
    """One node of this form; its function body beside it. Inputs have no shape in the graph unless `x` gives one."""
    schema = FORMS[form]
    element_type = onnx.TensorProto.DataType.Value(dtype)
    inputs = [
        onnx.helper.make_tensor_value_info(i.name, element_type, x if i.name == "x" else None) for i in schema.inputs
    ]
    output = onnx.helper.make_tensor_value_info("output", element_type, None)
    node = onnx.helper.make_node(form, [i.name for i in schema.inputs], ["output"], domain=DOMAIN, name=node_name)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one_gate", inputs, [output]),
        functions=[onnx.parser.parse_function(schema.function_text())] if with_body else [],
        opset_imports=[onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


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
class GateRunner:
    """Runs a form's kernel; keeps its sessions, since opening one costs more than most cases here."""

    library: Path
    sessions: dict[tuple[str, int], onnxruntime.InferenceSession] = field(default_factory=dict)

    def __call__(self, form: str, feeds: Feeds, threads: int = 1) -> np.ndarray:
        key = (form, threads)
        if key not in self.sessions:
            model = gate_model(form, with_body=False)
            self.sessions[key] = open_session(model, library=self.library, threads=threads)
        output: np.ndarray = self.sessions[key].run(None, feeds)[0]
        return output


@pytest.fixture(scope="session")
def run_gate(library: Path) -> GateRunner:
    return GateRunner(library)


@pytest.fixture(scope="session")
def make_gate_model() -> Callable[..., bytes]:
    return gate_model


@pytest.fixture(scope="session")
def open_model() -> Callable[..., onnxruntime.InferenceSession]:
    return open_session
