"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.runtimes import RunNode, TensorInfo, native
from attn_deploy.runtimes.saturation import EXACT, saturates
from attn_deploy.session import Array, TensorSpec

INSTALL = "pip install onnxruntime"
OPTIONS: dict[str, Any] = {"graph_optimization_level": "ORT_ENABLE_ALL", "execution_mode": "sequential"}

BLOCKS_SINCE = (1, 22)
"""The first ONNX Runtime whose CPU kernels multiply weights that are INT8 in blocks (MatMulNBits with 8 bits)."""

LAYOUT, BLOCKED = "layout", "blocked"
"""The one option of a variant's session: gates inside ONNX Runtime's blocked layout (onnxruntime_blocked)."""

SPINNING, OFF = "spinning", "0"
"""What a caller may add: threads that wait for work sleep. A host that other processes use too is faster so (bench,
`loaded`), an idle one slower."""

_DTYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(uint8)": "uint8", "tensor(int8)": "int8", "tensor(bool)": "bool",
}  # fmt: skip
_PROFILE_DTYPES = {"float": "float32", "double": "float64"}


def availability() -> str | None:
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime is not installed ({error}): {INSTALL}"
    if not hasattr(onnxruntime, "InferenceSession"):
        return f"the onnxruntime package is damaged (two flavours over each other?): {INSTALL} --force-reinstall"
    return None


def multiplies_blocks() -> bool:
    """Whether the ONNX Runtime that is installed runs weights in blocks."""
    if availability() is not None:
        return False
    import onnxruntime

    return tuple(int(part) for part in onnxruntime.__version__.split(".")[:2] if part.isdigit()) >= BLOCKS_SINCE


class OnnxRuntimeSession:
    """A session on the CPU. `run` is safe from many threads; feeds must have been checked by the caller."""

    def __init__(self, session: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._session = session
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._names = [o.name for o in self._outputs]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        if self._session is None:
            raise AttnDeployError("the session is closed", next_step="load the bundle again")
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))

    def close(self) -> None:
        """Frees the model. Calls that are running end normally."""
        self._session = None


def open_session(
    model: bytes | Path,
    *,
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    threads: int | None = None,
    library: bool = False,
    options: Mapping[str, str] | None = None,
) -> OnnxRuntimeSession:
    """`options` may hold {"layout": "blocked"}: the graph that `prepare` made for this host runs where it is in the
    device cache, else the stock graph, which a RuntimeWarning says; and {"spinning": "0"}.

    Raises UnavailableError without onnxruntime, AttnDeployError when it rejects the model."""
    spins = (options or {}).get(SPINNING) != OFF
    session = _blocked(model, threads, library, spins) if _asks_blocked(options) else None
    session = session or create_session(model, _waiting(cpu_settings(threads, library), spins))
    return OnnxRuntimeSession(
        session, inputs or tensor_specs(session.get_inputs()), outputs or tensor_specs(session.get_outputs())
    )


def prepare(model: Path, *, library: bool = False, options: Mapping[str, str] | None = None) -> str | None:
    """Makes what the options count on and `open_session` does not make: with {"layout": "blocked"} the rewritten graph
    (seconds, with the onnx package). None when it is there, else why the stock graph will run."""
    if not _asks_blocked(options):
        return None
    from attn_deploy.runtimes import onnxruntime_blocked

    return onnxruntime_blocked.prepare(model, library=library)


def _asks_blocked(options: Mapping[str, str] | None) -> bool:
    asked = {name: value for name, value in (options or {}).items() if name != SPINNING}
    assert asked in ({}, {LAYOUT: BLOCKED}), options
    return bool(asked)


def _waiting(settings: Any, spins: bool) -> Any:
    """The settings, with how threads wait for work in them."""
    if not spins:
        settings.add_session_config_entry("session.intra_op.allow_spinning", OFF)
    return settings


