"""What a search of precision decides about: parts of a model, their levels under a plan, and what each loses alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attn_deploy.errors import UsageError
from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.capture import capture
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.precision.calibration import Run
from attn_deploy.export.precision.given_plan import given_plan
from attn_deploy.export.precision.plan import plan_int8
from attn_deploy.export.precision.search import divergences, levels_under, loss, part_losses, plan_parts
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import LoadedSource
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import parse_input
from attn_deploy.ops import FORMS
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for cpu_models

from cpu_models import DIM, Attention, PreNorm

ALL = frozenset(FORMS)
UNITS = (
    "blocks.0.attn/PackedAttention", "blocks.0.mlp/FeedForward", "blocks.1.attn/PackedAttention",
    "blocks.1.mlp/FeedForward",
)  # fmt: skip


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(PreNorm(Attention(), nn.GELU()) for _ in range(2)))
        self.head = nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(1))


class Excitation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Residual(nn.Module):
    """Two convolutions and perhaps a gate, with a shortcut around them."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.se = Excitation() if gated else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.se(self.conv2(torch.relu(self.conv1(x)))) + x)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.layer1 = nn.Sequential(Residual(gated=False), Residual(gated=True))
        self.plain = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.layer1(self.stem(x))).mean((2, 3)))


def exported(module: nn.Module, example: str) -> CanonicalModel:
    torch.manual_seed(0)
    source = LoadedSource("tiny", "tiny", module.eval(), (parse_input(example),), "as they are")
    model = capture(source, {"batch": DimBounds()})
    return to_onnx(rewrite(model, recognize(model)))


@pytest.fixture(scope="module")
def transformer() -> CanonicalModel:
    return exported(Transformer(), f"x=1x6x{DIM}")


@pytest.fixture(scope="module")
def convolutional() -> CanonicalModel:
    return exported(Convolutional(), "x=1x3x8x8")


def static(model: CanonicalModel) -> PrecisionPlan:
    """Every convolution in INT8, whatever its work."""
    plan = plan_int8(model.model)
    return PrecisionPlan(tuple(LayerPlan(p.layer, Scheme.STATIC) for p in plan.layers if p.layer.endswith("/Conv")))


# -- parts -----------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_transformer_are_its_units(transformer: CanonicalModel) -> None:
    plan = plan_int8(transformer.model)
    parts = plan_parts(transformer, plan, ALL)
    assert tuple(part.name for part in parts) == UNITS
    assert [layer for part in parts for layer in part.layers] == list(plan.quantized)
    assert parts[0].layers == ("blocks.0.attn.qkv/MatMul", "blocks.0.attn.proj/MatMul")


def test_without_kernels_every_layer_still_has_its_part(transformer: CanonicalModel) -> None:
    plan = plan_int8(transformer.model)
    parts = plan_parts(transformer, plan, ())
    assert sorted(layer for part in parts for layer in part.layers) == sorted(plan.quantized)
    assert not {a for one in parts for a in one.nodes for other in parts if other is not one if a in other.nodes}


def test_what_a_residual_goes_around_is_one_part_of_a_cnn(convolutional: CanonicalModel) -> None:
    parts = {part.name: part.layers for part in plan_parts(convolutional, static(convolutional), ())}
    assert parts["layer1.0"] == ("layer1.0.conv1/Conv", "layer1.0.conv2/Conv")
    assert set(parts["layer1.1"]) >= {"layer1.1.conv1/Conv", "layer1.1.conv2/Conv"}
    assert parts["plain"] == ("plain.0/Conv", "plain.2/Conv")
    assert parts["stem"] == ("stem.0/Conv",)


def test_a_unit_runs_at_int8s_level_where_a_layer_of_it_is_quantized(transformer: CanonicalModel) -> None:
    plan = plan_int8(transformer.model)
    tuned = {
        Precision.FP32: dict.fromkeys(UNITS, "linear"),
        Precision.INT8: dict.fromkeys(UNITS, "block"),
    }
    half = plan.restricted([layer for layer in plan.quantized if layer.startswith("blocks.1.mlp.fc1")])
    levels = levels_under(half, transformer, ALL, tuned)
    assert {name: levels[name] for name in UNITS} == dict.fromkeys(UNITS[:3], "linear") | {UNITS[3]: "block"}


# -- losses ----------------------------------------------------------------------------------------------------------


def open_model(model: object) -> Run:
    import onnx_ir as ir

    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        providers=["CPUExecutionProvider"],  # type: ignore[arg-type]
    )
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds)), strict=True))


def test_each_part_alone_loses_something_and_nothing_quantized_loses_nothing(transformer: CanonicalModel) -> None:
    plan = plan_int8(transformer.model)
    parts = plan_parts(transformer, plan, ALL)
    rng = np.random.default_rng(0)
    batches = [{"x": rng.standard_normal((4, 6, DIM)).astype(np.float32)} for _ in range(2)]
    losses = part_losses(
        plan, parts, lambda p: onnxruntime_cpu.lower(transformer, Precision.INT8, plan=p).model, open_model, batches,
        transformer.outputs[0].name, lambda done, total: None,
    )  # fmt: skip
    assert len(losses) == 4
    for found in losses:
        assert 20 < found.sqnr_db < 80
        assert found.divergence is not None
        assert 0 < found.divergence < 1e-2


def test_a_divergence_is_kullback_and_leiblers() -> None:
    one, other = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) - 0.25 * np.log(2)
    assert divergences(one, other + 3.0) == pytest.approx([expected])
    assert divergences(one, one) == pytest.approx([0.0])
    assert divergences(one, np.full_like(one, np.nan))[0] > 1e6


def test_a_loss_is_that_of_the_worst_output() -> None:
    expected = {"a": np.ones(8), "b": np.arange(8.0)}
    got = {"a": np.ones(8) + 0.1, "b": np.arange(8.0) + 0.001}
    assert loss([expected], [got], None).sqnr_db == pytest.approx(20.0)
    assert loss([expected], [expected], None).divergence is None


# -- given plans -----------------------------------------------------------------------------------------------------


def test_a_given_plan_names_every_layer_and_what_is_excluded_stays_float(transformer: CanonicalModel) -> None:
    plan = PrecisionPlan((LayerPlan("blocks", Scheme.PER_TOKEN), LayerPlan("head", Scheme.STATIC)))
    found = given_plan(transformer.model, plan, ["blocks.0"])
    assert {p.layer for p in found.layers} == {p.layer for p in plan_int8(transformer.model).layers}
    assert found.of(Scheme.STATIC) == ("head/Gemm",)
    assert {layer.split(".mlp")[0].split(".attn")[0] for layer in found.of(Scheme.PER_TOKEN)} == {"blocks.1"}
    with pytest.raises(UsageError, match="names no layer"):
        given_plan(transformer.model, PrecisionPlan((LayerPlan("block", Scheme.FLOAT),)))


def test_a_convolution_takes_the_static_form_of_a_plan_for_everything(convolutional: CanonicalModel) -> None:
    found = given_plan(convolutional.model, PrecisionPlan((LayerPlan("", Scheme.PER_TOKEN),)))
    assert set(found.of(Scheme.PER_TOKEN)) == {"head/Gemm"}
    assert "stem.0/Conv" in found.of(Scheme.STATIC)
