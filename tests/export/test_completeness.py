"""Nothing is passed over in silence: every softmax, every scaled_dot_product_attention and every product with something
derived from a pool of its partner is a site or a skip. They are counted here by a search of its own over the captured
graph, which shares nothing with the recognisers but the graph.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.recognize import recognize

Capture = Callable[..., CapturedModel]

LAYOUT = {"reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "flatten", "unflatten", "to", "_to_copy"}
TAKEN_APART = {"select", "slice", "split", "split_with_sizes", "unbind", "chunk", "getitem", "expand"}
LAYERS = {"linear", "addmm", "conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"}
SOFTMAX = {"softmax", "_softmax"}
MATRIX_PRODUCTS = {"matmul", "bmm", "mm"}
REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm"}


def name_of(node: Node) -> str:
    """`mean` for aten.mean.dim."""
    text = str(node.target) if node.op == "call_function" else ""
    return text.split(".")[1] if text.startswith("aten.") else getattr(node.target, "__name__", "")


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor)


def size(node: Node) -> int:
    return math.prod(int(d) if isinstance(d, int) else 2 for d in node.meta["val"].shape)


def operands(node: Node) -> list[Node]:
    """The inputs that hold data: tensors, and tuples of them."""
    return [n for n in node.all_input_nodes if is_tensor(n) or isinstance(n.meta.get("val"), (tuple, list))]


class Count:
    """The anchors of one graph."""

    def __init__(self, captured: CapturedModel) -> None:
        self.nodes = list(captured.program.graph.nodes)
        fed = set(captured.program.graph_signature.user_inputs)
        self.fed = {n for n in self.nodes if n.op == "placeholder" and n.name in fed}
        for node in self.nodes:
            if node.op == "call_function" and any(n in self.fed for n in node.all_input_nodes):
                self.fed.add(node)

    def anchors(self) -> Iterator[Node]:
        for node in self.nodes:
            name = name_of(node)
            if node in self.fed and (name in SOFTMAX or name == "scaled_dot_product_attention"):
                yield node
            factors = node.args[:2] if name == "mul" else node.args[1:3] if name == "addcmul" else ()
            if len(factors) == 2 and all(is_tensor(f) and f in self.fed for f in factors):
                left, right = factors
                if node.meta["val"].dim() >= 3 and (self.gates(left, right) or self.gates(right, left)):
                    yield node

    def gates(self, x: Any, factor: Any) -> bool:
        """True when `factor` comes from a pool of `x`, and is neither the weights of a softmax nor a norm's factor."""
        if self.ends_in(factor, SOFTMAX, LAYOUT | TAKEN_APART) or self.divides(factor):
            return False
        same = {self.unmoved(x)}
        return any(self.pools(node, same) for node in self.behind(factor, same, set()))

    def unmoved(self, node: Node) -> Node:
        while name_of(node) in LAYOUT:
            node = operands(node)[0]
        return node

    def behind(self, start: Node, stop: set[Node], walls: set[str]) -> Iterator[Node]:
        """What `start` is computed from, itself included; nothing behind `stop` or behind an operator of `walls`."""
        pending, seen = [start], {start}
        while pending:
            node = pending.pop()
            yield node
            if node in stop or name_of(node) in walls:
                continue
            for source in operands(node):
                if source in self.fed and source not in seen:
                    seen.add(source)
                    pending.append(source)

    def pools(self, node: Node, same: set[Node]) -> bool:
        """True for a reduction of the map, or of something computed from it element by element."""
        name, sources = name_of(node), operands(node)
        if name in MATRIX_PRODUCTS:
            sources = [n for n in sources if size(n) > size(node)] if all(n in self.fed for n in sources) else []
        elif not (name in REDUCTIONS or "_pool" in name) or (name in ("max", "min") and len(sources) == 2):
            return False
        walls = LAYERS | SOFTMAX | MATRIX_PRODUCTS
        return any(n in same for s in sources for n in self.behind(s, same, walls))

    def ends_in(self, node: Node, names: set[str], through: set[str]) -> bool:
        while name_of(node) in through:
            node = operands(node)[0]
        return name_of(node) in names

    def divides(self, factor: Node) -> bool:
        """1 / f, up to its layout and to a constant factor."""
        while name_of(factor) in LAYOUT | {"expand", "mul"}:
            inner = [n for n in operands(factor) if n in self.fed]
            if len(inner) != 1:
                return False
            factor = inner[0]
        is_power = name_of(factor) == "pow" and isinstance(factor.args[1], float) and factor.args[1] < 0
        return is_power or name_of(factor) in ("rsqrt", "reciprocal")


