"""Canonical and portable ONNX: names, functions, dynamic batch, external data; and each site of a model alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.canonical import CanonicalModel, portable, save_model
from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import RewrittenModel, rewrite
from attn_deploy.export.site_parity import record_sites, site_cases
from attn_deploy.export.to_onnx import plain_onnx, to_onnx
from attn_deploy.inputs import make_feeds
from attn_deploy.ops import DOMAIN
from attn_deploy.parity import sqnr_db
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """A convolution with its BatchNorm, a gate, an attention over pixels, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.gate = Gate()
        self.blocks = nn.ModuleList([Mixer()])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.gate(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head((tokens + self.blocks[0](tokens)).mean(1))


class Made:
    def __init__(self, captured: Any) -> None:
        self.captured = captured
        self.rewritten: RewrittenModel = rewrite(captured, recognize(captured))
        self.canonical: CanonicalModel = to_onnx(self.rewritten)


@pytest.fixture
def made(captured: Callable[..., Any]) -> Made:
    return Made(captured(Net(), "x=1x3x8x8"))


def run(model: ir.Model | Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    content = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def test_names_of_nodes_say_where_in_the_model_they_are(made: Made) -> None:
    names = [n.name for n in made.canonical.model.graph]
    assert len(set(names)) == len(names)
    assert {"conv/Conv", "gate.down/Conv", "blocks.0/PackedAttention", "gate/Gate"} <= set(names)
    assert [(s.module, s.node) for s in made.canonical.sites] == [
        ("gate", "gate/Gate"), ("blocks.0", "blocks.0/PackedAttention"),
    ]  # fmt: skip


def test_every_operator_of_ours_has_its_function_and_the_portable_model_has_none(made: Made) -> None:
    used = {n.op_type for n in made.canonical.model.graph if n.domain == DOMAIN}
    assert used == {"ChannelPoolMean", "Gate", "PackedAttention"}
    assert used <= {f.name for f in made.canonical.model.functions.values()}
    plain = portable(made.canonical)
    assert not plain.functions
    assert {n.domain for n in plain.graph} == {""}


@pytest.mark.parametrize("opset", [20, 21])
def test_the_models_pass_the_checker_with_the_opset_that_was_asked(made: Made, opset: int) -> None:
    canonical = to_onnx(made.rewritten, opset=opset)
    for model in (canonical.model, portable(canonical)):
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        assert {o.domain: o.version for o in proto.opset_import}[""] == opset


def test_batch_norm_is_folded_into_its_convolution(made: Made) -> None:
    types = [n.op_type for n in made.canonical.model.graph]
    assert "BatchNormalization" not in types
    assert types.count("Conv") == 3


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("kind", ["canonical", "portable"])
def test_any_batch_gives_what_pytorch_gives(made: Made, kind: str, batch: int) -> None:
    model = made.canonical.model if kind == "canonical" else portable(made.canonical)
    feeds = make_feeds(made.captured.inputs, batch=batch, seed=3)
    assert sqnr_db(made.captured.reference(feeds)["output"], run(model, feeds)) > 100


def test_the_batch_has_its_name_and_is_a_number_when_it_is_fixed(captured: Callable[..., Any]) -> None:
    dynamic = Made(captured(Net(), "x=1x3x8x8")).canonical
    assert (dynamic.inputs[0].shape, dynamic.outputs[0].shape) == (("batch", 3, 8, 8), ("batch", 5))
    fixed = Made(captured(Net(), "x=2x3x8x8", dims={})).canonical
    assert (fixed.inputs[0].shape, fixed.outputs[0].shape) == ((2, 3, 8, 8), (2, 5))
    assert (dynamic.dims, fixed.dims) == ({"batch": DimBounds()}, {})


def test_weights_beyond_the_threshold_go_to_a_file_beside_the_model(made: Made, tmp_path: Path) -> None:
    model = made.canonical.model
    assert [f.name for f in save_model(model, tmp_path / "one.onnx")] == ["one.onnx"]
    files = save_model(model, tmp_path / "two.onnx", external_data_bytes=100)
    assert [f.name for f in files] == ["two.onnx", "two.onnx.data"]
    assert files[0].stat().st_size < (tmp_path / "one.onnx").stat().st_size
    feeds = make_feeds(made.captured.inputs, batch=2, seed=3)
    np.testing.assert_array_equal(run(files[0], feeds), run(tmp_path / "one.onnx", feeds))
    assert all(v.const_value is not None for v in model.graph.initializers.values())


def test_the_plain_model_is_torch_s_own_without_operators_of_ours(made: Made) -> None:
    model = plain_onnx(made.captured)
    assert {n.domain for n in model.graph} == {""}
    feeds = make_feeds(made.captured.inputs, batch=3, seed=3)
    assert sqnr_db(made.captured.reference(feeds)["output"], run(model, feeds)) > 100


def test_every_site_alone_gives_what_it_gives_in_pytorch(made: Made) -> None:
    lowered = onnxruntime_cpu.lower(made.canonical, Precision.FP32).model
    cases = list(site_cases(made.canonical, lowered, record_sites(made.rewritten)))
    assert [c.module for c in cases] == ["gate", "blocks.0"]
    for case in cases:
        session = onnxruntime.InferenceSession(case.model, providers=["CPUExecutionProvider"])
        got = session.run(None, dict(case.feeds))[0].reshape(case.expected.shape)
        assert sqnr_db(case.expected, got) > 100


def test_a_site_alone_shows_a_fault_of_its_own_and_none_of_its_neighbour(made: Made) -> None:
    lowered = onnxruntime_cpu.lower(made.canonical, Precision.FP32).model
    scale = next(n for n in lowered.graph if n.name.startswith("blocks.0/PackedAttention") and n.op_type == "Softmax")
    negated = ir.Node("", "Neg", [scale.inputs[0]], name="fault")
    lowered.graph.insert_before(scale, negated)
    scale.replace_input_with(0, negated.outputs[0])
    distances = {}
    for case in site_cases(made.canonical, lowered, record_sites(made.rewritten)):
        session = onnxruntime.InferenceSession(case.model, providers=["CPUExecutionProvider"])
        got = session.run(None, dict(case.feeds))[0].reshape(case.expected.shape)
        distances[case.module] = sqnr_db(case.expected, got)
    assert distances["gate"] > 100
    assert distances["blocks.0"] < 60


def test_an_output_that_is_called_like_an_input_gets_a_name_of_its_own(captured: Callable[..., CapturedModel]) -> None:
    class Echo(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": x * 2, "y": x + 1}

    assert captured(Echo(), "x=1x3").outputs == ("x_output", "y")


class BiasedAttention(nn.Module):
    """A fused attention with a float mask that is computed, here from a table [query, key, heads]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.table = nn.Parameter(torch.randn(5, 5, 2, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=self.table.permute(2, 0, 1)[None])
        return mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


@pytest.mark.parametrize("at_the_end", [False, True])
def test_an_attention_that_is_left_as_it_is_goes_to_onnx(
    at_the_end: bool, captured: Callable[..., CapturedModel]
) -> None:
    """As the peer to be faster than, and where a site is skipped; with the attention itself as the model's output."""
    model = captured(FusedAlone() if at_the_end else BiasedAttention(), "x=1x2x5x4" if at_the_end else "x=1x5x8")
    graph = str(model.program.graph)
    session = onnxruntime.InferenceSession(ir.to_proto(plain_onnx(model)).SerializeToString())
    assert str(model.program.graph) == graph
    for batch in (1, 3):
        feeds = make_feeds(model.inputs, batch=batch, seed=1)
        (expected,) = model.reference(feeds).values()
        assert sqnr_db(expected, session.run(None, feeds)[0]) > 100


class FusedAlone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5).tril())
