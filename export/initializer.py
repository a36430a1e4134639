"""Weights under which every attention and every gate of a model matters for its output.

Packages' own random weights hide faults: the last norm of a branch is zero, layer scales are tiny, the softmax is
nearly uniform, so a model keeps 30 dB and more with its attention deleted. `initialize` draws every parameter anew,
then settles the module on an example: each projection is scaled as the example passes through it (LSUV, Mishkin and
Matas 2016), BatchNorm takes the statistics it meets, and queries and keys grow until the softmax is peaked.

What is a query, a gate or the end of a residual branch is read off the autograd graph, not off names: the layers met
first when walking back from the scores of a softmax, and of those only the rows whose gradient is not zero.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attn_deploy.errors import UsageError

ENTROPY_TARGET = 0.5
ENTROPY_RANGE = (0.4, 0.6)
# Root mean square at the input of a gate: there, sigmoid and hard sigmoid are neither flat nor the same for all inputs.
GATE_RMS = 0.8
# Root mean square at the end of a residual branch. Branches as strong as their stream multiply any noise: 60 dB of it
# on every layer leaves 12 dB at the output of levit_128 with 1.0, 27 dB with 0.35. At 0.25, with the gates
# above, INT8 of efficientnet_b0 passes 20 dB on photographs; coatnet_nano then hides a deleted attention (50 dB).
BRANCH_RMS = 0.25
# The share of each channel's mean that its bias takes away. With 0, what all tokens have in common outgrows the rest: a
# deleted attention of coatnet_nano left 52 dB, with 0.25 it left 28 dB (branches of 0.35, gates of 1.5). With 1, BERT
# loses 8 dB more to noise.
CENTRED = 0.25
# Scores at or below this are masked keys (Swin adds -100, others the lowest float or -inf).
MASKED_BELOW = -60.0
CALIBRATION_BATCH = 4
REFINEMENTS = 6

_SOFTMAXES = {F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax}
_GATES = {torch.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid}
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
_PROJECTIONS = {F.linear, *_CONVOLUTIONS}
_NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, torch.rms_norm}
_TABLES = ("relative_position", "rel_pos", "rel_h", "rel_w", "_rel", "bias_table", "attention_bias")
_TOKENS = ("token", "pos", "cls", "embed", "query", "latent", "probe")
_LAYERS = {*_PROJECTIONS, *_NORMS, F.embedding, torch.addmm}


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


class ForwardTap(TorchFunctionMode):
    """Sees every layer, addition, gate and attention softmax of a forward pass, and may change what it sees.

    `scaled_dot_product_attention` and `nn.MultiheadAttention` run step by step, so that their scores are seen as well.
    """

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        """Replaces what the softmax over axis `dim`, the keys, is taken of."""
        return scores

    def gate(self, output: Tensor) -> Tensor:
        """Replaces the result of a sigmoid or hard sigmoid."""
        return output

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Runs a projection, norm or embedding."""
        return func(*args, **kwargs)

    def addition(self, left: Any, right: Any) -> None:
        """Sees the operands of a sum before it is taken."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            # Its first line hands over to any active mode; without that line it runs as written, inside this mode.
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with self:
                return _attend(*args, **kwargs)
        if func in _SOFTMAXES:
            x, *rest = args or (kwargs.pop("input"),)
            dim = kwargs["dim"] if "dim" in kwargs else rest[0]
            # Below three axes it is a classifier's softmax over classes; a single key leaves nothing to attend to.
            seen = dim is not None and x.dim() >= 3 and x.shape[dim] > 1
            return func(self.scores(x, dim) if seen else x, *rest, **kwargs)
        if func in _LAYERS:
            return self.layer(func, args, kwargs)
        if func in _ADDITIONS:
            self.addition(*args[:2])
        output = func(*args, **kwargs)
        return self.gate(output) if func in _GATES else output


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in steps, on [..., heads, tokens, head_dim], without dropout."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    # A fully masked row gives 0, as the fused operator does.
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _draw(module: nn.Module, leaf: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Values for a parameter or norm statistic, by its module's class, its name and its shape."""
    normal = torch.randn(shape, generator=rng)
    uniform = torch.rand(shape, generator=rng)
    is_projection = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    is_matrix = leaf == "weight" and (is_projection or is_embedding)
    is_vector = sum(size > 1 for size in shape) <= 1 and not is_matrix
    is_bias = "bias" in leaf or "mean" in leaf or leaf.endswith("beta")
    has_statistics = hasattr(module, "running_mean")
    if is_vector and (has_statistics or "norm" in type(module).__name__.lower()):
        if is_bias:
            # Around 0 a ReLU adds 1.7 dB to noise, around 0.5 it adds 1.0 dB (seresnet50 in all: 18 dB, 9 dB).
            return 0.2 * normal + (0.5 if has_statistics and leaf == "bias" else 0.0)
        # About two channels in a hundred are the activation outliers of trained transformers. CNNs have smaller ones:
        # with those of transformers, INT8 with ranges per tensor leaves 18 dB on efficientnet_b0, with these 21 dB.
        outliers = torch.randperm(shape.numel(), generator=rng)[: math.ceil(0.02 * shape.numel() - 0.5)]
        weight = 0.6 + uniform
        low, high = (1.6, 2.0) if has_statistics else (3.0, 4.0)
        weight.view(-1)[outliers] = low + (high - low) * uniform.view(-1)[outliers]
        return weight
    if "logit_scale" in leaf:
        return math.log(10.0) + 0.2 * normal
    if any(part in leaf for part in _TABLES):
        return normal
    if is_vector and is_bias:
        return 0.1 * normal
    if is_vector and not any(part in leaf for part in _TOKENS):
        # Layer scales, temperatures, PReLU slopes: never zero. A projection's own gain (weight norm) keeps its scale.
        return (0.7 if is_projection else 0.4) + 0.6 * uniform
    if not is_projection and (is_embedding or is_vector or (len(shape) >= 3 and shape[0] == 1) or "pos" in leaf):
        return 0.5 * normal
    if type(module).__name__ == "Conv1D" or (len(shape) == 3 and not is_projection):
        return normal / math.sqrt(shape[-2])  # transformers' Conv1D, stacks of experts: [..., in, out]
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    return normal / math.sqrt(shape[0] * shape[2:].numel() if transposed else shape[1:].numel())