def _blocked(model: bytes | Path, threads: int | None, library: bool, spins: bool) -> Any:
    """ONNX Runtime's session of the rewritten graph; None, with a warning, where the stock one has to do."""
    from attn_deploy.runtimes import onnxruntime_blocked

    found = onnxruntime_blocked.find(model)
    if isinstance(found, bytes):
        try:
            return create_session(found, _waiting(onnxruntime_blocked.settings(threads), spins))
        except AttnDeployError as error:
            found = f"{error.what}: {error.got}"
    warnings.warn(f"gates run outside the blocked layout here: {found}", RuntimeWarning, stacklevel=3)
    return None


def read_back(
    model: Path, feeds: Mapping[str, Array], *, library: bool = False, options: Mapping[str, str] | None = None
) -> list[RunNode]:
    """Every node of the session in the order of the run, from a profile of its second call.

    Prepacking is off, since prepacked weights are left out of the profile and the work could not be counted; it
    changes no node.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, settings = _source(model, library, options)
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "profile")
        settings.add_session_config_entry("session.disable_prepacking", "1")
        session = create_session(source, settings)
        session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text())
    return profiled_nodes(events)


def _source(model: Path, library: bool, options: Mapping[str, str] | None) -> tuple[bytes | Path, Any]:
    """What `open_session` opens, and with which settings."""
    if _asks_blocked(options):
        from attn_deploy.runtimes import onnxruntime_blocked

        found = onnxruntime_blocked.find(model)
        if isinstance(found, bytes):
            return found, onnxruntime_blocked.settings(None)
    return model, cpu_settings(None, library)


def profiled_nodes(events: Sequence[Mapping[str, Any]]) -> list[RunNode]:
    """The nodes of an ONNX Runtime profile, in the order of the run."""
    return [_node(e) for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]


def _node(event: Mapping[str, Any]) -> RunNode:
    args = event["args"]
    return RunNode(
        name=event["name"].removesuffix("_kernel_time"),
        op_type=args["op_name"],
        provider=args.get("provider", ""),
        inputs=_infos(args.get("input_type_shape", ())),
        outputs=_infos(args.get("output_type_shape", ())),
        time_us=float(event.get("dur", 0)),
    )


def _infos(entries: Sequence[Mapping[str, Sequence[int]]]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(_PROFILE_DTYPES.get(dtype, dtype), tuple(shape))
        for entry in entries
        for dtype, shape in entry.items()
    )


def cpu_settings(threads: int | None, library: bool) -> Any:
    """The options of a session on the CPU, under which no product saturates. Raises UnavailableError without
    onnxruntime."""
    reason = availability()
    if reason is not None:
        raise UnavailableError("onnxruntime-cpu cannot run here", got=reason, next_step=INSTALL)
    options = session_settings(threads, native.session_library() if library else None)
    if saturates():
        options.add_session_config_entry(EXACT, "1")
    return options


def session_settings(threads: int | None, library: Path | None) -> Any:
    """What sessions of every provider are opened with. Without the library's file the function bodies run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    if library is not None:
        options.register_custom_ops_library(str(library))
    return options


def create_session(model: bytes | Path, options: Any) -> Any:
    """ONNX Runtime's own session on the CPU. Raises AttnDeployError when it rejects the model, UnavailableError where
    it is too old for it."""
    import onnxruntime

    source = model if isinstance(model, bytes) else str(model)
    where = None if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        if "matmul_nbits" in str(error) and not multiplies_blocks():
            raise UnavailableError(
                "this ONNX Runtime multiplies no INT8 weights in blocks", where=where, got=onnxruntime.__version__,
                expected=f"{'.'.join(map(str, BLOCKS_SINCE))} or later", next_step="pip install --upgrade onnxruntime",
            ) from error  # fmt: skip
        raise AttnDeployError(
            "ONNX Runtime rejected the model",
            where=where,
            got=str(error).splitlines()[0],
            next_step="see `attn-deploy doctor` for the installed version",
        ) from error


def tensor_specs(values: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """Of a session's inputs or outputs; a dimension without a name is `?`."""
    specs = []
    for value in values:
        dtype = _DTYPES.get(value.type, value.type)
        specs.append(TensorSpec(value.name, dtype, tuple(d if d is not None else "?" for d in value.shape)))
    return tuple(specs)
