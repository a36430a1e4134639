"""Recognition of gates: by what they are computed from, in every layout and spelling; and what is no gate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.export.interpret import run
from attn_deploy.export.recognize import recognize
from attn_deploy.export.recognize.site import Kind, Reason
from attn_deploy.export.rewrite import rewrite
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import sqnr_db

Capture = Callable[..., Any]
Layer = Callable[[Any, Tensor], Tensor]
C, SIDE = 8, 6
CHANNEL, SPATIAL, RESIDUAL, RESPONSE = (
    Kind.CHANNEL_GATE,
    Kind.SPATIAL_GATE,
    Kind.RESIDUAL_GATE,
    Kind.RESPONSE_NORM,
)


class Gated(nn.Module):
    """conv, then the layer under test, on a map [batch, C, SIDE, SIDE]; sides differ where it could matter."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, C, 3, padding=1)
        self.down, self.up, self.mix = nn.Conv2d(C, 4, 1), nn.Conv2d(4, C, 1), nn.Conv2d(C, C, 3, padding=1)
        self.halves = nn.Conv2d(C, 2 * C, 1)
        self.fc, self.fc_halves = nn.Linear(C, C), nn.Linear(C, 2 * C)
        self.eca = nn.Conv1d(1, 1, 3, padding=1)
        self.pixel, self.one = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(C, 1, 1)
        self.tokens = nn.Conv2d(1, 1, 3, padding=1)
        self.scale, self.shift = nn.Parameter(1 + torch.rand(C)), nn.Parameter(torch.randn(C))
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self, self.conv(x))


def mlp(m: Any, pooled: Tensor) -> Tensor:
    return m.up(F.relu(m.down(pooled)))