def _fill(module: nn.Module, seed: int) -> tuple[str, ...]:
    """Draws every parameter and the buffers of norms; tied tensors once, under their first name."""
    done: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        buffers = owner._buffers if hasattr(owner, "running_mean") else {}
        for leaf, tensor in (*owner._parameters.items(), *buffers.items()):
            if tensor is not None and id(tensor) not in done and tensor.is_floating_point():
                done[id(tensor)] = name = f"{prefix}.{leaf}".lstrip(".")
                tensor.data.copy_(_draw(owner, leaf, tensor.shape, _generator(seed, name)))
    return tuple(done.values())


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


class _Trace(ForwardTap):
    """Reads off the autograd graph what moves each softmax, what feeds a gate, and what ends a residual branch."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.origins: dict[Any, tuple[Any, list[Tensor]]] = {}
        # Per softmax: tensor name -> the power of the gain that its entries take, 0 where they do not move the scores.
        self.knobs: list[dict[str, Tensor]] = []
        self.gates: set[str] = set()
        self.branches: set[str] = set()

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output = func(*args, **kwargs)
        # addmm takes (bias, input, weight), the others the input first.
        operands = args[::2] if func is torch.addmm else (*args[1:], *kwargs.values())
        if weights := [item for item in operands if isinstance(item, Tensor) and item.requires_grad]:
            self.origins[output.grad_fn] = (func, weights)
        return output

    def gate(self, output: Tensor) -> Tensor:
        weights = [tensor for tensor, _, _ in self._reach(output.grad_fn) if tensor.dim() > 1]
        self.gates |= {self.names[id(weight)] for weight in weights if id(weight) in self.names}
        return output

    def addition(self, left: Any, right: Any) -> None:
        if isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape:
            ends = [self._branch_end(left.grad_fn), self._branch_end(right.grad_fn)]
            if not all(ends):  # two branches that meet, as at a projected shortcut, keep their strength
                self.branches |= {self.names[id(tensor)] for tensor in ends[0] or ends[1] if id(tensor) in self.names}

    def _branch_end(self, node: Any) -> list[Tensor]:
        """The weights of the projection or BatchNorm whose output this is, up to its shape and a gate or scale."""
        while node is not None and not node.name().startswith(("AddBackward", "Cat")):
            if node in self.origins:
                func, weights = self.origins[node]
                return weights if func in _PROJECTIONS or func in (torch.addmm, F.batch_norm) else []
            parents = (parent for parent, _ in node.next_functions)
            node = next((parent for parent in parents if parent and not hasattr(parent, "variable")), None)
        return []

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        found = [item for item in self._reach(scores.grad_fn) if id(item[0]) in self.names]
        tensors = [tensor for tensor, _, _ in found]
        probe = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)).to(scores)
        loss = (scores.clamp(MASKED_BELOW, -MASKED_BELOW) * probe).sum()
        slopes = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True) if tensors else ()
        knobs: dict[str, Tensor] = {}
        is_cosine = False
        for (tensor, axis, exponent), slope in zip(found, slopes, strict=True):
            if slope is not None and bool(slope.any()):
                # Of packed queries, keys and values, the rows of the values have no slope.
                others = [i for i in range(slope.dim()) if axis is None or i != axis % slope.dim()]
                moves = slope.abs().amax(others, keepdim=True) != 0 if others else slope != 0
                knobs[self.names[id(tensor)]] = moves * exponent
                # A temperature: were it added to the scores, one number per head would change nothing.
                is_cosine |= axis is None and exponent == 1.0 and tensor.numel() in (1, scores.shape[1])
        # Where there is a temperature, queries and keys are normalized and their scale is no knob.
        self.knobs.append({n: power for n, power in knobs.items() if not is_cosine or float(power.max()) == 1.0})
        return scores

    def _reach(self, start: Any) -> list[tuple[Tensor, int | None, float]]:
        """(tensor, axis of its rows, exponent) for the nearest layers and bare parameters behind a node of the graph.

        Behind a product of two maps, each side takes the square root of the gain.
        """
        found: dict[int, tuple[Tensor, int | None, float]] = {}
        stack: list[tuple[Any, float, int | None]] = [(start, 1.0, None)]
        seen = set()
        while stack:
            node, exponent, axis = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found.setdefault(id(node.variable), (node.variable, axis, exponent))
            elif node in self.origins:
                func, weights = self.origins[node]
                for tensor in weights:
                    rows = -1 if func is torch.addmm else 0
                    if tensor.grad_fn is None:
                        found.setdefault(id(tensor), (tensor, rows, exponent))
                    stack.append((tensor.grad_fn, exponent, rows))
            else:
                exponent = 0.5 if node.name().startswith(("Bmm", "Mm", "Baddbmm")) else exponent
                stack.extend((parent, exponent, axis) for parent, _ in node.next_functions)
        return list(found.values())


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
        if func not in _PROJECTIONS or not is_first or self.targets is None:
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
        rng = _generator(self.seed, self.names[id(mean)])
        shift, stretch = (0.4 * torch.rand(2, x.shape[1], generator=rng) - 0.2).to(x)
        mean.copy_(found_mean * count / (count + 4) + shift * found_var.sqrt())
        var.copy_(found_var * (1 + stretch))


def _apply(tensors: Mapping[str, Tensor], knobs: list[dict[str, Tensor]], gains: list[float]) -> None:
    """Moves the scores of every site by its gain; a tensor of several sites takes the mean of what they ask."""
    for name in {name for powers in knobs for name in powers}:
        votes = [(powers[name], math.log(gain)) for powers, gain in zip(knobs, gains, strict=True) if name in powers]
        step = sum(power * log_gain for power, log_gain in votes) / sum(power > 0 for power, _ in votes).clamp(min=1)
        tensors[name].copy_(tensors[name] + step if "logit_scale" in name else tensors[name] * step.exp())


def _calibration_batch(example: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The example with variations of it behind it, to `CALIBRATION_BATCH` rows where all inputs share their first axis.

    Floats turn into noise of their own mean and spread over a dimmed copy; tokens and masks move along alike.
    """

    def vary(name: str, x: Tensor, shift: int) -> Tensor:
        if not x.is_floating_point():
            return x.roll(shift, -1)
        noise = torch.randn(x.shape, generator=_generator(seed, f"{name}#{shift}")).to(x)
        return 0.6 * x + 0.4 * x.mean() + 0.8 * noise * x.std(correction=0)

    sizes = {len(x) if x.dim() else 0 for x in example.values()}
    copies = math.ceil(CALIBRATION_BATCH / max(sizes)) if len(sizes) == 1 and max(sizes) else 1
    rows = {name: torch.cat([x, *(vary(name, x, i) for i in range(1, copies))]) for name, x in example.items()}
    return {name: _half_smooth(x, _generator(seed, f"{name}#smooth")) for name, x in rows.items()}


