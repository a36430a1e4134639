"""Peers: what users would run without us, opened to be measured in the same run as a candidate, on the same device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attn_deploy import runtimes
from attn_deploy.accuracy import Run
from attn_deploy.errors import UsageError
from attn_deploy.latency import System
from attn_deploy.session import Array
from attn_deploy.target import Precision, Target, nearest

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel

_SETTINGS = {
    "onnxruntime": ("plain ONNX Runtime", {}),
    "onnxruntime-no-spinning": ("plain ONNX Runtime, no spinning", {"session.intra_op.allow_spinning": "0"}),
    "onnxruntime-flushed": ("plain ONNX Runtime, denormals flushed", {"session.set_denormal_as_zero": "1"}),
}
"""Of sessions on the plain model, with the name that they are shown by. Threads that spin while they wait cost a host
whose cores share execution units; denormals are what masks of -100 leave after exp."""

_FUSIONS = {
    "onnxruntime-transformers": ("ONNX Runtime, its transformers optimizer", "transformers"),
    "onnxruntime-onnxscript": ("ONNX Runtime, onnxscript's fusions", "onnxscript"),
}

PEERS = ("eager", "compile", *_SETTINGS, *_FUSIONS, "openvino", "tensorrt")
"""Eager PyTorch, torch.compile, and ONNX Runtime, OpenVINO and TensorRT on what torch.onnx.export makes by itself; ONNX
Runtime also with settings and with tools that its users are told of."""

ON_CPU = tuple(name for name in PEERS if name != "tensorrt")
ON_GPU = ("eager", "compile", "onnxruntime", "tensorrt")

Resident = Callable[[str, Mapping[str, Array]], System]
"""(name, feeds) -> calls on inputs that are on the device already."""


@dataclass(frozen=True)
class Peer:
    """`run` takes host arrays and gives host arrays; `resident` is None on a CPU, where nothing has to be copied."""

    name: str
    run: Run
    resident: Resident | None = None


@dataclass(frozen=True)
class Place:
    """Where peers run and what they compute in: as the candidate that they are measured against."""

    target: Target
    precision: Precision
    threads: int
    opset: int


def check_peers(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is none of PEERS."""
    for name in names:
        if name not in PEERS:
            raise UsageError("unknown peer", got=name, expected=nearest(name, PEERS))


def open_peers(
    stack: contextlib.ExitStack, captured: CapturedModel, names: Sequence[str], place: Place
) -> tuple[list[Peer], dict[str, str]]:
    """The named peers on the place's device; and those that do not run there, with the reason. What they hold is
    freed with `stack`."""
    check_peers(names)
    allowed = ON_GPU if place.target.on_gpu else ON_CPU
    device = "a GPU" if place.target.on_gpu else "the CPU"
    absent = {name: f"it does not run on {device}" for name in names if name not in allowed}
    wanted = [name for name in names if name in allowed]
    opened = (_on_gpu if place.target.on_gpu else _on_cpu)(stack, captured, wanted, place, absent)
    return opened, absent


def _on_cpu(
    stack: contextlib.ExitStack, captured: CapturedModel, names: Sequence[str], place: Place, absent: dict[str, str]
) -> list[Peer]:
    import torch

    from attn_deploy.export.build import plain_model

    torch.set_num_threads(place.threads)
    peers = []
    plain: Path | None = None
    for name in names:
        if name == "eager":
            peers.append(Peer("eager PyTorch", captured.reference))
            continue
        if name == "compile":
            peers.append(Peer("torch.compile", captured.compiled_reference()))
            continue
        if plain is None:
            plain = stack.enter_context(plain_model(captured, place.opset))
        if name == "openvino":
            from attn_deploy.runtimes import openvino

            peers.append(Peer("OpenVINO", openvino.open_session(plain, threads=place.threads).run))
        elif name in _SETTINGS:
            said, entries = _SETTINGS[name]
            run = _session_on_cpu(plain, place.threads, entries)
            peers.append(Peer(said, _flushing_denormals(run) if name == "onnxruntime-flushed" else run))
        else:
            peers += _fused(plain, name, place.threads, absent)
    return peers


def _session_on_cpu(model: Path, threads: int, entries: Mapping[str, str]) -> Run:
    from attn_deploy.runtimes import onnxruntime

    settings = onnxruntime.cpu_settings(threads, False)
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    session = onnxruntime.create_session(model, settings)
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _flushing_denormals(run: Run) -> Run:
    """The session's setting reaches its own threads, but that of the caller, which computes too, only when it is the
    first session of a process; and then it would stay for everyone who is measured."""
    import torch

    def flushing(feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        torch.set_flush_denormal(True)
        try:
            return run(feeds)
        finally:
            torch.set_flush_denormal(False)

    return flushing


def _fused(plain: Path, name: str, threads: int, absent: dict[str, str]) -> list[Peer]:
    from attn_deploy.export.plain_fusions import FUSIONS

    said, tool = _FUSIONS[name]
    fused = plain.with_name(f"{tool}.onnx")
    try:
        if FUSIONS[tool](plain, fused):
            return [Peer(said, _session_on_cpu(fused, threads, {}))]
        absent[name] = "it fuses nothing in this model"
    except Exception as error:  # their tool on this model: a row that says so
        absent[name] = f"it fails on this model: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return []


def _on_gpu(
    stack: contextlib.ExitStack, captured: CapturedModel, names: Sequence[str], place: Place, absent: dict[str, str]
) -> list[Peer]:
    """In the candidate's precision; INT8 is compared with FP16. A runtime that is not here is told in `absent`."""
    from attn_deploy.export.build import plain_model
    from attn_deploy.export.torch_on_gpu import TorchOnGpu

    precision = Precision.FP16 if place.precision.quantized else place.precision
    peers = []
    plain: Path | None = None
    for name in names:
        if name in ("eager", "compile"):
            try:
                peer = TorchOnGpu(captured, precision, compiled=name == "compile")
            except (AssertionError, RuntimeError) as error:  # a PyTorch without CUDA, or one that does not fit
                absent[name] = str(error).splitlines()[0]
                continue
            said = "eager PyTorch" if name == "eager" else "torch.compile max-autotune"
            peers.append(Peer(f"{said}, GPU {precision}", peer.run, peer.resident))
            continue
        target = Target.ONNXRUNTIME_CUDA if name == "onnxruntime" else Target.TENSORRT
        reason = runtimes.availability(target)
        if reason is not None:
            absent[name] = reason
            continue
        if plain is None:
            plain = stack.enter_context(plain_model(captured, place.opset, precision))
        peers.append(_plain_session(stack, plain, target, precision))
    return peers


def _plain_session(stack: contextlib.ExitStack, plain: Path, target: Target, precision: Precision) -> Peer:
    from attn_deploy.runtimes.resident import resident

    session = runtimes.open_session(target, plain)
    stack.callback(session.close)
    said = "plain ONNX Runtime CUDA" if target is Target.ONNXRUNTIME_CUDA else "TensorRT of the plain ONNX"
    return Peer(f"{said}, {precision}", session.run, lambda name, feeds: resident(name, session, feeds))