def require_complete(model: CapturedModel, expected: int) -> None:
    counted = list(Count(model).anchors())
    assert len(counted) == expected
    findings = recognize(model)
    named = collections.Counter(found.anchor for found in (*findings.sites, *findings.skipped))
    assert [n for n in counted if named[n] != 1] == []
    assert [n for n, times in named.items() if times != 1] == []


class Map(nn.Module):
    """A convolution, then the case's function of the map."""

    def __init__(self, layer: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mix, self.one = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)
        self.fc, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self, self.conv(x))


def squeeze_excitation(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.mix(y.mean((2, 3), keepdim=True)))


def channels_last(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.permute(0, 2, 3, 1))
    return y * torch.sigmoid(m.fc(y.mean((1, 2))))[:, None, None, :]


def tokens(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.flatten(2).transpose(1, 2))
    return y * torch.sigmoid(m.fc(y.amax(1, keepdim=True)))


def in_addcmul(m: Any, y: Tensor) -> Tensor:
    return torch.addcmul(m.mix(y), y, torch.sigmoid(m.mix(F.adaptive_max_pool2d(y, 1))))


def coordinate(m: Any, y: Tensor) -> Tensor:
    """The product with the second gate has a product for its partner, not the map: it belongs to the first."""
    return y * torch.sigmoid(m.mix(y.mean(3, keepdim=True))) * torch.sigmoid(m.mix(y.mean(2, keepdim=True)))


def coordinate_at_once(m: Any, y: Tensor) -> Tensor:
    return y * (torch.sigmoid(m.mix(y.mean(3, keepdim=True))) * torch.sigmoid(m.mix(y.mean(2, keepdim=True))))


def response_norm(m: Any, y: Tensor) -> Tensor:
    y = y.permute(0, 2, 3, 1)
    norm = y.norm(dim=(1, 2), keepdim=True)
    return y + m.scale * (y * (norm / (norm.mean(-1, keepdim=True) + 1e-6)))


def global_context(m: Any, y: Tensor) -> Tensor:
    weights = m.one(y).flatten(2).softmax(2)
    context = (y.flatten(2) * weights).sum(2, keepdim=True).unsqueeze(-1)
    return y * torch.sigmoid(m.mix(context))


def global_context_as_matrix_product(m: Any, y: Tensor) -> Tensor:
    weights = m.one(y).flatten(2).softmax(2)
    return y * torch.sigmoid(m.mix((y.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)))


def separable_attention(m: Any, y: Tensor) -> Tensor:
    """MobileViTv2: what the values are multiplied by is pooled from the keys, the other half of one projection."""
    keys, values = m.mix(y).flatten(2).chunk(2, 1)
    context = (keys * m.one(y).flatten(2).softmax(-1)).sum(-1, keepdim=True)
    return F.relu(values) * context.expand_as(values)


def split_attention(m: Any, y: Tensor) -> Tensor:
    branches = torch.stack([y, F.relu(m.mix(y))], 1)
    pooled = branches.sum(1).mean((2, 3), keepdim=True)
    weights = torch.stack([m.mix(pooled), pooled], 1).softmax(1)
    return (branches * weights).sum(1)


def half_of_another(m: Any, y: Tensor) -> Tensor:
    """Attentional feature fusion: the gate of y comes from the pool of a sum that y is a part of."""
    other = F.relu(m.mix(y))
    return F.gelu(y) * 0.5 + other * torch.sigmoid(m.mix((y + other).mean((2, 3), keepdim=True)))


def minus_its_mean(m: Any, y: Tensor) -> Tensor:
    return y * (y - y.mean((2, 3), keepdim=True))


def grown_by_its_gate(m: Any, y: Tensor) -> Tensor:
    row = y[:, :1]
    return row * torch.sigmoid(m.scale.view(1, -1, 1, 1) * row.mean((2, 3), keepdim=True))


def classes(m: Any, y: Tensor) -> Tensor:
    return m.fc(y.mean((2, 3))).softmax(-1)


def attention_by_hand(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2)
    return (m.fc(y) @ y.transpose(1, 2)).softmax(-1) @ y


def attention(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2).unsqueeze(1)
    return F.scaled_dot_product_attention(m.fc(y), y, y)


