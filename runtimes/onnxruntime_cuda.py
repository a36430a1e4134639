"""ONNX Runtime on an NVIDIA GPU, through its CUDA execution provider."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_deploy.errors import AttnDeployError, NotAsAskedError, UnavailableError, UsageError
from attn_deploy.runtimes import RunNode, cuda_device
from attn_deploy.runtimes.cuda_libraries import missing_libraries, packages
from attn_deploy.runtimes.onnxruntime import profiled_nodes, session_settings, tensor_specs
from attn_deploy.runtimes.onnxruntime_cuda_session import OnnxRuntimeCudaSession
from attn_deploy.session import Array, TensorSpec
from attn_deploy.target import nearest

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]' 'cuda-core[cu13]'"
REPLACE = "pip uninstall -y onnxruntime onnxruntime-gpu && " + INSTALL

_FLAGS = ("prefer_nhwc", "use_tf32", "enable_skip_layer_norm_strict_mode", "fuse_conv_bias")
_SETTINGS = ("arena_extend_strategy", "gpu_mem_limit", "cudnn_conv_algo_search", "device_id", "sdpa_kernel")
_OWN = ("cuda_graph", "cuda_graph_shapes")
_DEFAULTS = {
    "arena_extend_strategy": "kSameAsRequested",  # the runtime's own doubles, and others use the GPU too
    "cuda_graph": "0",
    "cuda_graph_shapes": "8",
    "device_id": "0",
    "prefer_nhwc": "0",
    "use_tf32": "0",  # the runtime's own is 1: FP32 would be multiplied with 10 bits of mantissa
}
OPTIONS: dict[str, Any] = {
    "graph_optimization_level": "ORT_ENABLE_ALL",
    "execution_mode": "sequential",
    "provider": PROVIDER,
    **_DEFAULTS,
}
"""Defaults of what `options` may hold: `cuda_graph` ("0" or "1"), `cuda_graph_shapes` (how many shapes are captured),
and by ONNX Runtime's own names those of _FLAGS ("0" or "1") and _SETTINGS."""

SHAPE_OPERATORS = frozenset({
    "Add", "And", "Cast", "Ceil", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather",
    "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or",
    "Range", "ReduceProd", "Reshape", "ScatterND", "Shape", "Size", "Slice", "Split", "Sqrt", "Squeeze", "Sub",
    "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
"""Operators that compute shapes: ONNX Runtime keeps those whose operands are sizes on the CPU, where sizes are read."""
_SIZES = 16
"""No computation of shapes holds more floats than this (a Resize has one scale for each dimension)."""


def availability() -> str | None:
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime-gpu is not installed ({error}): {INSTALL}"
    if not hasattr(onnxruntime, "InferenceSession"):
        return f"the onnxruntime package is damaged (two flavours over each other?): {REPLACE}"
    if PROVIDER not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} is the CPU flavour, which takes the place of the other: {REPLACE}"
        )
    major = _cuda_major()
    reason = cuda_device.availability(major)
    if reason is not None:
        return reason
    missing = missing_libraries(major)
    if missing:
        return (
            f"onnxruntime-gpu {onnxruntime.__version__} is built for CUDA {major} and cuDNN 9, and the loader does not "
            f"find {', '.join(missing)}: {packages(major)}"
        )
    return None


def _cuda_major() -> int:
    """The CUDA version that the installed wheel is built for."""
    from onnxruntime.capi import build_and_package_info

    return int(str(getattr(build_and_package_info, "cuda_version", "") or cuda_device.CUDA_MAJOR).partition(".")[0])


def open_session(
    model: bytes | Path,
    *,
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    threads: int | None = None,
    library: bool = False,
    options: Mapping[str, str] | None = None,
) -> OnnxRuntimeCudaSession:
    """`options` as OPTIONS says; `threads` are those of the CPU, for shapes.

    Raises UnavailableError without GPU or libraries, UsageError for an unknown option, NotAsAskedError when a node that
    computes is not on the GPU, DeviceMemoryError when the weights do not fit, AttnDeployError when ONNX Runtime rejects
    the model.
    """
    chosen = _chosen(options or {})
    device = _device(chosen)
    try:
        session = _create(model, _settings(threads, library), _provider_options(chosen, device))
        check_assignment(_assignment(session))
    except BaseException:
        device.close()
        raise
    return OnnxRuntimeCudaSession(
        session,
        device,
        inputs or tensor_specs(session.get_inputs()),
        outputs or tensor_specs(session.get_outputs()),
        graph_shapes=int(chosen["cuda_graph_shapes"]) if chosen["cuda_graph"] == "1" else 0,
    )


def read_back(
    model: Path, feeds: Mapping[str, Array], *, library: bool = False, options: Mapping[str, str] | None = None
) -> list[RunNode]:
    """Every node of the session in the order of the run, from a profile.

    Without CUDA graphs, since a replayed graph has no nodes; that changes none. `time_us` is the host's time to launch
    the node. Raises NotAsAskedError when a node that computes is not on the GPU.
    """
    chosen = _chosen({**(options or {}), "cuda_graph": "0"})
    device = _device(chosen)
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = _settings(None, library)
            settings.enable_profiling = True
            settings.profile_file_prefix = str(Path(folder) / "profile")
            settings.add_session_config_entry("session.disable_prepacking", "1")  # prepacked weights are not profiled
            session = _create(model, settings, _provider_options(chosen, device))
            try:
                session.run(None, dict(feeds))
            except Exception as error:
                raise cuda_device.device_error("the profiled call", error) from error
            nodes = profiled_nodes(json.loads(Path(session.end_profiling()).read_text()))
            del session
    finally:
        device.close()
    check_nodes(nodes)
    return nodes


