"""Models lowered for TensorRT: the same numbers in every precision, in a graph that the version parses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from msgspec.structs import replace

from attn_deploy.errors import AttnDeployError, NotAsAskedError, UsageError
from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.lower.lowered import Lowered
from attn_deploy.export.lower.norms import whole_norms
from attn_deploy.export.lower.static_shapes import write_shapes
from attn_deploy.export.lower.tensorrt import AttentionForm, lower, standard
from attn_deploy.export.lower.tensorrt_attention import OPERATORS
from attn_deploy.export.lower.tensorrt_operators import minimum_version
from attn_deploy.export.opset import raise_opset
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import SourceRequest, load_source
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import make_feeds
from attn_deploy.ops import BLOCK_FORMS, FORMS
from attn_deploy.parity import sqnr_db
from attn_deploy.precision_plan import LayerPlan, PrecisionPlan, Scheme
from attn_deploy.session import Array, DimBounds
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parent))  # for tensorrt_models
sys.path.insert(0, str(Path(__file__).parents[1] / "coverage"))  # for attention_coverage

from attention_coverage.models import BY_NAME
from tensorrt_models import (
    all_expected,
    attributes,
    canonical,
    on_the_scores,
    open_model,
    operator_counts,
    other_operands,
)

MIN_DB = {Precision.FP32: 100.0, Precision.FP16: 45.0, Precision.BF16: 35.0, Precision.INT8: 20.0, Precision.FP8: 20.0}
VERSIONS = ((10, 3), (10, 15), (11, 4))

MODELS = [
    "vit_tiny_patch16_224",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("demo", "swin_tiny_patch4_window7_224", "hf_bert", "hf_llama", "seresnet50")
    ),
]


@cache
def captured(name: str) -> tuple[CapturedModel, CanonicalModel]:
    source = load_source("demo", SourceRequest("")) if name == "demo" else BY_NAME[name].load(tiny=True)
    model = capture(source, {"batch": DimBounds()})
    return model, to_onnx(rewrite(model, recognize(model)))


def calibration(model: CapturedModel) -> Iterator[Mapping[str, Array]]:
    return (make_feeds(model.inputs, batch=2, seed=seed) for seed in range(4))


def require_same(name: str, lowered: ir.Model, precision: Precision) -> None:
    model, exported = captured(name)
    reference, run = open_model(portable(exported)), open_model(emulate(standard(lowered)))
    for batch in (3, 16) if precision.quantized else (1, 3):  # of one sample 8 bits say little
        feeds = make_feeds(model.inputs, batch=batch, seed=13)
        expected, got = reference(feeds), run(feeds)
        assert list(got) == list(expected)
        for output, value in got.items():
            assert value.dtype == expected[output].dtype
            assert sqnr_db(expected[output], value) >= MIN_DB[precision], output


@pytest.mark.parametrize("form", AttentionForm)
@pytest.mark.parametrize("name", MODELS)
def test_fp32_is_the_same_model(name: str, form: AttentionForm) -> None:
    exported = captured(name)[1]
    lowered = lower(exported, Precision.FP32, attention=form).model
    onnx.checker.check_model(ir.to_proto(standard(lowered)), full_check=True)
    require_same(name, lowered, Precision.FP32)
    attentions = [site.node for site in exported.sites if FORMS[site.operator].operator in OPERATORS]
    assert on_the_scores(lowered, attentions) == []


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16, Precision.INT8])
@pytest.mark.parametrize("name", MODELS)
def test_every_version_gets_a_model_that_it_parses(name: str, precision: Precision) -> None:
    model, exported = captured(name)
    for version in VERSIONS:
        lowered = lower(
            exported, precision, version=version, calibration=lambda: calibration(model), open_model=open_model
        )
        oldest = minimum_version(lowered.model)
        assert oldest is not None
        assert oldest <= version
        require_same(name, lowered.model, precision)
        assert _sites_without_a_node(exported, lowered.model) == []


def _sites_without_a_node(exported: CanonicalModel, lowered: ir.Model) -> list[str]:
    names = [str(node.name) for node in lowered.graph]
    return [s.node for s in exported.sites if not any(n.startswith(s.node + "/") for n in names)]


def test_tiny_vit_becomes_one_attention_where_the_version_has_it() -> None:
    exported = captured("vit_tiny_patch16_224")[1]
    for version, expected in (((10, 16), (0, 1)), ((11, 0), (1, 0))):
        lowered = lower(exported, Precision.FP16, version=version).model
        counts = operator_counts(lowered)
        assert (counts["Attention"], counts["Softmax"]) == expected
        assert counts["LayerNormalization"] == 3
    types = {str(i.dtype) for i in next(n for n in lowered.graph if n.op_type == "Attention").inputs}
    assert types == {"FLOAT16"}


def test_bf16_keeps_an_opset_that_an_old_version_knows() -> None:
    """BF16 convolutions are in ONNX from opset 22 on; TensorRT 10.3 knows them and no such opset."""
    exported = captured("vit_tiny_patch16_224")[1]
    opsets = [lower(exported, Precision.BF16, version=v).model.opset_imports[""] for v in ((10, 3), (10, 6), (11, 4))]
    assert opsets == [20, 22, 23]


def test_fp8_gives_a_model_in_e4m3_from_10_7_on() -> None:
    model, exported = captured("vit_tiny_patch16_224")

    def lowered(version: tuple[int, int], **options: Any) -> Lowered:
        return lower(exported, Precision.FP8, version=version, calibration=lambda: calibration(model),
                     open_model=open_model, **options)  # fmt: skip

    for version in ((10, 7), (11, 4)):
        made = lowered(version)
        assert minimum_version(made.model) == (10, 7) if version == (10, 7) else (10, 14)
        require_same("vit_tiny_patch16_224", made.model, Precision.FP8)
    types = {n.outputs[0].dtype for n in made.model.graph if n.op_type == "QuantizeLinear"}
    assert types == {ir.DataType.FLOAT8E4M3FN}
    assert "blocks.0.mlp.fc1/MatMul" in made.plan.of(Scheme.FP8)
    with pytest.raises(NotAsAskedError, match="does not parse") as caught:
        lowered((10, 6))
    assert "TensorRT 10.7 or later" in str(caught.value.next_step)


def test_a_plan_of_the_cpu_is_followed_here() -> None:
    """Its layers in the scheme of this target, SmoothQuant in its norms, and FP32 where it says so."""
    model, exported = captured("vit_tiny_patch16_224")
    norm = "blocks.0.norm2/LayerNormalization"
    assert norm in {str(n.name) for n in exported.model.graph}, "the model's names have changed"
    fc1 = LayerPlan("blocks.0.mlp.fc1/MatMul", Scheme.PER_TOKEN)
    fc2 = LayerPlan("blocks.0.mlp.fc2/MatMul", Scheme.FLOAT32)
    plan = PrecisionPlan((fc1, fc2), smoothing={norm: 0.5})
    found = lower(
        exported, Precision.INT8, calibration=lambda: calibration(model), open_model=open_model, plan=plan
    )  # fmt: skip
    assert found.plan == replace(plan, layers=(replace(fc1, scheme=Scheme.STATIC), fc2))
    nodes = {str(n.name): n for n in found.model.graph}
    assert nodes["blocks.0.mlp.fc1/MatMul"].inputs[1].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    assert nodes["blocks.0.mlp.fc2/MatMul"].outputs[0].dtype == ir.DataType.FLOAT
    scale = next(n for n in exported.model.graph if n.name == norm).inputs[1]
    assert not any(same_values(i, scale) for n in found.model.graph for i in n.inputs), "the norm was not smoothed"
    require_same("vit_tiny_patch16_224", found.model, Precision.INT8)


def same_values(value: ir.Value | None, other: ir.Value | None) -> bool:
    if value is None or other is None or value.const_value is None or other.const_value is None:
        return False
    one, two = (v.const_value.numpy().astype(np.float32) for v in (value, other))  # type: ignore[union-attr]
    return one.shape == two.shape and bool(np.allclose(one, two, rtol=1e-3))


def test_a_half_plan_says_which_layers_stay_fp32_and_is_followed_when_it_is_given() -> None:
    exported = captured("vit_tiny_patch16_224")[1]
    name = "blocks.0.mlp.fc1/MatMul"
    assert lower(exported, Precision.FP16).plan == PrecisionPlan()
    given = PrecisionPlan((LayerPlan(name, Scheme.FLOAT32, "mine"), LayerPlan("gone/MatMul", Scheme.FLOAT32)))
    found = lower(exported, Precision.FP16, plan=given)
    assert found.plan == PrecisionPlan((LayerPlan(name, Scheme.FLOAT32, "asked for"),))
    assert next(n for n in found.model.graph if n.name == name).outputs[0].dtype == ir.DataType.FLOAT


def test_int8_attention_stands_between_pairs_and_is_the_pattern() -> None:
    """Before the first product, behind the softmax, before and behind the second."""
    model, exported = captured("vit_tiny_patch16_224")
    plain, quantized = (
        lower(
            exported, Precision.INT8, calibration=lambda: calibration(model), open_model=open_model,
            int8_attention=attention,
        ).model
        for attention in (False, True)
    )  # fmt: skip
    assert operator_counts(plain)["Attention"] == 1
    assert operator_counts(quantized)["Softmax"] == 1
    more = operator_counts(quantized)["QuantizeLinear"] - operator_counts(plain)["QuantizeLinear"]
    assert more == 5
    require_same("vit_tiny_patch16_224", quantized, Precision.INT8)


def test_inputs_and_outputs_stay_float32() -> None:
    lowered = lower(captured("vit_tiny_patch16_224")[1], Precision.FP16).model
    assert {str(v.dtype) for v in (*lowered.graph.inputs, *lowered.graph.outputs)} == {"FLOAT"}


def test_an_open_batch_leaves_no_shape_to_compute_but_that_of_a_class_token() -> None:
    lowered = lower(captured("vit_tiny_patch16_224")[1], Precision.FP32).model
    (shape,) = [n for n in lowered.graph if n.op_type == "Shape"]
    (joined,) = [user for user, _ in shape.outputs[0].uses()]
    assert [user.op_type for user, _ in joined.outputs[0].uses()] == ["Expand"]


OTHERS = [name for name, f in FORMS.items() if f.operator not in OPERATORS and name not in BLOCK_FORMS]


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_operator_is_plain_nodes_that_the_oldest_version_parses(name: str) -> None:
    model = lower(canonical(name, other_operands(name, 2), **attributes(name)), Precision.FP32, version=(10, 3)).model
    run = open_model(model)
    for batch in (1, 3):
        given = other_operands(name, batch, seed=batch)
        for wanted, got in zip(all_expected(name, given), run(given).values(), strict=True):
            assert sqnr_db(wanted, got) >= MIN_DB[Precision.FP32]
    counts = operator_counts(model)
    assert not counts.keys() & {"Shape", "Size", "ConstantOfShape", "Range"}


def test_an_excluded_module_stays_float32() -> None:
    lowered = lower(captured("vit_tiny_patch16_224")[1], Precision.FP16, exclude=["blocks.0.mlp"])
    (product,) = [n for n in lowered.model.graph if n.name == "blocks.0.mlp.fc1/MatMul"]
    assert str(product.inputs[0].dtype) == "FLOAT"
    assert any(note.startswith("blocks.0.mlp.fc1") for note in lowered.notes)
    with pytest.raises(UsageError):
        lower(captured("vit_tiny_patch16_224")[1], Precision.FP16, exclude=["blocks.7"])


def test_what_cannot_be_done_is_said() -> None:
    exported = captured("vit_tiny_patch16_224")[1]
    with pytest.raises(UsageError, match="no native operators"):
        lower(exported, Precision.FP32, native=frozenset({"PackedAttention"}))
    with pytest.raises(UsageError, match="too old"):
        lower(exported, Precision.FP32, version=(8, 6))
    with pytest.raises(AttnDeployError, match="static ranges"):
        lower(exported, Precision.INT8)


# -- normalizations --------------------------------------------------------------------------------------------------

CENTRED = "m = ReduceMean (x, last) d = Sub (x, m) "
SQUARES = {"Pow": "q = Pow ({t}, two) ", "Mul": "q = Mul ({t}, {t}) "}
QUOTIENTS = {"Div": "n = Div ({t}, r) ", "Reciprocal": "i = Reciprocal (r) n = Mul (i, {t}) "}
WEIGHTED = "[blk__Mul] {last} = Mul (n, w) "
CONSTANTS = {
    "last": np.array([-1]), "two": np.array(2.0, np.float32), "e": np.array(1e-3, np.float32),
    "w": np.linspace(0.5, 2, 8, dtype=np.float32), "b": np.linspace(-1, 1, 8, dtype=np.float32),
}  # fmt: skip


def written_out(body: str, **constants: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> g (float[n, 5, 8] x) => (float[n, 5, 8] y) {{ {body} }}'
    )
    held = CONSTANTS | constants
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in held.items())
    made = ir.from_proto(proto)
    for node in made.graph:
        node.name = str(node.name).replace("__", "/")
    write_shapes(made)
    return made


def norm(square: str = "Pow", quotient: str = "Div", *, centred: bool = True, bias: bool = True) -> str:
    term = "d" if centred else "x"
    return (
        (CENTRED if centred else "")
        + SQUARES[square].format(t=term)
        + "v = ReduceMean (q, last) a = Add (v, e) r = Sqrt (a) "
        + QUOTIENTS[quotient].format(t=term)
        + WEIGHTED.format(last="s" if bias else "y")
        + ("[blk__Add] y = Add (s, b)" if bias else "")
    )


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_that_is_written_out_becomes_one_node(square: str, quotient: str, centred: bool, bias: bool) -> None:
    made = written_out(norm(square, quotient, centred=centred, bias=bias))
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 8)).astype(np.float32)
    before = open_model(made)({"x": x})["y"]
    assert whole_norms(made, rms=True) == 1
    write_shapes(made)
    whole = "LayerNormalization" if centred else "RMSNormalization"
    assert [n.op_type for n in made.graph] == [whole] + (["Add"] if bias and not centred else [])
    assert str(made.graph[0].name).startswith("blk/")
    assert sqnr_db(before, open_model(made)({"x": x})["y"]) >= 120


def test_a_weight_with_leading_ones_is_a_vector() -> None:
    made = written_out(norm(), w=CONSTANTS["w"].reshape(1, 1, 8))
    assert whole_norms(made, rms=True) == 1


LEFT: dict[str, Callable[[], ir.Model]] = {
    "over another axis": lambda: written_out(norm(), last=np.array([1])),
    "with a weight for every token": lambda: written_out(norm(), w=np.ones((5, 8), np.float32)),
    "without a weight": lambda: written_out(CENTRED + SQUARES["Pow"].format(t="d") + "v = ReduceMean (q, last) "
                                            "a = Add (v, e) r = Sqrt (a) y = Div (d, r)"),
    "of another value": lambda: written_out(norm().replace("n = Div (d, r)", "n = Div (x, r)")),
    "to another power": lambda: written_out(norm(), two=np.array(3.0, np.float32)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_only_looks_like_a_norm_is_left(name: str) -> None:
    made = LEFT[name]()
    before = operator_counts(made)
    assert whole_norms(made, rms=True) == 0
    assert operator_counts(made) == before


def test_an_rms_norm_stays_written_out_where_the_version_has_none() -> None:
    made = written_out(norm(centred=False))
    assert whole_norms(made, rms=False) == 0


# -- opset and shapes ------------------------------------------------------------------------------------------------


def test_the_opset_is_not_raised_where_an_operator_would_mean_something_else() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[n, 4, 5] x) => (float[n, 4, 5] y)
    { y = GroupNormalization <num_groups: int = 2> (x, s, s) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "s"))
    made = ir.from_proto(proto)
    assert not raise_opset(made, 23)
    assert made.opset_imports[""] == 20
    other = written_out(norm())
    other.graph.opset_imports[""] = 20
    assert raise_opset(other, 23)
    assert other.opset_imports[""] == 23


def test_a_shape_that_only_the_batch_leaves_open_is_written_down() -> None:
    body = """s = Shape <start: int = 0, end: int = 1> (x) t = Concat <axis: int = 0> (s, rest)
    z = Reshape (x, t) l = Constant <value_ints: ints = [0]> () u = Reshape (z, whole) y = Identity (u)"""
    made = written_out(body, rest=np.array([40]), whole=np.array([0, 5, 8]))
    counts = operator_counts(made)
    assert (counts["Shape"], counts["Concat"], counts["Reshape"]) == (0, 0, 2)
    x = np.arange(80, dtype=np.float32).reshape(2, 5, 8)
    with pytest.raises(Exception, match=r"[Rr]eshape|shape"):
        open_model(written_out(body, rest=np.array([39]), whole=np.array([0, 5, 8])))({"x": x})


def test_a_squeeze_gets_its_axes() -> None:
    made = written_out("u = Unsqueeze (e, last) v = Squeeze (u) y = Add (x, v)")
    (squeeze,) = [n for n in made.graph if n.op_type == "Squeeze"]
    assert squeeze.inputs[1].const_value.numpy().tolist() == [0]
