"""TensorRT on an NVIDIA GPU: engines built on the device from the bundle's ONNX, kept in the device cache.

Importing this module needs no TensorRT; what does is imported by the calls.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_deploy.errors import UnavailableError, UsageError
from attn_deploy.gpus import nvidia_gpus
from attn_deploy.runtimes import RunNode, cuda_device, tensorrt_options
from attn_deploy.runtimes.device_cache import DeviceCache
from attn_deploy.runtimes.tensorrt_plan import is_plan
from attn_deploy.session import BATCH, SEQUENCE, Array, TensorSpec

if TYPE_CHECKING:
    from attn_deploy.runtimes.tensorrt_build import Device
    from attn_deploy.runtimes.tensorrt_execution import Engine
    from attn_deploy.runtimes.tensorrt_session import TensorRTSession

INSTALL = "pip install tensorrt 'cuda-core[cu13]'"
OLDEST = (10, 3)
"""JetPack 6.2's; older ones lack what strongly typed networks need."""

OPTIONS: dict[str, Any] = {"strongly_typed": True, **tensorrt_options.DEFAULTS}
PLAN_SUFFIXES = (".engine", ".plan", ".trt")


def availability() -> str | None:
    try:
        import tensorrt
    except ImportError as error:
        return _not_importable(error)
    if tensorrt.__file__ is None:  # a folder of that name on the path
        return f"TensorRT is not installed: {INSTALL}"
    version = str(getattr(tensorrt, "__version__", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not hasattr(tensorrt, "Builder") or numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"TensorRT {version} is installed, and {oldest} or newer with its builder is needed: {INSTALL}"
    return cuda_device.availability(cuda_major(version))


def _not_importable(error: ImportError) -> str:
    """The bindings are a wheel of their own: they may be there without the libraries that they are linked to."""
    text = str(error)
    if "libnvinfer" in text or "libnvonnxparser" in text:
        library = text.split(":")[0]
        return (
            f"TensorRT's Python bindings are here and its libraries are not ({library}): {INSTALL}, or add the folder "
            f"of {library} to LD_LIBRARY_PATH"
        )
    return f"TensorRT is not installed ({text}): {INSTALL}"


def cuda_major(version: str) -> int:
    """The CUDA version that the installed TensorRT is built for: by its wheel, else (JetPack, Debian) by its age."""
    for major in (13, 12):
        for part in ("libs", "bindings"):
            try:
                importlib.metadata.version(f"tensorrt_cu{major}_{part}")
                return major
            except importlib.metadata.PackageNotFoundError:
                continue
    return 13 if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 11 else 12


def open_session(
    model: bytes | Path,
    *,
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    threads: int | None = None,
    library: bool = False,
    options: Mapping[str, str] | None = None,
) -> TensorRTSession:
    """`options` are those of tensorrt_options. `threads` and `library` change nothing: there are no host threads to
    choose and no plugins. `model` is ONNX, or an engine (.engine, .plan), which then needs `inputs` and `outputs`.

    The first opening on a device builds the engine, which takes minutes; `tensorrt_progress.shown_by` shows it.
    Raises UnavailableError without TensorRT or a GPU and for an engine of another version or GPU, UsageError,
    AttnDeployError when TensorRT does not take the model, DeviceMemoryError.
    """
    parsed = tensorrt_options.parse(options or {})
    _require()
    from attn_deploy.runtimes.tensorrt_session import TensorRTSession

    if inputs is None or outputs is None:
        if _given_plan(model) is not None:
            raise UsageError("an engine is opened with its inputs and outputs", expected="the bundle's specs")
        inputs, outputs = _specs(model)
    version = _version()
    engine = _engine(model, parsed, inputs, version)
    return TensorRTSession(
        engine,
        inputs,
        outputs,
        parsed,
        profiles=tensorrt_options.profiles_of(parsed, inputs),
        device_id=parsed.device_id,
        cuda_major=cuda_major(version),
    )


def read_back(
    model: Path, feeds: Mapping[str, Array], *, library: bool = False, options: Mapping[str, str] | None = None
) -> list[RunNode]:
    """Every layer of the engine, with the ONNX nodes that it stands for, from a profiled call (EngineNode)."""
    from attn_deploy.runtimes import tensorrt_readback

    session = open_session(model, library=library, options=options)
    try:
        return list(tensorrt_readback.read_back(session, model, feeds))
    finally:
        session.close()


def option_names() -> tuple[str, ...]:
    """The options that a session understands."""
    return (*tensorrt_options.DEFAULTS, tensorrt_options.PROFILE + BATCH, tensorrt_options.PROFILE + SEQUENCE)


def check_options(options: Mapping[str, str]) -> None:
    """Raises UsageError for an option that a session would not understand."""
    tensorrt_options.parse(options)


def _require() -> None:
    reason = availability()
    if reason is not None:
        raise UnavailableError("tensorrt cannot run here", got=reason, next_step="attn-deploy doctor")


def _version() -> str:
    import tensorrt

    return str(tensorrt.__version__)


def _specs(model: bytes | Path) -> tuple[Sequence[TensorSpec], Sequence[TensorSpec]]:
    """Inputs and outputs as the model itself says."""
    from attn_deploy.runtimes.tensorrt_log import Messages
    from attn_deploy.runtimes.tensorrt_network import network_specs, parse

    return network_specs(parse(model, Messages()).network)


def _given_plan(model: bytes | Path) -> bytes | None:
    """The bytes of an engine; None for ONNX."""
    if isinstance(model, bytes):
        return model if is_plan(model) else None
    return model.read_bytes() if model.suffix in PLAN_SUFFIXES else None


def _engine(
    model: bytes | Path, options: tensorrt_options.Options, inputs: Sequence[TensorSpec], version: str
) -> Engine:
    from attn_deploy.runtimes.tensorrt_build import load_plan, make_runtime, open_engine
    from attn_deploy.runtimes.tensorrt_execution import Engine
    from attn_deploy.runtimes.tensorrt_log import Messages, Recorder

    messages = Messages()
    recorder = Recorder(messages)
    device = _device(options.device_id)
    runtime = make_runtime(messages, recorder, host_code=options.version_compatible)
    plan = _given_plan(model)
    if plan is not None:
        where = str(model) if isinstance(model, Path) else None
        engine = load_plan(plan, runtime, messages, where=where)
    else:
        engine = open_engine(
            model, options, inputs, runtime=runtime, messages=messages, cache=DeviceCache(), device=device
        )
    return Engine(engine, runtime, messages, recorder)


def _device(device_id: int) -> Device:
    """The GPU, bound to this thread. Not its serial number: an engine runs on every GPU of the same model."""
    from cuda.bindings import driver
    from cuda.core import Device as CudaDevice

    from attn_deploy.runtimes.tensorrt_build import Device

    gpu = CudaDevice(device_id)
    gpu.set_current()
    _, supported = driver.cuDriverGetVersion()
    _, _, total = driver.cuMemGetInfo()
    facts = {
        "gpu": gpu.name,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "multiprocessors": str(gpu.properties.multiprocessor_count),
        "driver": f"{_driver_version()}, CUDA {supported}",
    }
    return Device(facts, int(total))


@functools.cache
def _driver_version() -> str:
    """Asked once: where the kernel does not show it, a program has to be run for it."""
    found = nvidia_gpus()
    return (found.driver if found is not None else None) or "unknown"
