"""ONNX -> engine, on the device that will run it; one way for TensorRT 10.3 to 11.

An engine belongs to one TensorRT version, GPU and driver: it is kept in the device cache under these, the model's hash
and the options, and built again where one differs. What the builder measured goes into a timing cache beside it,
so that the next engine on this device is built faster.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorrt as trt

from attn_deploy.errors import AttnDeployError, UsageError
from attn_deploy.runtimes import tensorrt_progress
from attn_deploy.runtimes.device_cache import DeviceCache
from attn_deploy.runtimes.tensorrt_log import Messages, Monitor, Recorder, failure, no_device
from attn_deploy.runtimes.tensorrt_network import Parsed, parse, require_inputs, require_types
from attn_deploy.runtimes.tensorrt_options import Options, Profile, profiles_of, shape_within
from attn_deploy.runtimes.tensorrt_plan import unusable
from attn_deploy.session import TensorSpec

ENGINE = "tensorrt-engine"
TIMING = "tensorrt-timing"
_MB = 1 << 20


@dataclass(frozen=True)
class Device:
    """The GPU an engine is built for. `facts` (name, compute capability, ..., driver) are part of the cache's key."""

    facts: Mapping[str, str]
    memory_bytes: int


def model_hash(model: bytes | Path) -> str:
    """SHA-256 of the model, and of the files beside it that it names: its weights may be there."""
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    content = model.read_bytes()
    digest = hashlib.sha256(content)
    for path in sorted(model.parent.iterdir()):
        if path != model and path.is_file() and path.name.encode() in content:
            with path.open("rb") as stream:
                weights = hashlib.file_digest(stream, "sha256").digest()
            digest.update(path.name.encode() + b"\0" + weights)
    return digest.hexdigest()


def engine_key(
    model: bytes | Path, options: Options, inputs: Sequence[TensorSpec], device: Mapping[str, str]
) -> dict[str, str]:
    """What an engine depends on. Whether it is run with CUDA graphs is no part of it."""
    settings = {
        "profiles": [{d: list(r) for d, r in p.items()} for p in profiles_of(options, inputs)],
        "optimization_level": options.optimization_level,
        "workspace_mb": options.workspace_mb,
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "tf32": options.tf32,
    }
    return {"model": model_hash(model), "options": json.dumps(settings, sort_keys=True)} | _host_key(device)


def _host_key(device: Mapping[str, str]) -> dict[str, str]:
    return {"tensorrt": str(trt.__version__)} | dict(device)


def open_engine(
    model: bytes | Path,
    options: Options,
    inputs: Sequence[TensorSpec],
    *,
    runtime: trt.Runtime,
    messages: Messages,
    cache: DeviceCache,
    device: Device,
) -> trt.ICudaEngine:
    """The engine from the cache, or built now and kept there.

    One that TensorRT does not take, though all it depends on is the same, is built again. Raises UsageError,
    AttnDeployError (a node that TensorRT does not take, no kernel for a layer), DeviceMemoryError, UnavailableError.
    """
    key = engine_key(model, options, inputs, device.facts)
    kept = _from_cache(cache, key, runtime, messages)
    if kept is not None:
        return kept
    with cache.making(ENGINE, key):
        kept = _from_cache(cache, key, runtime, messages)
        if kept is not None:
            return kept
        plan = memoryview(build(model, options, inputs, messages=messages, cache=cache, device=device))
        cache.put(ENGINE, key, plan)
        return load_plan(plan, runtime, messages)


def _from_cache(
    cache: DeviceCache, key: Mapping[str, str], runtime: trt.Runtime, messages: Messages
) -> trt.ICudaEngine | None:
    plan = cache.get(ENGINE, key)
    engine: trt.ICudaEngine | None = None if plan is None else runtime.deserialize_cuda_engine(plan)
    if plan is not None and engine is None:
        messages.take_errors()
    return engine


def make_runtime(messages: Messages, recorder: Recorder, *, host_code: bool = False) -> trt.Runtime:
    """`host_code` lets version-compatible engines run the lean runtime that they bring: code of the file's own.

    Raises UnavailableError where CUDA cannot be initialized.
    """
    try:
        runtime: trt.Runtime = trt.Runtime(messages)
    except TypeError as error:
        raise no_device(messages, error) from error
    runtime.error_recorder = recorder
    runtime.engine_host_code_allowed = host_code
    return runtime