def squeeze_excitation(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(mlp(m, F.adaptive_avg_pool2d(y, 1)))


def mean_in_two_steps(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.fc(y.mean(3).mean(2)))[:, :, None, None]


def sum_over_count(m: Any, y: Tensor) -> Tensor:
    return torch.sigmoid(m.fc(y.flatten(2).sum(-1) / (SIDE * SIDE))).view(-1, C, 1, 1).expand_as(y) * y


def effective_se(m: Any, y: Tensor) -> Tensor:
    return y * F.hardsigmoid(m.up(m.down(y.mean((2, 3), keepdim=True))))


def efficient_channels(m: Any, y: Tensor) -> Tensor:
    pooled = m.eca(y.mean((2, 3)).unsqueeze(1))
    return y * torch.sigmoid(pooled).view(y.shape[0], -1, 1, 1)


def cbam_channels(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(mlp(m, y.mean((2, 3), keepdim=True)) + mlp(m, y.amax((2, 3), keepdim=True)))


def global_context(m: Any, y: Tensor) -> Tensor:
    weights = m.one(y).flatten(2).transpose(1, 2).softmax(1)
    context = (y.flatten(2) @ weights).unsqueeze(-1)
    return y * torch.sigmoid(mlp(m, context))


def residual_tail(m: Any, y: Tensor) -> Tensor:
    gated = y * torch.sigmoid(mlp(m, F.adaptive_avg_pool2d(y, 1)))
    return F.relu(gated + m.up(m.down(y)))


def with_addcmul(m: Any, y: Tensor) -> Tensor:
    return torch.addcmul(m.mix(y), y, torch.sigmoid(mlp(m, y.mean((2, 3), keepdim=True))))


def se_channels_last(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.permute(0, 2, 3, 1))
    return (y * torch.sigmoid(m.fc(y.mean((1, 2), keepdim=True)))).permute(0, 3, 1, 2)


def se_of_tokens(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.flatten(2).transpose(1, 2))
    return y * torch.sigmoid(m.fc(y.mean(1, keepdim=True)))


def se_of_a_reordered_map(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2)
    return y * torch.sigmoid(m.fc(y.mean(1, keepdim=True)))


def se_of_channels_and_tokens(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.flatten(2))
    return y * torch.sigmoid(m.fc(y.mean(2)))[:, :, None]


def se_of_video(m: Any, y: Tensor) -> Tensor:
    y = y.unflatten(1, (C // 2, 2))
    pooled = y.mean((2, 3, 4)) @ m.down.weight.flatten(1)
    return y * torch.sigmoid(pooled @ m.up.weight.flatten(1)).view(-1, C // 2, 1, 1, 1)


def cbam_pixels(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.pixel(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)))


def maximum_first(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.pixel(torch.stack([y.max(1)[0], y.mean(1)], 1)))


def mean_alone(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.tokens(y.mean(1, keepdim=True)))


def weighted_pools(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.tokens(0.5 * y.mean(1, keepdim=True) + 0.5 * y.amax(1, keepdim=True)))


def triplet_branch(m: Any, y: Tensor) -> Tensor:
    y = y.permute(0, 2, 1, 3)
    pooled = torch.cat([y.amax(1, keepdim=True), y.mean(1, keepdim=True)], 1)
    return (y * torch.sigmoid(m.pixel(pooled))).permute(0, 2, 1, 3)


def gate_of_rows_and_columns(m: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = y.mean(3, keepdim=True), y.mean(2, keepdim=True).transpose(2, 3)
    hidden = F.hardswish(m.down(torch.cat([rows, columns], 2)))
    rows, columns = hidden.split([SIDE, SIDE], 2)
    return torch.sigmoid(m.up(rows)), torch.sigmoid(m.up(columns.transpose(2, 3)))


def coordinate(m: Any, y: Tensor) -> Tensor:
    rows, columns = gate_of_rows_and_columns(m, y)
    return y * columns * rows


def coordinate_at_once(m: Any, y: Tensor) -> Tensor:
    rows, columns = gate_of_rows_and_columns(m, y)
    return y * (rows * columns)


def simam(m: Any, y: Tensor) -> Tensor:
    """Yang et al., SimAM, 2021, equation 8: pools of the map and the map itself, without weights."""
    squares = (y - y.mean((2, 3), keepdim=True)).square()
    energy = squares / (4 * (squares.sum((2, 3), keepdim=True) / (SIDE * SIDE - 1) + 1e-4)) + 0.5
    return y * torch.sigmoid(energy)


def bottleneck(m: Any, y: Tensor) -> Tensor:
    """Park et al., BAM, 2018, equations 1 and 2."""
    return y + y * torch.sigmoid(mlp(m, y.mean((2, 3), keepdim=True)) + m.one(y))


def pixel(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(mlp(m, y))


def one_per_pixel(m: Any, y: Tensor) -> Tensor:
    return y * (F.relu6(m.one(y) + 3) / 6)


def pixel_of_tokens(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2)
    return y * (1 / (1 + torch.exp(-m.fc(y))))


def mask_branch(m: Any, y: Tensor) -> Tensor:
    small = m.mix(F.max_pool2d(y, 3, 2, 1))
    return torch.sigmoid(m.mix(F.interpolate(small, size=(SIDE, SIDE), mode="nearest")))


def residual_attention(m: Any, y: Tensor) -> Tensor:
    return (1 + mask_branch(m, y)) * F.relu(m.mix(y))


def residual_attention_summed(m: Any, y: Tensor) -> Tensor:
    trunk = F.relu(m.mix(y))
    return trunk + mask_branch(m, y) * trunk


def residual_attention_addcmul(m: Any, y: Tensor) -> Tensor:
    trunk = F.relu(m.mix(y))
    return torch.addcmul(trunk, trunk, mask_branch(m, y))


def response(y: Tensor, plane: tuple[int, ...], channels: int) -> Tensor:
    norm = y.norm(p=2, dim=plane, keepdim=True)
    return norm / (norm.mean(dim=channels, keepdim=True) + 1e-6)


def grn(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.permute(0, 2, 3, 1))
    return m.scale * (y * response(y, (1, 2), -1)) + m.shift + y


def grn_of_timm(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y)
    scale, shift = m.scale.view(1, -1, 1, 1), m.shift.view(1, -1, 1, 1)
    return y + torch.addcmul(shift, scale, y * response(y, (2, 3), 1))


def grn_by_hand(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y.flatten(2).transpose(1, 2))
    norm = y.pow(2).sum(1, keepdim=True).sqrt()
    return m.scale * (y * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + m.shift + y


def grn_alone(m: Any, y: Tensor) -> Tensor:
    y = F.gelu(y)
    return y * response(y, (2, 3), 1)


MEAN, BOTH = ("channel_pool_mean.",), ("channel_pool_mean_max.",)
GATES: dict[str, tuple[Layer, str, Kind, tuple[str, ...]]] = {
    "SE": (squeeze_excitation, "Gate", CHANNEL, MEAN),
    "SE, mean of means": (mean_in_two_steps, "Gate", CHANNEL, MEAN),
    "SE, sum over count": (sum_over_count, "Gate", CHANNEL, MEAN),
    "effective SE": (effective_se, "Gate", CHANNEL, MEAN),
    "ECA": (efficient_channels, "Gate", CHANNEL, MEAN),
    "CBAM's channels": (cbam_channels, "Gate", CHANNEL, BOTH),
    "SE with residual and ReLU": (residual_tail, "GateResidualRelu", CHANNEL, MEAN),
    "SE in addcmul": (with_addcmul, "GateResidual", CHANNEL, MEAN),
    "SE, channels last": (se_channels_last, "Gate", CHANNEL, ()),
    "SE of tokens": (se_of_tokens, "Gate", CHANNEL, ()),
    "SE of a map as tokens": (se_of_a_reordered_map, "Gate", CHANNEL, MEAN),
    "SE of channels and tokens": (se_of_channels_and_tokens, "Gate", CHANNEL, ()),
    "SE of video": (se_of_video, "Gate", CHANNEL, ()),
    "CBAM's pixels": (cbam_pixels, "Gate", SPATIAL, ("spatial_pool.",)),
    "CBAM's pixels, maximum first": (maximum_first, "Gate", SPATIAL, ("spatial_pool.",)),
    "mean of pixels": (mean_alone, "Gate", SPATIAL, ("spatial_pool.",)),
    "mean and maximum of pixels, added": (weighted_pools, "Gate", SPATIAL, ("spatial_pool.",)),
    "triplet attention's branch": (triplet_branch, "Gate", SPATIAL, ("spatial_pool.",)),
    "coordinate attention": (coordinate, "Gate", SPATIAL, ()),
    "coordinate attention, gates first": (coordinate_at_once, "Gate", SPATIAL, ()),
    "SimAM": (simam, "Gate", SPATIAL, MEAN),
    "BAM": (bottleneck, "GateResidual", SPATIAL, MEAN),
    "pixel attention": (pixel, "Gate", SPATIAL, ()),
    "pixel attention, one channel": (one_per_pixel, "Gate", SPATIAL, ()),
    "pixel attention of tokens": (pixel_of_tokens, "Gate", SPATIAL, ()),
    "residual attention": (residual_attention, "GateResidual", RESIDUAL, ()),
    "residual attention, summed": (residual_attention_summed, "GateResidual", RESIDUAL, ()),
    "residual attention, addcmul": (residual_attention_addcmul, "GateResidual", RESIDUAL, ()),
    "GRN": (grn, "Gate", RESPONSE, ()),
    "GRN, channels first, addcmul": (grn_of_timm, "Gate", RESPONSE, ()),
    "GRN of tokens, by hand": (grn_by_hand, "Gate", RESPONSE, ()),
    "GRN without scale and shift": (grn_alone, "Gate", RESPONSE, ()),
}
INPUT = f"x=1x3x{SIDE}x{SIDE}"


def pools_in(program: Any) -> list[str]:
    targets = [str(n.target).removeprefix("attn_deploy.") for n in program.graph.nodes]
    return [t.removesuffix("default") for t in targets if "_pool" in t and not t.startswith("aten")]


@pytest.mark.parametrize("case", GATES)
def test_a_gate_becomes_its_operator_and_computes_the_same(case: str, captured: Capture) -> None:
    layer, operator, kind, pools = GATES[case]
    model = captured(Gated(layer), INPUT)
    rewritten = rewrite(model, recognize(model))
    assert rewritten.skipped == ()
    assert [(s.operator, s.kind, s.proven) for s in rewritten.sites] == [(operator, kind, True)]
    lines, first = inspect.getsourcelines(Gated.forward)
    assert rewritten.sites[0].source_line.endswith(f"test_recognize_gates.py:{first + len(lines) - 1}")
    assert pools_in(rewritten.program) == list(pools)
    feeds = make_feeds(model.inputs, batch=3, seed=5)
    got = run(rewritten.program, {k: torch.from_numpy(v) for k, v in feeds.items()})
    assert sqnr_db(model.reference(feeds)["output"], got.outputs[0].numpy()) > 100


@pytest.mark.parametrize("layer", [cbam_channels, cbam_pixels, maximum_first, weighted_pools])
def test_no_pool_of_the_model_is_left_beside_the_operator(layer: Layer, captured: Capture) -> None:
    model = captured(Gated(layer), INPUT)
    rewritten = rewrite(model, recognize(model))
    left = [str(n.target) for n in rewritten.program.graph.nodes]
    assert not any(t.startswith(("aten.mean", "aten.amax", "aten.max.")) for t in left)


def test_both_gates_of_coordinate_attention_are_in_one_operator(captured: Capture) -> None:
    model = captured(Gated(coordinate), INPUT)
    rewritten = rewrite(model, recognize(model))
    (output,) = [n for n in rewritten.program.graph.nodes if n.op == "output"]
    assert [n.name for n in output.all_input_nodes] == [rewritten.sites[0].node]


def test_a_map_times_the_weights_of_a_softmax_belongs_to_the_softmax(captured: Capture) -> None:
    """Split attention, although its weights come from a pool of what they weight."""

    def split(m: Any, y: Tensor) -> Tensor:
        branches = torch.stack([y, F.relu(m.mix(y))], 1)
        pooled = branches.sum(1).mean((2, 3), keepdim=True)
        return (branches * torch.stack([m.mix(pooled), pooled], 1).softmax(1)).sum(1)

    findings = recognize(captured(Gated(split), INPUT))
    anchors = [str(found.anchor.target) for found in (*findings.sites, *findings.skipped)]
    assert anchors == ["aten.softmax.int"]


def test_the_product_of_global_context_is_a_gate_beside_its_context_pool(captured: Capture) -> None:
    model = captured(Gated(global_context), INPUT)
    findings = recognize(model)
    (product,) = [n for n in model.program.graph.nodes if str(n.target) == "aten.mul.Tensor"]
    assert [s.kind for s in findings.sites if s.anchor is product] == [CHANNEL]
    gates = [s for s in rewrite(model, findings).sites if s.kind is CHANNEL]
    assert [(s.operator, s.proven) for s in gates] == [("Gate", True)]


@pytest.mark.parametrize("activation", ["", "Relu"])
def test_of_gates_in_parallel_one_takes_the_sum_and_its_activation(activation: str, captured: Capture) -> None:
    """Roy et al., scSE, 2018: channels and pixels of one map."""

    def concurrent(m: Any, y: Tensor) -> Tensor:
        total = squeeze_excitation(m, y) + pixel(m, y)
        return F.relu(total) if activation else total

    model = captured(Gated(concurrent), INPUT)
    rewritten = rewrite(model, recognize(model))
    operators = sorted((s.kind, s.operator) for s in rewritten.sites)
    assert operators == [(CHANNEL, f"GateResidual{activation}"), (SPATIAL, "Gate")]
    assert rewritten.skipped == ()


def silu(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(1.702 * y)


def residual_silu(m: Any, y: Tensor) -> Tensor:
    return y + y * torch.sigmoid(1.702 * y)


def scaled_silu(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.scale.view(1, -1, 1, 1) * y)


def hard_swish(m: Any, y: Tensor) -> Tensor:
    return y * F.relu6(y + 3) / 6


def mish(m: Any, y: Tensor) -> Tensor:
    return y * torch.tanh(F.softplus(y))


def glu(m: Any, y: Tensor) -> Tensor:
    value, gate = m.halves(y).chunk(2, 1)
    return value * torch.sigmoid(gate)


def residual_glu(m: Any, y: Tensor) -> Tensor:
    value, gate = m.halves(y).chunk(2, 1)
    return value * (1 + torch.sigmoid(gate))


def swiglu(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2)
    value, gate = m.fc_halves(y).chunk(2, -1)
    return F.silu(gate) * value


def swiglu_of_two_layers(m: Any, y: Tensor) -> Tensor:
    hidden = m.mix(y)
    return hidden * torch.sigmoid(hidden) * m.up(m.down(y))


def large_kernel(m: Any, y: Tensor) -> Tensor:
    return y * m.mix(y)


def rectified(m: Any, y: Tensor) -> Tensor:
    return y * F.relu(m.mix(y))


def gate_of_two_maps(m: Any, y: Tensor) -> Tensor:
    """Oktay et al., Attention U-Net, 2018: without a pool and with another map, as in a gated recurrent unit."""
    other, y = F.relu(m.mix(y)), F.relu(m.up(m.down(y)))
    return y * torch.sigmoid(m.one(y) + m.one(other))


def modulation(m: Any, y: Tensor) -> Tensor:
    return (1 + m.mix(y)) * F.relu(m.up(m.down(y))) + y


def layer_norm(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2)
    centred = y - y.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * m.scale + m.shift


def rms_norm(m: Any, y: Tensor) -> Tensor:
    y = y.flatten(2).transpose(1, 2)
    return m.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def rms_norm_scale_first(m: Any, y: Tensor) -> Tensor:
    y = y.permute(0, 2, 3, 1)
    return y * (m.scale * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))


def group_norm(m: Any, y: Tensor) -> Tensor:
    groups = y.reshape(-1, 2, C // 2, SIDE * SIDE)
    centred = groups - groups.mean((2, 3), keepdim=True)
    return (centred * (centred.var((2, 3), keepdim=True) + 1e-5).pow(-0.5)).reshape(-1, C, SIDE, SIDE)


def batch_norm(m: Any, y: Tensor) -> Tensor:
    return (y - m.shift.view(-1, 1, 1)) * torch.rsqrt(y.var((0, 2, 3), keepdim=True) + 1e-5)


def batch_norm_after(m: Any, y: Tensor) -> Tensor:
    factor = 1 / torch.sqrt(y.var((0, 2, 3), keepdim=True) + 1e-5)
    return y * factor - y.mean((0, 2, 3), keepdim=True) * factor


def unit_length(m: Any, y: Tensor) -> Tensor:
    return y * (1 / y.norm(dim=1, keepdim=True).clamp_min(1e-12))


def softmax_by_hand(m: Any, y: Tensor) -> Tensor:
    powers = torch.exp(y - y.amax(1, keepdim=True))
    return powers * powers.sum(1, keepdim=True).reciprocal()


def int8_range(m: Any, y: Tensor) -> Tensor:
    return torch.round(y * (127 / y.abs().amax((1, 2, 3), keepdim=True)))


NO_GATES: dict[str, Layer] = {
    "SiLU": silu,
    "SiLU with residual": residual_silu,
    "Swish with a learned slope": scaled_silu,
    "hard-swish": hard_swish,
    "Mish": mish,
    "GLU": glu,
    "GLU with residual": residual_glu,
    "SwiGLU": swiglu,
    "SwiGLU of two layers": swiglu_of_two_layers,
    "large kernel attention, unbounded": large_kernel,
    "a factor without an upper bound": rectified,
    "a gate of two maps": gate_of_two_maps,
    "modulation": modulation,
    "LayerNorm": layer_norm,
    "RMSNorm": rms_norm,
    "RMSNorm, channels last": rms_norm_scale_first,
    "GroupNorm": group_norm,
    "BatchNorm": batch_norm,
    "BatchNorm, shift after": batch_norm_after,
    "L2 norm": unit_length,
    "softmax": softmax_by_hand,
    "range of INT8": int8_range,
}


@pytest.mark.parametrize("case", NO_GATES)
def test_activations_gated_units_and_norms_spelled_by_hand_are_neither_site_nor_skip(
    case: str, captured: Capture
) -> None:
    findings = recognize(captured(Gated(NO_GATES[case]), INPUT))
    assert findings.sites == []
    assert findings.skipped == []


def depends_on_the_map_as_well(m: Any, y: Tensor) -> Tensor:
    return y * (m.mix(y).mean((2, 3), keepdim=True) + y.mean((2, 3), keepdim=True) - y)


def map_smaller_than_the_gate(m: Any, y: Tensor) -> Tensor:
    row = y[:, :1]
    return row * torch.sigmoid(row.mean((2, 3), keepdim=True) * m.scale.view(1, -1, 1, 1))


SKIPPED = {
    "a gate without bounds that sees the map itself": (depends_on_the_map_as_well, Reason.GATE_OTHER_INPUTS),
    "a gate that the map is expanded to": (map_smaller_than_the_gate, Reason.GATE_SHAPE),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_product_with_something_pooled_that_is_no_gate_is_skipped_with_its_reason(
    case: str, captured: Capture
) -> None:
    layer, reason = SKIPPED[case]
    findings = recognize(captured(Gated(layer), INPUT))
    assert findings.sites == []
    assert [s.reason for s in findings.skipped] == [reason]


class ForeignGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.conv(x)
        return y * torch.sigmoid(self.mix(y.mean((2, 3)) + other))[:, :, None, None]


def test_a_gate_that_sees_another_input_is_skipped_with_its_reason(captured: Capture) -> None:
    findings = recognize(captured(ForeignGate(), "x=1x3x8x8", "other=1x8"))
    assert findings.sites == []
    assert [s.reason for s in findings.skipped] == [Reason.GATE_OTHER_INPUTS]
