"""Whole models lowered for ONNX Runtime's CUDA provider: the same numbers, on the provider, with their parts fused."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from attn_deploy.errors import UnavailableError
from attn_deploy.export.canonical import CanonicalModel, portable
from attn_deploy.export.capture import CapturedModel, capture
from attn_deploy.export.lower import onnxruntime_cuda
from attn_deploy.export.lower.cuda_kernels import NATIVE_MAX_HEAD_DIM, NO_BF16, NO_BF16_CONTRIB, NO_FP16
from attn_deploy.export.lower.cuda_opset import NO_KERNEL_AT_22
from attn_deploy.export.lower.lowered import Conditions
from attn_deploy.export.precision.emulate import emulate
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.export.sources import LoadedSource, SourceRequest, load_source
from attn_deploy.export.to_onnx import to_onnx
from attn_deploy.inputs import make_feeds, parse_input
from attn_deploy.parity import sqnr_db
from attn_deploy.runtimes.native import cuda
from attn_deploy.session import Array, DimBounds
from attn_deploy.target import Precision

sys.path.insert(0, str(Path(__file__).parents[1] / "coverage"))  # for attention_coverage
sys.path.insert(0, str(Path(__file__).parents[1] / "runtimes"))  # for cuda_stand_ins

import cuda_stand_ins
from attention_coverage.models import BY_NAME

MIN_DB = {Precision.FP32: 100.0, Precision.FP16: 45.0, Precision.BF16: 30.0}
CUDA = "CUDAExecutionProvider"
ON_THE_HOST = {"Shape", "Squeeze", "Concat", "Gather", "Slice", "Unsqueeze", "Mul", "Add", "Cast"}
"""What ONNX Runtime computes shapes with on the host, by choice: nothing is copied for it."""

needs_stand_ins = pytest.mark.skipif(cuda_stand_ins.missing() is not None, reason=str(cuda_stand_ins.missing()))


class Windowed(nn.Module):
    """Windows of 2 x 3 tokens over 4 x 6, moved by one token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads
        grid = torch.arange(24).reshape(4, 6).roll((-1, -1), (0, 1))
        order = grid.reshape(2, 2, 2, 3).transpose(1, 2).reshape(4, 6)
        self.register_buffer("order", order.flatten())
        self.register_buffer("back", order.flatten().argsort())
        self.bias = nn.Parameter(torch.randn(4, heads, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        windows = self.qkv(x)[:, self.order].reshape(x.shape[0] * 4, 6, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = windows
        scores = query @ key.transpose(-2, -1) * 0.3
        scores = scores.reshape(-1, 4, self.heads, 6, 6) + self.bias
        mixed = scores.reshape(-1, self.heads, 6, 6).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(x.shape)[:, self.back])


class Masked(nn.Module):
    """Self-attention that leaves tokens out, with three projections and two key heads for four query heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(dim, dim // 2), nn.Linear(dim, dim // 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query = self.query(x).unflatten(2, (4, -1)).transpose(1, 2)
        key, value = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (self.key, self.value))
        seen = mask.bool()[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms behind the sums with `post`."""

    def __init__(self, attention: nn.Module, dim: int, post: bool) -> None:
        super().__init__()
        self.attn, self.post = attention, post
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        if self.post:
            x = self.norm1(x + self.attn(x, *mask))
            return self.norm2(x + self.mlp(x))
        x = x + self.attn(self.norm1(x), *mask)
        return x + self.mlp(self.norm2(x))


class Layers(nn.Module):
    """Two layers and a head: x [batch, 24, 32] (and mask [batch, 24]) -> [batch, 5]."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(32, 5)

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *mask)
        return self.head(x.mean(1))


class MaskedLayers(Layers):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, mask)


def made(name: str) -> LoadedSource:
    torch.manual_seed(0)
    x, mask = parse_input("x=1x24x32"), parse_input("mask=1x24:int64:2")
    if name == "windows":
        module, inputs = Layers(*(Layer(Windowed(32, 4), 32, False) for _ in range(2))), (x,)
        return LoadedSource(name, name, module.eval(), inputs, "as they are")
    if name == "masked":
        module = MaskedLayers(*(Layer(Masked(32), 32, True) for _ in range(2)))
        return LoadedSource(name, name, module.eval(), (x, mask), "as they are")
    return load_source("demo", SourceRequest("")) if name == "demo" else BY_NAME[name].load(tiny=True)


@cache
def exported(name: str) -> tuple[CapturedModel, CanonicalModel]:
    model = capture(made(name), {"batch": DimBounds()})
    return model, to_onnx(rewrite(model, recognize(model)))


def open_model(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def lowered(name: str, precision: Precision, **options: str) -> ir.Model:
    model, canonical = exported(name)

    def calibration() -> Iterator[Mapping[str, Array]]:
        return (make_feeds(model.inputs, batch=2, seed=seed) for seed in range(3))

    return onnxruntime_cuda.lower(canonical, precision, calibration=calibration, open_model=open_model, **options).model  # type: ignore[arg-type]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


SLOW = ("demo", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "hf_bert", "hf_llama", "seresnet50")
MODELS = ["windows", "masked", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize(
    "precision", [pytest.param(Precision.FP32, marks=pytest.mark.slow), Precision.FP16, Precision.BF16]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_lowered_model_is_the_same_model(name: str, precision: Precision) -> None:
    model, canonical = exported(name)
    if precision is Precision.BF16 and any(n.op_type in NO_KERNEL_AT_22 for n in canonical.model.graph):
        pytest.skip("BF16 is refused: tested below")
    run = open_model(emulate(lowered(name, precision)))
    reference = open_model(portable(canonical))
    for batch in (1, 3):
        feeds = make_feeds(model.inputs, batch=batch, seed=11)
        if "mask" in feeds:
            feeds["mask"][-1] = 0
        expected, got = reference(feeds), run(feeds)
        assert list(got) == list(expected)
        for output, value in got.items():
            assert value.dtype == expected[output].dtype
            assert sqnr_db(expected[output], value) >= MIN_DB[precision]


@needs_stand_ins
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("name", MODELS)
def test_the_cuda_provider_takes_every_node(name: str, precision: Precision) -> None:
    if precision is Precision.BF16 and any(n.op_type in NO_KERNEL_AT_22 for n in exported(name)[1].model.graph):
        pytest.skip("BF16 is refused: tested below")
    proto = ir.to_proto(lowered(name, precision)).SerializeToString()
    placed = cuda_stand_ins.placements(proto)
    assert placed
    assert [p for p in placed if p.provider != CUDA and p.op_type not in ON_THE_HOST] == []


def test_windows_norms_and_layers_are_fused() -> None:
    counts = operators(lowered("windows", Precision.FP32))
    assert counts["Attention"] == 2
    assert counts["SkipLayerNormalization"] == 3  # the first norm has no sum before it
    assert counts["BiasGelu"] == 2
    assert counts["Softmax"] == counts["Transpose"] == counts["Gelu"] == 0
    assert counts["Gather"] == 8


def test_layers_with_a_mask_share_its_bias() -> None:
    counts = operators(lowered("masked", Precision.FP16))
    assert counts["Attention"] == 2
    assert counts["SkipLayerNormalization"] == 4
    assert counts["ReduceMax"] == 1
    assert counts["Where"] == 3  # the bias, and rows without a key in each of two layers


def test_names_begin_with_the_site() -> None:
    _, canonical = exported("windows")
    names = [str(n.name) for n in lowered("windows", Precision.FP16).graph if n.op_type == "Attention"]
    assert len(names) == len(canonical.sites)
    assert all(n.startswith(f"{site.node}/") for n, site in zip(names, canonical.sites, strict=True))


def test_options_say_what_the_provider_must_be_asked_for() -> None:
    _, canonical = exported("windows")
    assert onnxruntime_cuda.lower(canonical, Precision.FP32).options == {"cuda_graph": "1", "use_tf32": "0"}
    half = onnxruntime_cuda.lower(canonical, Precision.FP16).options
    assert half == {"cuda_graph": "1", "enable_skip_layer_norm_strict_mode": "1"}


def suffixes(canonical: CanonicalModel, precision: Precision, *kernels: str) -> list[str]:
    """Of the candidates; each is lowered as it says."""
    found = onnxruntime_cuda.alternatives(canonical, precision, Conditions(frozenset(kernels)))
    for one in found:
        assert onnxruntime_cuda.lower(canonical, precision, **one.arguments).options is not None
    return [one.suffix for one in found]


def test_what_only_a_measurement_can_decide_is_offered() -> None:
    (_, windows), pooled = exported("windows"), pooled_model()
    assert suffixes(windows, Precision.FP32) == [""]
    assert suffixes(windows, Precision.FP16) == ["", "-multihead"]
    assert suffixes(windows, Precision.FP16, "PackedAttentionIndexedBias") == ["", "-native", "-multihead"]
    assert suffixes(pooled, Precision.FP16) == ["", "-nhwc"]
    multihead = onnxruntime_cuda.lower(windows, Precision.FP16, attention="MultiHeadAttention").model
    assert operators(multihead)["MultiHeadAttention"] == 2


def test_our_kernels_are_offered_only_for_heads_that_they_take() -> None:
    _, windows = exported("windows")
    assert NATIVE_MAX_HEAD_DIM == cuda.MAX_HEAD_DIM
    form = windows.sites[0].operator
    assert onnxruntime_cuda.native_forms(windows, frozenset({form})) == {form}
    wide = dataclasses.replace(windows, model=windows.model.clone())
    node = next(n for n in wide.model.graph if n.op_type == form)
    packed = node.inputs[0]
    assert packed is not None
    assert packed.shape is not None
    packed.shape = ir.Shape([*packed.shape[:-1], NATIVE_MAX_HEAD_DIM + 1])
    assert onnxruntime_cuda.native_forms(wide, frozenset({form})) == frozenset()


def pooled_model() -> CanonicalModel:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]> net (float[batch, 3, 8, 8] x, float[4, 3, 1, 1] w) => '
        "(float[batch, 4, 4, 4] y) { c = Conv (x, w) y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c) }"
    )
    return CanonicalModel(ir.from_proto(proto), (), (), (), {})


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.BF16])
def test_a_precision_without_kernels_is_refused(precision: Precision) -> None:
    with pytest.raises(UnavailableError) as raised:
        onnxruntime_cuda.lower(pooled_model(), precision)
    assert raised.value.got == ("int8" if precision is Precision.INT8 else "MaxPool")
    assert "--precision fp16" in str(raised.value.next_step)


def test_what_is_excluded_stays_in_fp32() -> None:
    _, canonical = exported("windows")
    model = onnxruntime_cuda.lower(canonical, Precision.FP16, exclude=("layers.0.mlp",)).model
    kept = next(n for n in model.graph if str(n.name).startswith("layers.0.mlp.0/MatMul"))
    other = next(n for n in model.graph if str(n.name).startswith("layers.1.mlp.0/MatMul"))
    assert kept.outputs[0].dtype == ir.DataType.FLOAT
    assert other.outputs[0].dtype == ir.DataType.FLOAT16


@needs_stand_ins
def test_the_tables_say_what_the_wheel_has() -> None:
    kernels = [k for k in cuda_stand_ins.kernels() if k.provider == CUDA and k.domain in ("", "ai.onnx")]

    def types(operator: str, opset: int) -> set[str]:
        """Of the kernels that the operator has at the opset; ONNX Runtime asks for the version it is registered for."""
        since = onnx.defs.get_schema(operator, opset, "").since_version
        fitting = [
            k for k in kernels if k.op_type == operator and (k.since == since or k.since < since <= k.until < 2**31 - 1)
        ]
        return {t for k in fitting for kinds in k.types.values() for t in kinds}

    operators = {
        k.op_type for k in kernels if onnx.defs.has(k.op_type) and not onnx.defs.get_schema(k.op_type).deprecated
    }
    at_20 = {o for o in operators if onnx.defs.get_schema(o).since_version <= 20 or _exists(o, 20)}
    lost = {o for o in at_20 if types(o, 20) and not types(o, 23)}
    assert lost == NO_KERNEL_AT_22
    for half, listed in (("tensor(float16)", NO_FP16), ("tensor(bfloat16)", NO_BF16)):
        lacking = {o for o in at_20 if "tensor(float)" in types(o, 23) and half not in types(o, 23)}
        assert lacking <= listed
        assert not [o for o in listed - NO_KERNEL_AT_22 - lacking if half in types(o, 20) & types(o, 23)]
    contrib = [k for k in cuda_stand_ins.kernels() if k.provider == CUDA and k.op_type in NO_BF16_CONTRIB]
    assert not any("tensor(bfloat16)" in kinds for k in contrib for kinds in k.types.values())


def _exists(operator: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return False
    return True
