"""What tuning measures: alike parts of a model together, and every part at one level or another."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from attn_deploy.export.alike import alike
from attn_deploy.export.canonical import CanonicalModel
from attn_deploy.export.capture import capture
from attn_deploy.export.levelled import LevelledModel
from attn_deploy.export.lower import onnxruntime_cpu
from attn_deploy.export.lower.lowered import Conditions
from attn_deploy.export.precision.plan import plan_int8
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import LoadedSource
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import parse_input
from attn_deploy.ops import DOMAIN, FORMS
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.session import DimBounds
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for cpu_models

from cpu_models import DIM, Attention, PreNorm


class Layers(nn.Module):
    """Three equal layers, and one with another activation: x [batch, 6, DIM] -> the same."""

    def __init__(self) -> None:
        super().__init__()
        activations = (nn.GELU(), nn.GELU(), nn.GELU(), nn.ReLU())
        self.blocks = nn.Sequential(*(PreNorm(Attention(), activation) for activation in activations))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


ALL = frozenset(FORMS)


@pytest.fixture(scope="module")
def canonical() -> CanonicalModel:
    torch.manual_seed(0)
    source = LoadedSource("tiny", "tiny", Layers().eval(), (parse_input(f"x=1x6x{DIM}"),), "as they are")
    model = capture(source, {"batch": DimBounds()})
    return to_onnx(rewrite(model, recognize(model)))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(path).graph if node.domain == DOMAIN)


def test_alike_layers_are_one_group_and_others_are_not(canonical: CanonicalModel) -> None:
    model = LevelledModel(canonical, ALL)
    groups = [{unit.name for unit in group} for group in model.groups]
    assert {f"blocks.{n}.attn/PackedAttention" for n in range(4)} in groups
    assert {f"blocks.{n}.mlp/FeedForward" for n in range(3)} in groups
    assert {"blocks.3.mlp/FeedForward"} in groups
    assert len(model.units) == 8


class _Part:
    levels = ("stock", "site")

    def __init__(self, *nodes: str) -> None:
        self.nodes = nodes


@pytest.mark.parametrize(
    ("second", "together"),
    [("[b] y = Gemm <alpha = 2.0> (x, w)", True), ("[b] y = Gemm <alpha = 3.0> (x, w)", False),
     ("[b] y = Gemm <alpha = 2.0> (x, v)", False), ("[b] y = MatMul (x, w)", False)],
    ids=["the same", "another number", "another size", "another operator"],
)  # fmt: skip
def test_parts_are_alike_by_operator_numbers_and_sizes(second: str, *, together: bool) -> None:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[N, 4] x, float[4, 4] w, float[4, 5] v) => (float[N, M] z, float[N, M] y) {{
            [a] z = Gemm <alpha = 2.0> (x, w)
            {second}
        }}""")
    parts = [_Part("a"), _Part("b")]
    assert alike(model, parts) == ([tuple(parts)] if together else [(parts[0],), (parts[1],)])


def test_a_uniform_level_is_the_next_plainer_one_where_a_part_has_it_not(canonical: CanonicalModel) -> None:
    model = LevelledModel(canonical, ALL)
    assert model.levels == ("stock", "site", "linear", "block")
    assert set(model.uniform("stock").values()) == {"stock"}
    site = model.uniform("site")
    assert site["blocks.0.attn/PackedAttention"] == "site"
    assert site["blocks.0.mlp/FeedForward"] == "stock"
    assert LevelledModel(canonical, frozenset({"PackedAttention"})).levels == ("stock", "site")
    assert LevelledModel(canonical, frozenset()).groups == []


def test_a_model_is_saved_at_the_levels_asked(canonical: CanonicalModel, tmp_path: Path) -> None:
    model = LevelledModel(canonical, ALL)
    (path,) = model.save(model.uniform("stock"), tmp_path / "stock.onnx")
    assert operators(path) == {}
    (path,) = model.save({"blocks.1.mlp/FeedForward": "block"}, tmp_path / "mixed.onnx")
    assert operators(path) == {"FeedForwardGelu": 1}