def check_nodes(nodes: Iterable[RunNode]) -> None:
    """Raises NotAsAskedError when a node that computes did not run on the GPU.

    A node computes when it has an operand of floats that is larger than a shape; ONNX Runtime leaves what computes
    shapes on the CPU.
    """
    nodes = list(nodes)
    wrong = [(n.name, n.op_type) for n in nodes if n.provider != PROVIDER and _computes(n)]
    _raise_elsewhere(wrong, len(nodes))


def _computes(node: RunNode) -> bool:
    if node.op_type not in SHAPE_OPERATORS:
        return True
    for operand in node.inputs + node.outputs:
        elements = 1
        for size in operand.shape:
            elements *= size
        if "float" in operand.dtype and elements > _SIZES:
            return True
    return False


def check_assignment(assigned: Sequence[tuple[str, str, str]]) -> None:
    """Raises NotAsAskedError for (node, operator, provider) that are elsewhere, judged by the operator alone."""
    wrong = [(name, op) for name, op, provider in assigned if provider != PROVIDER and op not in SHAPE_OPERATORS]
    _raise_elsewhere(wrong, len(assigned))


def _raise_elsewhere(wrong: Sequence[tuple[str, str]], total: int) -> None:
    if wrong:
        shown = ", ".join(f"{name or '(no name)'} ({op})" for name, op in wrong[:8])
        raise NotAsAskedError(
            "nodes of the model do not run on the GPU",
            got=f"{len(wrong)} of {total} elsewhere: {shown}" + (", ..." if len(wrong) > 8 else ""),
            expected=f"every node on {PROVIDER}, but those that compute shapes",
            next_step="update onnxruntime-gpu, or export again with --exclude for their modules",
        )


def _assignment(session: Any) -> list[tuple[str, str, str]]:
    """(node, operator, provider); empty before ONNX Runtime 1.24, which cannot tell without a run."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    parts = session.get_provider_graph_assignment_info()
    return [(node.name, node.op_type, part.ep_name) for part in parts for node in part.get_nodes()]


def option_names() -> tuple[str, ...]:
    """The options that a session understands."""
    return (*_FLAGS, *_SETTINGS, *_OWN)


def check_options(options: Mapping[str, str]) -> None:
    """Raises UsageError for an option that a session would not understand."""
    _chosen(options)


def _chosen(options: Mapping[str, str]) -> dict[str, str]:
    known = option_names()
    for name, value in options.items():
        if name not in known:
            raise UsageError("onnxruntime-cuda has no such option", got=name, expected=nearest(name, known))
        if name in (*_FLAGS, "cuda_graph") and value not in ("0", "1"):
            raise UsageError(f"option {name!r} of onnxruntime-cuda has a wrong value", got=value, expected="0 or 1")
        if name in ("cuda_graph_shapes", "device_id") and not value.isdigit():
            raise UsageError(f"option {name!r} of onnxruntime-cuda has a wrong value", got=value, expected="a number")
    return {**_DEFAULTS, **options}


def _provider_options(chosen: Mapping[str, str], device: cuda_device.DeviceStream) -> dict[str, str]:
    given = {name: value for name, value in chosen.items() if name not in _OWN}
    if given["device_id"] == "0":
        del given["device_id"]  # another cause of that warning, which `_create` tells of
    return given | {"enable_cuda_graph": chosen["cuda_graph"], "user_compute_stream": str(device.handle)}


def _device(chosen: Mapping[str, str]) -> cuda_device.DeviceStream:
    reason = availability()
    if reason is not None:
        raise UnavailableError("onnxruntime-cuda cannot run here", got=reason, next_step="attn-deploy doctor")
    return cuda_device.DeviceStream(int(chosen["device_id"]), cuda_major=_cuda_major())


def _settings(threads: int | None, library: bool) -> Any:
    from attn_deploy.runtimes.native import cuda

    settings = session_settings(threads, cuda.library_path() if library else None)
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return settings


def _create(model: bytes | Path, settings: Any, provider_options: Mapping[str, str]) -> Any:
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    where = None if isinstance(model, bytes) else str(model)
    providers: list[Any] | None = [(PROVIDER, dict(provider_options))]
    try:
        if hasattr(settings, "add_provider"):  # from 1.22; the other way warns in 1.31 of a plug-in that is not there
            settings.add_provider(PROVIDER, dict(provider_options))
            providers = None
        session = onnxruntime.InferenceSession(source, settings, providers=providers, enable_fallback=0)
    except Exception as error:
        raise _rejected(error, where) from error
    if PROVIDER not in session.get_providers():  # it warns and goes on with the CPU
        raise UnavailableError(
            "ONNX Runtime could not start its CUDA provider",
            got=", ".join(session.get_providers()),
            expected=PROVIDER,
            next_step=INSTALL,
        )
    return session


def _rejected(error: Exception, where: str | None) -> AttnDeployError:
    text = str(error).strip().splitlines()[0]
    if cuda_device.is_out_of_memory(error):
        return cuda_device.device_error("opening the model", error)
    if "graph capture feature" in text:
        return NotAsAskedError(
            "the model cannot be captured as a CUDA graph",
            where=where,
            got=text,
            expected="every node on the GPU, no control flow",
            next_step="leave the option cuda_graph out",
        )
    return AttnDeployError(
        "ONNX Runtime rejected the model",
        where=where,
        got=text,
        next_step="see `attn-deploy doctor` for the installed version",
    )