def load_plan(
    plan: bytes | memoryview, runtime: trt.Runtime, messages: Messages, *, where: str | None = None
) -> trt.ICudaEngine:
    """A serialized engine -> engine. Raises UnavailableError that says which version it needs, DeviceMemoryError."""
    engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = failure("TensorRT cannot open the engine", messages, where=where)
        raise unusable(plan, reason, str(trt.__version__), where=where)
    return engine


def build(
    model: bytes | Path,
    options: Options,
    inputs: Sequence[TensorSpec],
    *,
    messages: Messages,
    cache: DeviceCache,
    device: Device,
) -> trt.IHostMemory:
    """The serialized engine. Progress goes to `tensorrt_progress.current()`."""
    parsed = parse(model, messages)
    require_inputs(parsed.network, inputs)
    require_types(parsed.network, device.facts["compute_capability"])
    config: trt.IBuilderConfig = parsed.builder.create_builder_config()
    _configure(config, options, device.memory_bytes)
    for profile in profiles_of(options, inputs):
        _add_profile(parsed.builder, config, profile, inputs)
    if options.version_compatible:
        parsed.parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)
    host = _host_key(device.facts)
    _attach_timing_cache(config, cache.get(TIMING, host) or b"")
    monitor = Monitor(tensorrt_progress.Phases(tensorrt_progress.current()))
    config.progress_monitor = monitor
    where = str(model) if isinstance(model, Path) else None
    plan = _run(parsed, config, monitor, where)
    timing: trt.ITimingCache | None = config.get_timing_cache()
    if timing is not None:
        cache.put(TIMING, host, memoryview(timing.serialize()))
    return plan


def _run(parsed: Parsed, config: trt.IBuilderConfig, monitor: Monitor, where: str | None) -> trt.IHostMemory:
    try:
        plan: trt.IHostMemory | None = parsed.builder.build_serialized_network(parsed.network, config)
    except (MemoryError, RuntimeError) as error:
        parsed.messages.add_error(str(error))
        plan = None
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise failure(
            "TensorRT cannot build the engine",
            parsed.messages,
            where=where,
            next_step="export again with another precision, or use --target onnxruntime-cuda",
        )
    parsed.messages.take_errors()  # tactics that did not fit are reported too, and are no error when another one did
    return plan


def _configure(config: trt.IBuilderConfig, options: Options, memory_bytes: int) -> None:
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else an engine cannot say what it runs
    workspace = min(options.workspace_mb * _MB, memory_bytes // 2)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatible == "same_compute_capability":
        level: trt.HardwareCompatibilityLevel | None = getattr(
            trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY", None
        )
        if level is None:
            raise UsageError(
                "this TensorRT knows no engines for one compute capability",
                got=trt.__version__,
                expected="TensorRT 10.9 or newer",
                next_step="leave hardware_compatible=same_compute_capability out",
            )
        config.hardware_compatibility_level = level


def _add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, profile: Profile, inputs: Sequence[TensorSpec]
) -> None:
    optimization: trt.IOptimizationProfile = builder.create_optimization_profile()
    for spec in inputs:
        low, typical, high = (shape_within(spec, profile, which) for which in ("min", "opt", "max"))
        try:
            optimization.set_shape(spec.name, min=low, opt=typical, max=high)
        except ValueError as error:
            raise AttnDeployError(
                f"TensorRT does not take the sizes of input {spec.name!r}",
                got=f"min {list(low)}, opt {list(typical)}, max {list(high)}",
                expected=spec.describe(),
            ) from error
    if config.add_optimization_profile(optimization) < 0:
        raise AttnDeployError(
            "TensorRT does not take an optimization profile",
            got=", ".join(f"{dim} {r.min} to {r.max}" for dim, r in profile.items()),
        )


def _attach_timing_cache(config: trt.IBuilderConfig, kept: bytes) -> None:
    """What was measured on this device before; one that TensorRT does not take is begun anew."""
    for content in (kept, b""):
        timing: trt.ITimingCache | None = config.create_timing_cache(content)
        if timing is not None and config.set_timing_cache(timing, ignore_mismatch=False):
            return