def _half_smooth(x: Tensor, rng: torch.Generator) -> Tensor:
    """Image batches [batch, channels, height, width] with their first half as photographs are: a level per channel,
    large patches of light, a little noise. Statistics taken on noise alone fit no photograph: activations then run far
    out of them: INT8 of efficientnet_b0 left 14 dB on real images, and 20 dB with patches like these."""
    if x.dim() != 4 or not x.is_floating_point() or min(x.shape[2:]) < 16 or len(x) < 2:
        return x
    count, channels = len(x) // 2, x.shape[1]
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


def _trace(module: nn.Module, feeds: Mapping[str, Tensor], names: Mapping[int, str]) -> _Trace:
    trace = _Trace(names)
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
) -> tuple[_Trace, list[float], list[float]]:
    """Scales, traces, scales by what the trace found, then sets queries and keys: (trace, entropies, gains)."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    feeds = _calibration_batch(example, seed)
    biases: dict[int, Tensor] = {}
    try:
        _run(module, feeds, _Settle(names, seed, biases, {}))
    except Exception:  # whatever a module raises that takes no other batch size
        feeds = dict(example)
        _run(module, feeds, _Settle(names, seed, biases, {}))
    trace = _trace(module, example, names)
    for name in trace.branches:
        if tensors[name].dim() == 1:
            tensors[name].mul_(BRANCH_RMS)
    targets = {**dict.fromkeys(trace.branches, BRANCH_RMS), **dict.fromkeys(trace.gates, GATE_RMS)}
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
        filled = _fill(module, seed)
        try:
            _run(module, example, ForwardTap())
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UsageError("the module does not run on its example", got=error, where=where) from error
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
