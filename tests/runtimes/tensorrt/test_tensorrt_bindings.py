"""What can run on the CPU upon the real bindings: our callbacks, and what a user without libraries or a GPU is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attn_deploy.runtimes import tensorrt

sys.path.insert(0, str(Path(__file__).parent))  # for tensorrt_api

from tensorrt_api import bindings

VERSIONS = bindings.folders()
MISSING = "TensorRT's bindings are not here: pip install --no-deps tensorrt_cu13_bindings"

pytestmark = pytest.mark.skipif(not VERSIONS, reason=MISSING)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The `tensorrt` package, which is a name for the bindings."""
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    )
    return tmp_path


def run(code: str, version: str, package: Path, *, libraries: bool = True) -> str:
    """What the code prints where `import tensorrt` gives these bindings."""
    folder = bindings.stand_ins(package, int(version.split(".")[0])) if libraries else package
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=bindings.environment(VERSIONS[version], folder, package),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CALLBACKS = """
import tensorrt as trt
from attn_deploy.runtimes import tensorrt_log, tensorrt_readback
from attn_deploy.runtimes.tensorrt_progress import Phases

class Shown:
    def stage(self, name): print(name)
    def step(self, done, total): print(done, total)

messages = tensorrt_log.Messages()
messages.log(trt.ILogger.Severity.WARNING, "slow")
messages.log(trt.ILogger.Severity.INFO, "chatter")
messages.log(trt.ILogger.Severity.ERROR, "2: [a.cpp::b::12] Error Code 2: the reason")
recorder = tensorrt_log.Recorder(messages)
recorder.report_error(trt.ErrorCodeTRT.INVALID_STATE, "another")
print(recorder.num_errors(), recorder.get_error_code(0), recorder.get_error_desc(0), recorder.has_overflowed())
recorder.clear()
print(recorder.num_errors(), messages.warnings())
print(tensorrt_log.failure("it failed", messages).got)
recorder.report_error(trt.ErrorCodeTRT.FAILED_ALLOCATION, "12 GB")
print(type(tensorrt_log.failure("it failed", messages)).__name__)
monitor = tensorrt_log.Monitor(Phases(Shown()))
monitor.phase_start("all", None, 2)
print(monitor.step_complete("all", 0))
monitor.phase_finish("all")
times = tensorrt_readback.LayerTimes()
times.report_layer_time("a", 0.5)
print(times.ms)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_callbacks_are_made_and_called_as_tensorrt_does(version: str, package: Path) -> None:
    assert run(CALLBACKS, version, package).splitlines() == [
        "1 ErrorCodeTRT.INVALID_STATE another False",
        "0 ['slow']",
        "the reason; another",
        "DeviceMemoryError",
        "building the engine: all",
        "500 1000",
        "True",
        "1000 1000",
        "{'a': 0.5}",
    ]


NO_DEVICE = """
from attn_deploy.errors import UnavailableError
from attn_deploy.runtimes import tensorrt_build, tensorrt_log, tensorrt_network
messages = tensorrt_log.Messages()
for attempt in (lambda: tensorrt_network.parse(b"", messages),
                lambda: tensorrt_build.make_runtime(messages, tensorrt_log.Recorder(messages))):
    try:
        attempt()
    except UnavailableError as error:
        print(error.what)
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_factories_that_give_nothing_mean_that_there_is_no_gpu(version: str, package: Path) -> None:
    """What the real library does without a driver: the bindings then raise a TypeError about a null pointer."""
    assert run(NO_DEVICE, version, package).splitlines() == ["TensorRT cannot use a GPU here"] * 2


AVAILABILITY = "from attn_deploy.runtimes import tensorrt; print(tensorrt.availability())"


@pytest.mark.parametrize("version", VERSIONS)
def test_bindings_without_their_libraries_are_told_from_no_tensorrt(version: str, package: Path) -> None:
    reason = run(AVAILABILITY, version, package, libraries=False)
    assert "libraries are not" in reason
    assert "libnv" in reason
    assert "LD_LIBRARY_PATH" in reason
    assert tensorrt.INSTALL in reason


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_missing_beside_tensorrt_is_said(version: str, package: Path) -> None:
    """Where there is no GPU: its driver or cuda-core. Where there is one, nothing."""
    reason = run(AVAILABILITY, version, package).strip()
    assert reason == "None" or "cuda-core" in reason or "driver" in reason
    assert "TensorRT" not in reason


def test_an_old_tensorrt_is_refused_with_both_versions(package: Path) -> None:
    (package / "tensorrt" / "__init__.py").write_text("__version__ = '8.6.1'\nclass Builder: ...\n")
    reason = run(AVAILABILITY, next(iter(VERSIONS)), package)
    assert "8.6.1" in reason
    assert "10.3" in reason


def test_the_cuda_version_follows_the_wheel_or_the_age() -> None:
    assert tensorrt.cuda_major("11.4.0") == 13
    assert tensorrt.cuda_major("10.3.0") in (12, 13)  # 13 where a wheel for it is installed
