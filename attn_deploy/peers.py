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

PEERS = ("eager", "compile", "onnxruntime", "openvino", "tensorrt")
"""Eager PyTorch, torch.compile, and ONNX Runtime, OpenVINO and TensorRT on what torch.onnx.export makes by itself."""

ON_CPU = ("eager", "compile", "onnxruntime", "openvino")
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
    opened = _on_gpu(stack, captured, wanted, place, absent) if place.target.on_gpu else _on_cpu(
        stack, captured, wanted, place
    )  # fmt: skip
    return opened, absent


def _on_cpu(stack: contextlib.ExitStack, captured: CapturedModel, names: Sequence[str], place: Place) -> list[Peer]:
    import torch

    from attn_deploy.export.build import plain_model

    torch.set_num_threads(place.threads)
    peers = []
    plain = None
    for name in names:
        if name in ("onnxruntime", "openvino") and plain is None:
            plain = stack.enter_context(plain_model(captured, place.opset))
        if name == "eager":
            peers.append(Peer("eager PyTorch", captured.reference))
        elif name == "compile":
            peers.append(Peer("torch.compile", captured.compiled_reference()))
        elif name == "onnxruntime":
            assert plain is not None
            session = runtimes.open_session(Target.ONNXRUNTIME_CPU, plain, threads=place.threads)
            peers.append(Peer("plain ONNX Runtime", session.run))
        elif name == "openvino":
            from attn_deploy.runtimes import openvino

            assert plain is not None
            peers.append(Peer("OpenVINO", openvino.open_session(plain, threads=place.threads).run))
    return peers


def _on_gpu(
    stack: contextlib.ExitStack, captured: CapturedModel, names: Sequence[str], place: Place, absent: dict[str, str]
) -> list[Peer]:
    """In the candidate's precision; INT8 is compared with FP16. A runtime that is not here is told in `absent`."""
    from attn_deploy.export.build import plain_model
    from attn_deploy.export.torch_on_gpu import TorchOnGpu

    precision = Precision.FP16 if place.precision is Precision.INT8 else place.precision
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
