"""What users would run without us: opened where it runs, named with the reason where it does not."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from attn_deploy import runtimes
from attn_deploy.errors import UsageError
from attn_deploy.export.build import plain_model
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.sources import LoadedSource
from attn_deploy.export.torch_on_gpu import TorchOnGpu
from attn_deploy.inputs import make_feeds, parse_input
from attn_deploy.parity import sqnr_db
from attn_deploy.peers import PEERS, Place, open_peers
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision, Target

CPU = Place(Target.ONNXRUNTIME_CPU, Precision.FP32, threads=1, opset=20)
GPU = Place(Target.ONNXRUNTIME_CUDA, Precision.FP16, threads=1, opset=20)


class Small(nn.Module):
    """x [batch, 5, 12] -> [batch, 5, 12]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


@cache
def captured() -> CapturedModel:
    source = LoadedSource("small", "small", Small().eval(), (parse_input("x=1x5x12"),), "random", None, None)
    return capture(source, {"batch": DimBounds()})


@cache
def feeds() -> dict[str, np.ndarray]:
    return make_feeds(captured().inputs, batch=3, seed=4)


def test_peers_of_the_cpu_compute_the_same_model_and_others_say_where_they_run() -> None:
    names = [name for name in PEERS if name != "compile"]
    with contextlib.ExitStack() as stack:
        opened, absent = open_peers(stack, captured(), names, CPU)
        assert [p.name for p in opened] == [
            "eager PyTorch", "plain ONNX Runtime", "plain ONNX Runtime, no spinning",
            "plain ONNX Runtime, denormals flushed", "ONNX Runtime, its transformers optimizer",
            "ONNX Runtime, onnxscript's fusions", "OpenVINO",
        ]  # fmt: skip
        assert absent == {"tensorrt": "it does not run on the CPU"}
        reference = next(iter(captured().reference(feeds()).values()))
        for peer in opened:
            assert peer.resident is None
            assert sqnr_db(reference, next(iter(peer.run(feeds()).values()))) > 100


def test_tools_that_fuse_nothing_are_no_peers() -> None:
    inputs = (parse_input("input=1x3x8x8"),)
    source = LoadedSource("conv", "conv", nn.Conv2d(3, 4, 3).eval(), inputs, "random", None, None)
    names = ["onnxruntime-transformers", "onnxruntime-onnxscript"]
    with contextlib.ExitStack() as stack:
        opened, absent = open_peers(stack, capture(source, {"batch": DimBounds()}), names, CPU)
    assert opened == []
    assert absent == dict.fromkeys(names, "it fuses nothing in this model")


class DividedByTheLargest(nn.Module):
    """x [batch, 4] -> x / 3e38: denormal for x below 3.5."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 3e38


def test_only_the_peer_that_flushes_denormals_flushes_them() -> None:
    """In one process and one thread with those that do not."""
    source = LoadedSource("tiny", "tiny", DividedByTheLargest(), (parse_input("x=1x4"),), "random", None, None)
    names = ["onnxruntime", "onnxruntime-flushed"]
    with contextlib.ExitStack() as stack:
        opened, _ = open_peers(stack, capture(source, {"batch": DimBounds()}), names, CPU)
        plain, flushed = opened
        x = {"x": np.ones((1, 4), np.float32)}
        for _ in range(2):
            assert (next(iter(plain.run(x).values())) > 0).all()
            assert (next(iter(flushed.run(x).values())) == 0).all()


def test_an_unknown_peer_is_answered_with_the_nearest() -> None:
    with contextlib.ExitStack() as stack, pytest.raises(UsageError, match="onnxruntime"):
        open_peers(stack, captured(), ["onnxrutime"], CPU)


@pytest.mark.skipif(runtimes.availability(Target.ONNXRUNTIME_CUDA) is None, reason="there is a GPU here")
def test_without_a_gpu_every_peer_of_one_says_why_it_is_not_there() -> None:
    with contextlib.ExitStack() as stack:
        opened, absent = open_peers(stack, captured(), PEERS, GPU)
    assert opened == []
    assert absent.keys() == set(PEERS)
    assert absent["openvino"] == "it does not run on a GPU"
    assert all(absent.values())


@pytest.mark.parametrize(("precision", "floor_db"), [(Precision.FP32, 200.0), (Precision.BF16, 30.0)])
def test_the_module_runs_in_the_candidates_precision(precision: Precision, floor_db: float) -> None:
    """On the CPU in a GPU's place: the copies and casts around it are the same."""
    before = captured().module.norm.weight.dtype
    got = TorchOnGpu(captured(), precision, compiled=False, device="cpu").run(feeds())
    (name, value), reference = next(iter(got.items())), captured().reference(feeds())
    assert value.dtype == np.float32
    assert floor_db <= sqnr_db(reference[name], value) <= max(floor_db, 60.0)
    assert captured().module.norm.weight.dtype is before  # a copy was cast


def test_a_saved_program_is_refused_since_its_device_is_part_of_it() -> None:
    saved = dataclasses.replace(captured(), module=captured().program.module())
    with pytest.raises(UsageError, match="a saved program"):
        TorchOnGpu(saved, Precision.FP32, compiled=False, device="cpu")


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_the_plain_model_is_what_users_get_in_that_precision(precision: Precision) -> None:
    with plain_model(captured(), 20, precision) as path:
        model = ir.load(path)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        # The halves by emulation: ONNX Runtime 1.31 and 1.32 crash on a half MatMul behind a Transpose on the CPU.
        content = ir.to_proto(emulate(model)).SerializeToString()
    got = next(iter(runtimes.open_session(Target.ONNXRUNTIME_CPU, content).run(feeds()).values()))
    reference = next(iter(captured().reference(feeds()).values()))
    assert got.dtype == np.float32
    found = sqnr_db(reference, got)
    assert found > 100 if precision is Precision.FP32 else 45 < found < 90
