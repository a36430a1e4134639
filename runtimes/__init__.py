"""Runtimes: what opens a variant. Each is a module that is imported only when it is used."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import msgspec

from attn_deploy.errors import UsageError
from attn_deploy.progress import Progress
from attn_deploy.session import Array, DimBounds, Session, TensorSpec
from attn_deploy.target import Target, nearest

RUNTIMES: dict[Target, str] = {
    Target.ONNXRUNTIME_CPU: "attn_deploy.runtimes.onnxruntime",
    Target.ONNXRUNTIME_CUDA: "attn_deploy.runtimes.onnxruntime_cuda",
    Target.TENSORRT: "attn_deploy.runtimes.tensorrt",
}
"""Target -> module. A module offers `availability`, `open_session` and `read_back`, as Runtime says."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype (NumPy's name) and shape of one operand, as the runtime saw it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RunNode:
    """One node that ran: what the runtime made of the model, after its own optimizer."""

    name: str
    op_type: str
    provider: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    time_us: float


class Runtime(Protocol):
    """What a runtime's module offers."""

    def availability(self) -> str | None:
        """None when it can run here, else the reason and what to do."""

    def open_session(
        self,
        model: bytes | Path,
        *,
        inputs: Sequence[TensorSpec] | None,
        outputs: Sequence[TensorSpec] | None,
        threads: int | None,
        library: bool,
        options: Mapping[str, str],
    ) -> Session: ...

    def read_back(
        self, model: Path, feeds: Mapping[str, Array], *, library: bool, options: Mapping[str, str]
    ) -> list[RunNode]: ...


def runtime(target: Target) -> ModuleType:
    """The module that runs a target."""
    return importlib.import_module(RUNTIMES[target])


def availability(target: Target) -> str | None:
    reason: str | None = runtime(target).availability()
    return reason


def available() -> tuple[Target, ...]:
    """The targets that this host can run."""
    return tuple(target for target in Target if availability(target) is None)


def open_session(
    target: Target,
    model: bytes | Path,
    *,
    inputs: Sequence[TensorSpec] | None = None,
    outputs: Sequence[TensorSpec] | None = None,
    threads: int | None = None,
    library: bool = False,
    options: Mapping[str, str] | None = None,
) -> Session:
    """Opens a model, given as bytes or as a path (a path when its weights are in a file of their own).

    `threads` None leaves the number to the runtime; `library` registers our native operators; `options` are what the
    variant's lowering counts on (its recipe says which).
    """
    session: Session = runtime(target).open_session(
        model, inputs=inputs, outputs=outputs, threads=threads, library=library, options=options or {}
    )
    return session


def read_back(
    target: Target,
    model: Path,
    feeds: Mapping[str, Array],
    *,
    library: bool = False,
    options: Mapping[str, str] | None = None,
) -> list[RunNode]:
    """What really runs: every node of the opened session, from one profiled call."""
    nodes: list[RunNode] = runtime(target).read_back(model, feeds, library=library, options=options or {})
    return nodes


def prepare(
    target: Target, model: Path, *, library: bool = False, options: Mapping[str, str] | None = None
) -> str | None:
    """Makes what a variant's options count on and opening does not make by itself; to be called where models are
    exported, validated and tuned. None when all is there, else what will run in its place, and why."""
    if target is not Target.ONNXRUNTIME_CPU:
        return None
    reason: str | None = runtime(target).prepare(model, library=library, options=options or {})
    return reason


def session_options(target: Target) -> dict[str, Any]:
    """The options that every session of the target is opened with, for the receipt."""
    options: dict[str, Any] = dict(runtime(target).OPTIONS)
    if target is Target.ONNXRUNTIME_CPU:
        from attn_deploy.runtimes.saturation import EXACT, saturates

        options |= {EXACT: "1"} if saturates() else {}
    return options


def kernel_names(target: Target) -> tuple[str, ...]:
    """The operator forms that the target's native library has on this host; none where there is no such library."""
    if target is Target.ONNXRUNTIME_CPU:
        from attn_deploy.runtimes import native

        return native.kernel_names()
    if target is Target.ONNXRUNTIME_CUDA:
        from attn_deploy.runtimes.native import cuda

        return cuda.kernel_names()
    return ()


def multiplies_blocks() -> bool:
    """Whether ONNX Runtime's CPU kernels here multiply weights that are INT8 in blocks."""
    found: bool = runtime(Target.ONNXRUNTIME_CPU).multiplies_blocks()
    return found


def library_name(target: Target) -> str:
    """The native library that a variant for the target needs, as the manifest names it."""
    return "attn_deploy_cuda" if target is Target.ONNXRUNTIME_CUDA else "attn_deploy_native"


def variant_options(target: Target, dims: Mapping[str, DimBounds], asked: Mapping[str, str]) -> dict[str, str]:
    """The options of a variant that do not come from its lowering: what the user asked of a GPU's runtime, as far as it
    is this target's, and the engine's ranges of dynamic dimensions. Raises UsageError for a wrong value."""
    if not target.on_gpu:
        return {}
    names = runtime(target).option_names()
    found = {name: value for name, value in asked.items() if name in names}
    if target is Target.TENSORRT:
        from attn_deploy.runtimes.tensorrt_options import profile_options

        found = {**profile_options(dims), **found}
    runtime(target).check_options(found)
    return found


def options_of_parts(target: Target, options: Mapping[str, str]) -> dict[str, str]:
    """The options for a part of a variant that is run once or twice: nothing that pays off only later."""
    if not target.on_gpu:
        return {}
    found = {name: value for name, value in options.items() if not name.startswith("profile:")}
    found["cuda_graph"] = "0"
    if target is Target.TENSORRT:
        found["optimization_level"] = "0"
    return found


def progress_of(target: Target, progress: Progress) -> AbstractContextManager[None]:
    """Inside, what takes minutes to open (TensorRT builds its engine) reports to `progress`."""
    if target is not Target.TENSORRT:
        return contextlib.nullcontext()
    from attn_deploy.runtimes.tensorrt_progress import shown_by

    return shown_by(progress)


def device_facts(targets: Iterable[Target]) -> dict[str, str | int | float | None]:
    """What the GPU is and does at this moment (clocks, power), for the host's facts; empty where no target is on one
    that can be used."""
    if not any(target.on_gpu and availability(target) is None for target in targets):
        return {}
    from attn_deploy.runtimes.cuda_facts import device_facts as facts_of

    found = msgspec.to_builtins(facts_of())
    return {f"gpu_{name}": ", ".join(v) if isinstance(v, (list, tuple)) else v for name, v in found.items()}


def check_runtime_options(targets: Iterable[Target], asked: Mapping[str, str]) -> None:
    """Raises UsageError for an option that none of the targets knows, or a value that one of them does not take."""
    on_gpu = [target for target in targets if target.on_gpu]
    known = {name: target for target in on_gpu for name in runtime(target).option_names()}
    for name in asked.keys() - known.keys():
        raise UsageError(
            "no runtime of these targets has such an option", got=name,
            expected=nearest(name, known) if known else "a target on a GPU: options of the CPU's sessions are fixed",
        )  # fmt: skip
    for target in on_gpu:
        variant_options(target, {}, asked)
