"""Weights under which every attention and every gate of a model matters for its output.

Packages' own random weights hide faults: the last norm of a branch is zero, layer scales are tiny, the softmax is
nearly uniform, so a model keeps 30 dB and more with its attention deleted. `initialize` draws every parameter anew,
then settles the module on an example: each projection is scaled as the example passes through it (LSUV, Mishkin and
Matas 2016), BatchNorm takes the statistics it meets, and queries and keys grow until the softmax is peaked.

What is a query, a gate or the end of a residual branch is read off the autograd graph, not off names: the layers met
first when walking back from the scores of a softmax, and of those only the rows whose gradient is not zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attn_deploy.errors import UsageError
from attn_deploy.export.forward_tap import MASKED_BELOW, PROJECTIONS, ForwardTap
from attn_deploy.export.initial_values import fill, generator
from attn_deploy.export.module_tracker import ModuleTracker, first_line
from attn_deploy.export.weight_trace import WeightTrace

ENTROPY_TARGET = 0.5
ENTROPY_RANGE = (0.4, 0.6)
# Root mean square at the input of a gate: there, sigmoid and hard sigmoid are neither flat nor the same for all inputs.
GATE_RMS = 0.8
# The share of each channel's mean that its bias takes away. With 0, what all tokens have in common outgrows the rest
# and hides a deleted attention. With 1, BERT loses 8 dB more to noise.
CENTRED = 0.25
CALIBRATION_BATCH = 4
REFINEMENTS = 6


@dataclass(frozen=True)
class Balance:
    """`branch_rms` is the root mean square at the end of a residual branch; branches as strong as their stream multiply
    any noise: 60 dB of it on every layer leaves 12 dB at the output of levit_128 with 1.0, 27 dB with 0.35.
    `photographs` is the share of the calibration images that look like photographs; the others are noise."""

    branch_rms: float
    photographs: float


# Statistics taken on noise alone fit no photograph, where activations then run far out of them: INT8 of efficientnet_b0
# left 14 dB, and 21 dB like this.
CONVOLUTIONS_ALONE = Balance(branch_rms=0.25, photographs=0.5)
# Next to photographs, which differ as a whole, the tokens of one noise image are all alike: an attention deleted from
# coatnet_nano left 50 dB with half of them, 39 dB with a quarter, 27 dB with none.
WITH_ATTENTION = Balance(branch_rms=0.35, photographs=0.25)


@dataclass(frozen=True)
class AttentionGain:
    """One softmax over keys: where, its mean of entropy / log(keys), and the gain its scores were given."""

    site: str
    entropy: float
    gain: float


@dataclass(frozen=True)
class InitReport:
    """What `initialize` did. `output_std` is taken on the example; a note says where the best effort fell short."""

    seed: int
    mean_entropy: float | None
    attentions: tuple[AttentionGain, ...]
    gates: tuple[str, ...]
    output_std: float
    tensors_set: tuple[str, ...]
    notes: tuple[str, ...]


def _entropy(rows: Tensor, gain: float = 1.0) -> float:
    """Mean of entropy / log(keys) of softmax(gain * row) over [rows, keys]; masked keys do not count as keys."""
    valid = rows > MASKED_BELOW
    keys = valid.sum(-1)
    log_p = (rows * gain).masked_fill(~valid, -math.inf)[keys > 1].log_softmax(-1)
    return float((-(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1) / keys[keys > 1].log()).mean())


def _gain_for(rows: Tensor) -> float:
    """The gain that brings the entropy to its target, by bisection: entropy falls as the gain grows."""
    low, high = -6.0, 6.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(rows, math.exp(middle)) > ENTROPY_TARGET else (low, middle)
    # Scores that are all alike, or with one key left in every row, have no gain that would help.
    return math.exp(low) if -5.9 < low < 5.9 else 1.0


class _Settle(ForwardTap):
    """Gives BatchNorms their statistics, measures every softmax, and, given `targets`, scales projections as they run.

    While scaling, each softmax is taken at the gain it is to get, so that what follows settles on peaked attention.
    """

    def __init__(
        self, names: Mapping[int, str], seed: int, biases: dict[int, Tensor], targets: Mapping[str, float] | None
    ) -> None:
        super().__init__()
        self.names = names
        self.seed = seed
        self.biases = biases
        self.targets = targets
        self.done: set[int] = set()
        self.entropies: list[float] = []
        self.gains: list[float] = []

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        rows = scores.movedim(dim, -1).flatten(0, -2)
        rows = rows[torch.randint(len(rows), (1024,), generator=torch.Generator().manual_seed(0))].float()
        self.entropies.append(_entropy(rows))
        self.gains.append(_gain_for(rows))
        return scores if self.targets is None else torch.where(scores > MASKED_BELOW, scores * self.gains[-1], scores)

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        weight: Any = args[1] if len(args) > 1 else kwargs.get("weight")
        is_first = id(weight) in self.names and id(weight) not in self.done
        self.done.add(id(weight))  # an embedding is done too: a tied output projection must not shrink it
        if func is F.batch_norm and is_first:
            self._set_statistics(*args[:3])
        output = func(*args, **kwargs)
        if func not in PROJECTIONS or not is_first or self.targets is None:
            return output
        bias: Any = args[2] if len(args) > 2 else kwargs.get("bias")
        drawn = mean = torch.zeros((), device=output.device)
        if bias is not None:
            axis = output.dim() - (1 if func is F.linear else weight.dim() - 1)
            shape = [-1 if i == axis else 1 for i in range(output.dim())]
            drawn = bias.view(shape)
            output = output - drawn
        if id(bias) in self.names:  # not one that is put together in every forward pass, as in SwinV2
            drawn = self.biases.setdefault(id(bias), bias.clone()).view(shape)
            mean = CENTRED * output.mean([i for i in range(output.dim()) if i != axis], keepdim=True)
        rms = float((output - mean).float().square().mean().sqrt())
        factor = self.targets.get(self.names[id(weight)], 1.0) / rms if 1e-8 < rms < math.inf else 1.0
        weight.mul_(factor)
        if id(bias) in self.names:
            bias.copy_((drawn - factor * mean).flatten())
        return (output - mean) * factor + drawn

    def _set_statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """The statistics of the batch, moved by up to 20 %; few values per channel are drawn towards all channels'."""
        found_var, found_mean = torch.var_mean(x.float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
        count = x.numel() // x.shape[1]
        found_var = (count * found_var + 8 * found_var.mean()) / (count + 8)
        # A channel that is silent on the example must not be blown up on other inputs.
        found_var = found_var.clamp(min=0.05 * float(found_var.mean()) + 1e-6)
        rng = generator(self.seed, self.names[id(mean)])
        shift, stretch = (0.4 * torch.rand(2, x.shape[1], generator=rng) - 0.2).to(x)
        mean.copy_(found_mean * count / (count + 4) + shift * found_var.sqrt())
        var.copy_(found_var * (1 + stretch))


def _apply(tensors: Mapping[str, Tensor], knobs: list[dict[str, Tensor]], gains: list[float]) -> None:
    """Moves the scores of every site by its gain; a tensor of several sites takes the mean of what they ask."""
    for name in {name for powers in knobs for name in powers}:
        votes = [(powers[name], math.log(gain)) for powers, gain in zip(knobs, gains, strict=True) if name in powers]
        step = sum(power * log_gain for power, log_gain in votes) / sum(power > 0 for power, _ in votes).clamp(min=1)
        tensors[name].copy_(tensors[name] + step if "logit_scale" in name else tensors[name] * step.exp())


def _calibration_batch(example: Mapping[str, Tensor], seed: int, photographs: float) -> dict[str, Tensor]:
    """The example with variations of it behind it, to `CALIBRATION_BATCH` rows where all inputs share their first axis.

    Floats turn into noise of their own mean and spread over a dimmed copy; tokens and masks move along alike.
    """

    def vary(name: str, x: Tensor, shift: int) -> Tensor:
        if not x.is_floating_point():
            return x.roll(shift, -1)
        noise = torch.randn(x.shape, generator=generator(seed, f"{name}#{shift}")).to(x)
        return 0.6 * x + 0.4 * x.mean() + 0.8 * noise * x.std(correction=0)

    sizes = {len(x) if x.dim() else 0 for x in example.values()}
    copies = math.ceil(CALIBRATION_BATCH / max(sizes)) if len(sizes) == 1 and max(sizes) else 1
    rows = {name: torch.cat([x, *(vary(name, x, i) for i in range(1, copies))]) for name, x in example.items()}
    return {name: _partly_smooth(x, photographs, generator(seed, f"{name}#smooth")) for name, x in rows.items()}


def _partly_smooth(x: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Image batches [batch, channels, height, width] with the first of them as photographs are: a level per channel,
    large patches of light, a little noise."""
    count, channels = int(len(x) * share), x.shape[1] if x.dim() > 1 else 0
    if x.dim() != 4 or not x.is_floating_point() or min(x.shape[2:]) < 16 or not count:
        return x
    patches = torch.randn(count, channels, 7, 7, generator=rng)
    light = F.interpolate(patches, size=x.shape[2:], mode="bilinear")
    level = 0.8 * torch.randn(count, channels, 1, 1, generator=rng)
    grain = 0.3 * torch.randn(light.shape, generator=rng)
    return torch.cat([(light + level + grain).to(x), x[count:]])


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.flatten().float().cpu()] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for item in items for tensor in _floats(item)]


def _run(module: nn.Module, feeds: Mapping[str, Tensor], tap: ForwardTap) -> Any:
    module.train().eval()  # some models (LeViT) keep tables made from parameters in eval mode, and drop them on train()
    with tap:
        return module(**feeds)


def _trace(module: nn.Module, feeds: Mapping[str, Tensor], names: Mapping[int, str]) -> WeightTrace:
    trace = WeightTrace(names)
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        with torch.enable_grad():
            for parameter in frozen:
                parameter.requires_grad_(True)
            _run(module, feeds, trace)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    return trace


def _settle(
    module: nn.Module, example: Mapping[str, Tensor], tensors: Mapping[str, Tensor], seed: int
) -> tuple[WeightTrace, list[float], list[float]]:
    """Scales, traces, scales by what the trace found, then sets queries and keys: (trace, entropies, gains)."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    feeds = _calibration_batch(example, seed, CONVOLUTIONS_ALONE.photographs)
    biases: dict[int, Tensor] = {}
    any_batch = True
    try:
        _run(module, feeds, _Settle(names, seed, biases, {}))
    except Exception:  # whatever a module raises that takes no other batch size
        feeds, any_batch = dict(example), False
        _run(module, feeds, _Settle(names, seed, biases, {}))
    trace = _trace(module, example, names)
    balance = WITH_ATTENTION if trace.has_attention else CONVOLUTIONS_ALONE
    if any_batch:
        feeds = _calibration_batch(example, seed, balance.photographs)
    for name in trace.branches:
        if tensors[name].dim() == 1:
            tensors[name].mul_(balance.branch_rms)
    targets = {**dict.fromkeys(trace.branches, balance.branch_rms), **dict.fromkeys(trace.gates, GATE_RMS)}
    settle = _Settle(names, seed, biases, targets)
    _run(module, feeds, settle)
    gains, total = settle.gains, [1.0] * len(settle.gains)
    for _ in range(REFINEMENTS):
        _apply(tensors, trace.knobs, gains)
        total = [before * gain for before, gain in zip(total, gains, strict=True)]
        settle = _Settle(names, seed, biases, None)
        _run(module, feeds, settle)
        missed = [not ENTROPY_RANGE[0] <= entropy <= ENTROPY_RANGE[1] for entropy in settle.entropies]
        if not any(missed):
            break
        gains = [gain if miss else 1.0 for gain, miss in zip(settle.gains, missed, strict=True)]
    return trace, settle.entropies, total


def _site(knobs: list[str]) -> str:
    """What the knobs of a softmax share: blocks.0.attn of blocks.0.attn.qkv.weight and blocks.0.attn.bias_table."""
    if not knobs:
        return "softmax without weights behind its scores"
    levels = zip(*(name.split(".")[:-1] for name in knobs), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def initialize(module: nn.Module, example: Mapping[str, Tensor], *, seed: int = 0) -> InitReport:
    """Sets every parameter and norm statistic of `module` so that each attention and gate matters for its output.

    `example` maps forward-argument names to tensors. The same seed and example give the same tensors, whatever the
    state of the global generators. Index buffers, masks and computed tables stay as they are, tied tensors stay tied,
    and the module is left in eval mode. Raises UsageError when it does not run on the example, or not to finite values.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    where = type(module).__name__
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        filled = fill(module, seed)
        tracker = ModuleTracker(module)
        try:
            with tracker.tracking():
                _run(module, example, ForwardTap())
        except Exception as error:  # whatever a model raises on an input that does not fit it
            raise UsageError(
                "the model does not run on its example",
                where=f"{where}, {tracker.where(error)}",
                got=f"{first_line(error)}; on " + ", ".join(f"{k}={list(v.shape)}" for k, v in example.items()),
                next_step="check --input against what the model takes",
            ) from error
        trace, entropies, gains = _settle(module, example, tensors, seed)
        output = torch.cat([torch.zeros(0), *_floats(_run(module, example, ForwardTap()))])
        module.train().eval()
    if not bool(output.isfinite().all()):
        raise UsageError("the module's output is not finite", where=where, next_step="check the example's values")
    sites = [_site(list(powers)) for powers in trace.knobs]
    attentions = tuple(map(AttentionGain, sites, entropies, gains))
    notes = [f"{a.site}: entropy stays at {a.entropy:.2f}" for a in attentions if not 0.35 <= a.entropy <= 0.65]
    if not attentions:
        notes.append("no softmax over keys")
    mean_entropy = sum(entropies) / len(entropies) if entropies else None
    gates = tuple(sorted(name.removesuffix(".weight") for name in trace.gates))
    return InitReport(seed, mean_entropy, attentions, gates, float(output.std(correction=0)), filled, tuple(notes))