def norms(m: Any, y: Tensor) -> Tensor:
    """RMSNorm over channels, InstanceNorm, softmax by hand: their products are none of ours."""
    y = y * torch.rsqrt(y.pow(2).mean(1, keepdim=True) + 1e-6)
    centred = y - y.mean((2, 3), keepdim=True)
    y = centred * (centred.var((2, 3), keepdim=True) + 1e-5).pow(-0.5)
    powers = torch.exp(y - y.amax(1, keepdim=True))
    return powers * (1 / powers.sum(1, keepdim=True))


def activations(m: Any, y: Tensor) -> Tensor:
    first, second = m.mix(y).chunk(2, 1)
    return y * torch.sigmoid(y) * F.hardsigmoid(torch.cat([first, second * torch.sigmoid(first)], 1))


TINY: dict[str, tuple[Callable[[Any, Tensor], Tensor], int]] = {
    "SE": (squeeze_excitation, 1),
    "SE, channels last": (channels_last, 1),
    "SE of tokens": (tokens, 1),
    "SE in addcmul": (in_addcmul, 1),
    "coordinate attention": (coordinate, 1),
    "coordinate attention, gates first": (coordinate_at_once, 1),
    "GRN": (response_norm, 1),
    "global context": (global_context, 2),
    "global context as a matrix product": (global_context_as_matrix_product, 2),
    "separable attention": (separable_attention, 1),
    "split attention": (split_attention, 1),
    "a gate from a sum of two maps": (half_of_another, 1),
    "a factor that is no gate": (minus_its_mean, 1),
    "a map smaller than its gate": (grown_by_its_gate, 1),
    "a classifier": (classes, 1),
    "attention by hand": (attention_by_hand, 1),
    "attention": (attention, 1),
    "norms": (norms, 0),
    "activations and gated units": (activations, 0),
}


@pytest.mark.parametrize("case", TINY)
def test_every_anchor_of_a_tiny_graph_is_one_site_or_one_skip(case: str, captured: Capture) -> None:
    layer, expected = TINY[case]
    require_complete(captured(Map(layer), "x=1x3x5x6"), expected)


def timm_model(name: str, **arguments: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=4, **arguments)


def resnet(attn_layer: str) -> nn.Module:
    """One block in each of four stages."""
    return timm_model("resnet10t", block_args={"attn_layer": attn_layer}, channels=(8, 8, 16, 16))


def mobilenet() -> nn.Module:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 24, 16, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(blocks, last_channel=32, num_classes=4)


def swin() -> nn.Module:
    """The second block has shifted windows."""
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], embed_dim=16, depths=[2], num_heads=[2], window_size=[4, 4], num_classes=4)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=16, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return LlamaModel(config)


IDS = "input_ids=1x6:int64:20"
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "ResNet with SE": (lambda: resnet("se"), "x=1x3x64x64", 4),
    "ResNet with ECA": (lambda: resnet("eca"), "x=1x3x64x64", 4),
    "ResNet with global context": (lambda: resnet("gc"), "x=1x3x64x64", 8),
    "ResNet with global context, added": (lambda: resnet("gca"), "x=1x3x64x64", 4),
    "ResNet with CBAM": (lambda: resnet("cbam"), "x=1x3x64x64", 8),
    "ResNet with coordinate attention": (lambda: resnet("coord"), "x=1x3x64x64", 4),
    "ResNet with split attention": (lambda: resnet("splat"), "x=1x3x64x64", 4),
    "ResNet with selective kernels": (lambda: resnet("sk"), "x=1x3x64x64", 4),
    "ConvNeXt V2": (
        lambda: timm_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
        "x=1x3x32x32",
        4,
    ),
    "ViT": (lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24), "x=1x3x32x32", 2),
    "XCiT": (lambda: timm_model("xcit_nano_12_p16_224", img_size=32, depth=1), "x=1x3x32x32", 3),
    "MobileNet v3 of torchvision": (mobilenet, "x=1x3x32x32", 2),
    "Swin of torchvision": (swin, "x=1x3x32x32", 2),
    "BERT": (bert, IDS, 2),
    "Llama": (llama, IDS, 2),
}


ALSO_SLOW = {
    "ResNet with ECA", "ResNet with global context, added", "ResNet with coordinate attention",
    "ResNet with split attention", "ResNet with selective kernels",
}  # fmt: skip
"""Under `make test-all`: a ResNet again, with a layer that is in `TINY`, test_recognize_gates.py or tests/coverage."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in ALSO_SLOW else ()) for case in MODELS]
)
def test_every_anchor_of_a_model_is_one_site_or_one_skip(case: str, captured: Capture) -> None:
    make, inputs, expected = MODELS[case]
    torch.manual_seed(0)
    require_complete(captured(make(), inputs), expected)