def test_levels_in_int8_stand_behind_those_in_floating_point(canonical: CanonicalModel) -> None:
    plan = plan_int8(canonical.model, exclude=["blocks.3.mlp"])
    model = LevelledModel(canonical, ALL, plan)
    assert model.levels == ("stock", "site", "linear", "block", "linear-int8", "block-int8")
    by_name = {unit.name: unit.levels for unit in model.units}
    assert by_name["blocks.0.mlp/FeedForward"] == ("stock", "linear", "block", "linear-int8", "block-int8")
    assert by_name["blocks.3.mlp/FeedForward"] == ("stock", "linear", "block")
    block = model.uniform("block-int8")
    assert block["blocks.0.attn/PackedAttention"] == "block-int8"
    assert block["blocks.3.mlp/FeedForward"] == "block"
    linear = LevelledModel(canonical, ALL - {"QuantizedFeedForwardGelu"}, plan).uniform("block-int8")
    assert linear["blocks.0.mlp/FeedForward"] == "linear-int8"
    assert linear["blocks.0.attn/PackedAttention"] == "block-int8"
    assert {level for unit in model.units for level in (model.uniform("block")[unit.name],)} == {"block"}


def test_a_model_without_a_layer_in_int8_has_no_level_in_int8(canonical: CanonicalModel) -> None:
    """An export that is FP32 alone does not pay for levels that it will not use."""
    floating = LevelledModel(canonical, ALL).levels
    assert LevelledModel(canonical, ALL, plan_int8(canonical.model, exclude=["blocks"])).levels == floating
    convolutions = PrecisionPlan(tuple(LayerPlan(f"conv{n}/Conv", Scheme.STATIC) for n in range(3)))
    assert LevelledModel(canonical, ALL, convolutions).levels == floating


def test_levels_of_both_precisions_stand_in_one_model(canonical: CanonicalModel, tmp_path: Path) -> None:
    model = LevelledModel(canonical, ALL, plan_int8(canonical.model))
    levels = model.uniform("stock") | {
        "blocks.0.attn/PackedAttention": "block-int8", "blocks.1.attn/PackedAttention": "block",
        "blocks.0.mlp/FeedForward": "linear-int8", "blocks.1.mlp/FeedForward": "block-int8",
    }  # fmt: skip
    (path,) = model.save(levels, tmp_path / "both.onnx")
    assert operators(path) == {
        "QuantizedAttentionBlock": 1, "AttentionBlock": 1, "QuantizedNormLinearGelu": 1, "QuantizedLinearResidual": 1,
        "QuantizedFeedForwardGelu": 1,
    }  # fmt: skip


def test_what_tuning_chose_stands_between_stock_and_everything_native(canonical: CanonicalModel) -> None:
    levels = LevelledModel(canonical, ALL).uniform("stock") | {"blocks.0.attn/PackedAttention": "site"}
    offered = onnxruntime_cpu.alternatives(canonical, Precision.FP32, Conditions(ALL, tuned={Precision.FP32: levels}))
    assert [a.suffix for a in offered][:3] == ["", "-tuned", "-native"]
    lowered = onnxruntime_cpu.lower(canonical, Precision.FP32, **offered[1].arguments)
    assert Counter(n.op_type for n in lowered.model.graph if n.domain == DOMAIN) == {"PackedAttention": 1}


def test_what_tuning_chose_in_int8_is_offered_beside_bodies_and_the_coarsest(canonical: CanonicalModel) -> None:
    levels = LevelledModel(canonical, ALL).uniform("block") | {"blocks.0.attn/PackedAttention": "linear"}
    offered = onnxruntime_cpu.alternatives(canonical, Precision.INT8, Conditions(ALL, tuned={Precision.INT8: levels}))
    assert [a.suffix for a in offered] == ["", "-tuned", "-native"]
    lowered = onnxruntime_cpu.lower(canonical, Precision.INT8, **offered[1].arguments)
    assert Counter(n.op_type for n in lowered.model.graph if n.domain == DOMAIN) == {
        "QuantizedAttentionBlock": 3, "QuantizedNormLinear": 1, "PackedAttention": 1, "QuantizedLinearResidual": 1,
        "QuantizedFeedForwardGelu": 3, "QuantizedNormLinearRelu": 1, "LinearResidual": 1,
    }  # fmt: skip


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_levels_that_are_offered_anyway_are_no_candidate_of_their_own(
    canonical: CanonicalModel, precision: Precision
) -> None:
    model = LevelledModel(canonical, ALL)
    offered_anyway = [{}, {precision: model.uniform("block")}]
    offered_anyway += [{precision: model.uniform("stock")}] if precision is Precision.FP32 else []
    for tuned in offered_anyway:
        offered = onnxruntime_cpu.alternatives(canonical, precision, Conditions(ALL, tuned=tuned))
        assert [a.suffix for a in offered] == ["", "-native"]
