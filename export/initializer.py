"""Weights under which every attention and every gate of a model matters for its output.

Default random weights hide faults: last norms of a branch are zero, layer scales tiny, the softmax nearly uniform, so a
model keeps 30 dB and more with its attention deleted. `initialize` draws every parameter anew, then settles the module
on an example: each layer is scaled to unit output spread as the example passes through it (LSUV, Mishkin & Matas 2016),
BatchNorm takes the statistics it meets, and queries and keys grow until the softmax over keys is peaked.

What is a query, key or gate weight is read off the autograd graph, not off names: the layers met first when walking
back from the scores of a softmax, and of those only the rows whose gradient is not zero.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from attn_deploy.errors import UsageError

ENTROPY_TARGET = 0.5
ENTROPY_RANGE = (0.4, 0.6)
# Sigmoid and hard-sigmoid are neither flat nor constant over inputs of this spread.
GATE_STD = 1.5
BRANCH = 0.35
SHRINK = 16
DRAWN = {}
# Scores at or below this are masked keys (Swin adds -100, others the lowest float or -inf), not attention.
MASKED_BELOW = -60.0
CALIBRATION_BATCH = 4
REFINEMENTS = 6

_SOFTMAXES = {F.softmax, torch.softmax, torch.special.softmax, Tensor.softmax}
_GATES = {torch.sigmoid, torch.sigmoid_, torch.special.expit, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid}
# Where a layer's weight and bias stand among its arguments, and which output axis holds its channels.
_PROJECTIONS = {
    F.linear: -1, F.conv1d: 1, F.conv2d: 1, F.conv3d: 1,
    F.conv_transpose1d: 1, F.conv_transpose2d: 1, F.conv_transpose3d: 1,
}  # fmt: skip
_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, torch.rms_norm}
_TABLES = ("relative_position", "rel_pos", "bias_table", "attention_bias", "rel_height", "rel_width", "rel_emb")
_SCALES = ("gamma", "lambda", "scale", "gain", "alpha")


@dataclass(frozen=True)
class AttentionGain:
    """One softmax over keys: its module path, mean normalized entropy, and the gain its scores were given."""

    site: str
    entropy: float
    gain: float


@dataclass(frozen=True)
class InitReport:
    """What `initialize` did. Entropies are entropy / log(keys), averaged over rows; `output_std` is on the example."""

    seed: int
    mean_entropy: float | None
    attentions: tuple[AttentionGain, ...]
    gates: tuple[str, ...]
    output_std: float
    tensors_set: tuple[str, ...]
    notes: tuple[str, ...]


class ForwardTap(TorchFunctionMode):
    """Sees every projection, norm, gate and attention softmax of a forward pass, and may change what it sees.

    Attention written as `scaled_dot_product_attention` or `nn.MultiheadAttention` is run step by step, so that its
    scores pass through `scores` like those of a written-out softmax.
    """

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        """What the softmax over axis `dim`, the keys, is taken of."""
        return scores

    def gate(self, output: Tensor) -> Tensor:
        """Replaces the result of a sigmoid or hard sigmoid."""
        return output

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Runs a projection, norm or embedding."""
        return func(*args, **kwargs)

    def addition(self, left, right) -> None:
        pass

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            # Its first line hands over to any active mode; without that line it runs as written, inside this mode.
            with mock.patch.object(F, "has_torch_function", lambda _: False), self:
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            with self:
                return _attend(*args, **kwargs)
        if func in _SOFTMAXES:
            rows, *rest = args if args else (kwargs.pop("input"),)
            dim = kwargs["dim"] if "dim" in kwargs else rest[0]
            # Below three axes it is a classifier's softmax over classes; a single key leaves nothing to attend to.
            if dim is not None and rows.dim() >= 3 and rows.shape[dim] > 1:
                rows = self.scores(rows, dim)
            return func(rows, *rest, **kwargs)
        if func in _PROJECTIONS or func in _NORMS or func is F.embedding or func is torch.addmm:
            return self.layer(func, args, kwargs)
        if func in _ADDITIONS or func is F.dropout:
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
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -math.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    # A fully masked row gives 0, as the fused operator does.
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _draw(module: nn.Module, leaf: str, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Values for one parameter (or affine buffer of a frozen norm), by its module's class, its name and its shape."""

    def normal(std: float) -> Tensor:
        return torch.randn(shape, generator=rng) * std

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=rng)

    kind = type(module).__name__.lower()
    is_vector = sum(size > 1 for size in shape) <= 1
    is_bias = "bias" in leaf or leaf.endswith("beta")
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and leaf == "weight":
        return _fan_in(module, shape, rng)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and "bias" not in leaf:
        return normal(0.5)
    if isinstance(module, nn.PReLU):
        return uniform(0.1, 0.4)
    if is_vector and ("norm" in kind or hasattr(module, "running_mean")):
        # Before a ReLU a mean of 0 doubles any disturbance every three layers; a positive mean does not. Measured on
        # seresnet50: 60 dB of noise on every layer leaves 48 dB at the output with 0.5, 31 dB with 0.
        mean = 0.5 if hasattr(module, "running_mean") else 0.0
        outlier = 1.8 if hasattr(module, "running_mean") else 3.5
        return mean + normal(0.2) if is_bias else _norm_weight(uniform(0.6, 1.6), outlier, rng)
    if "logit_scale" in leaf:
        return math.log(10.0) + normal(0.2)
    if any(part in leaf for part in _TABLES):
        return normal(1.0)
    if is_vector and is_bias:
        return normal(0.1)
    if is_vector and (shape.numel() == 1 or "scale" in kind or any(part in leaf for part in _SCALES)):
        return uniform(0.4, 1.0)
    if (len(shape) >= 3 and shape[0] == 1) or any(part in leaf for part in ("pos", "token", "cls", "latent", "query")):
        return normal(0.5)
    return uniform(0.4, 1.0) if is_vector else _fan_in(module, shape, rng)


def _norm_weight(weight: Tensor, outlier: float, rng: torch.Generator) -> Tensor:
    """About two channels in a hundred grow to about `outlier`: 3.5 before tokens, the activation outliers of trained
    transformers; 1.8 in CNNs, whose outliers are smaller and whose ranges are per tensor."""
    flat = weight.view(-1)
    outliers = round(0.02 * flat.numel()) or int(flat.numel() >= 32)
    chosen = torch.randperm(flat.numel(), generator=rng)[:outliers]
    flat[chosen] = torch.empty(outliers).uniform_(0.85, 1.15, generator=rng) * outlier
    return weight


def _fan_in(module: nn.Module, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Normal weights of variance 1 / fan-in, channels out first except where the class stores them the other way."""
    weight = torch.randn(shape, generator=rng)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight / math.sqrt(shape[0] * shape[2:].numel())
    if type(module).__name__ == "Conv1D" or (len(shape) == 3 and not isinstance(module, nn.Conv1d)):
        return weight / math.sqrt(shape[-2])
    return weight / math.sqrt(max(1, shape[1:].numel()))


def _fill(module: nn.Module, seed: int) -> tuple[str, ...]:
    """Draws every parameter, and the affine buffers of frozen norms; tied tensors once, under their first name."""
    done: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        frozen = hasattr(owner, "running_mean") and "norm" in type(owner).__name__.lower()
        buffers = {leaf: buffer for leaf, buffer in owner._buffers.items() if frozen and leaf in ("weight", "bias")}
        for leaf, tensor in itertools.chain(owner._parameters.items(), buffers.items()):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is None or id(tensor) in done or not tensor.is_floating_point():
                continue
            tensor.data.copy_(_draw(owner, leaf, tensor.shape, _generator(seed, name)))
            done[id(tensor)] = name
    return tuple(done.values())


def _entropy(rows: Tensor, gain: float = 1.0) -> float:
    """Mean over rows of entropy / log(keys) of softmax(gain * rows), on [rows, keys]; masked keys do not count."""
    valid = rows > MASKED_BELOW
    counts = valid.sum(-1)
    if not bool((counts > 1).any()):
        return math.nan
    log_p = (rows * gain).masked_fill(~valid, -math.inf)[counts > 1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)
    return float((entropy / counts[counts > 1].log()).mean())


def _gain_for(rows: Tensor) -> float:
    """The gain on the scores that brings their entropy to the target, by bisection: entropy falls as the gain grows."""
    low, high = -6.0, 6.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _entropy(rows, math.exp(middle)) > ENTROPY_TARGET else (low, middle)
    return math.exp((low + high) / 2)


def _sample(scores: Tensor, dim: int) -> Tensor:
    """1,024 of the rows of the scores, as [rows, keys]."""
    rows = scores.detach().movedim(dim, -1).flatten(0, -2)
    return rows[torch.randint(len(rows), (1024,), generator=torch.Generator().manual_seed(0))].float()


@dataclass(frozen=True)
class _Knob:
    """A tensor that moves the scores of a site: entries where `mask` is true take gain ** exponent.

    `direct` tensors enter the scores themselves (a temperature, a bias table), not as weights of a layer.
    """

    name: str
    mask: Tensor
    exponent: float
    direct: bool
    numel: int


class _Trace(ForwardTap):
    """Finds, in a forward pass with gradients, the tensors that move each softmax, and the layers before each gate."""

    def __init__(self, names: dict[int, str], paths: list[str]) -> None:
        super().__init__()
        self.names = names
        self.paths = paths
        self.origins: dict[Any, tuple[tuple[Tensor, int], ...]] = {}
        self.sites: list[str] = []
        self.knobs: list[tuple[_Knob, ...]] = []
        self.gates: dict[str, str] = {}
        self.branches = set()
        self.lns = set()

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output = func(*args, **kwargs)
        # addmm takes (bias, input, weight [in, out]); the others the input first and channels out on axis 0.
        operands = [args[0], args[2]] if func is torch.addmm else [*args[1:], *kwargs.values()]
        axis = -1 if func is torch.addmm else 0
        weights = tuple((item, axis) for item in operands if isinstance(item, Tensor) and item.requires_grad)
        if weights and output.grad_fn is not None:
            self.origins[output.grad_fn] = weights
            if func not in _PROJECTIONS and func is not torch.addmm and func is not F.batch_norm:
                self.lns.add(output.grad_fn)
        return output

    def addition(self, left, right) -> None:
        if not (isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape):
            return
        ends = [self._end(left.grad_fn), self._end(right.grad_fn)]
        if (ends[0] is None) != (ends[1] is None):
            self.branches |= set(ends[0] or ends[1])

    def _end(self, node):
        for _ in range(16):
            if node is None or node.name().startswith(("AddBackward", "Cat", "Sub", "AccumulateGrad")):
                return None
            if node in self.origins:
                if node in self.lns:
                    return None
                return [self.names[id(t)] for t, _ in self.origins[node] if id(t) in self.names] or None
            parents = [p for p, _ in node.next_functions if p is not None and not hasattr(p, "variable")]
            node = parents[0] if parents else None
        return None

    def gate(self, output: Tensor) -> Tensor:
        for tensor, _, _ in self._reach(output.grad_fn):
            if tensor.dim() > 1:
                self.gates[self.names.get(id(tensor), "")] = self.paths[-1]
        return output

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        self.sites.append(self.paths[-1])
        found = [item for item in self._reach(scores.grad_fn) if id(item[0]) in self.names]
        tensors = [tensor for tensor, _, _ in found]
        probe = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)).to(scores)
        loss = (scores.clamp(MASKED_BELOW, -MASKED_BELOW) * probe).sum()
        slopes = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True) if tensors else ()
        knobs = []
        for (tensor, axis, exponent), slope in zip(found, slopes, strict=True):
            if slope is None or not bool(slope.any()):
                continue
            others = [i for i in range(slope.dim()) if axis is None or i != axis % slope.dim()]
            mask = slope.abs().amax(others, keepdim=True) if others else slope.abs()
            knobs.append(_Knob(self.names[id(tensor)], mask != 0, exponent, axis is None, tensor.numel()))
        self.knobs.append(_without_redundant(knobs, scores.shape[1]))
        return scores

    def _reach(self, start: Any) -> list[tuple[Tensor, int | None, float]]:
        """(tensor, axis of its rows, exponent) of the nearest layers and parameters behind a node of the graph.

        Behind a product of two maps the gain is shared: each side takes its square root.
        """
        found: dict[int, tuple[Tensor, int | None, float]] = {}
        stack: list[tuple[Any, float, int | None]] = [(start, 1.0, None)]
        seen = set()
        while stack:
            node, exponent, axis = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self.origins:
                for tensor, rows in self.origins[node]:
                    if tensor.grad_fn is not None:
                        stack.append((tensor.grad_fn, exponent, rows))
                    else:
                        found.setdefault(id(tensor), (tensor, rows, exponent))
            elif hasattr(node, "variable"):
                found.setdefault(id(node.variable), (node.variable, axis, exponent))
            else:
                shared = node.name().startswith(("Bmm", "Mm", "Baddbmm"))
                stack.extend((parent, 0.5 if shared else exponent, axis) for parent, _ in node.next_functions)
        return list(found.values())


def _without_redundant(knobs: list[_Knob], heads: int) -> tuple[_Knob, ...]:
    """A temperature, one or one per head, takes the gain without queries and keys: cosine attention ignores those."""
    has_temperature = any(k.direct and k.exponent == 1.0 and k.numel in (1, heads) for k in knobs)
    return tuple(knob for knob in knobs if not has_temperature or knob.exponent == 1.0)


class _Settle(ForwardTap):
    """Gives norms their statistics, measures every softmax, and, where `rescale`, scales projections as they run.

    While rescaling, each softmax is taken at the gain it is to get, so that what follows settles on peaked attention.
    """

    def __init__(self, names: dict[int, str], seed: int, gates: Mapping[str, str], *, rescale: bool) -> None:
        super().__init__()
        self.names = names
        self.seed = seed
        self.gates = gates
        self.rescale = rescale
        self.branches = set()
        self.done: set[int] = set()
        self.entropies: list[float] = []
        self.gains: list[float] = []

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        rows = _sample(scores, dim)
        self.entropies.append(_entropy(rows))
        self.gains.append(_gain_for(rows))
        return torch.where(scores > MASKED_BELOW, scores * self.gains[-1], scores) if self.rescale else scores

    def layer(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if func is F.batch_norm and args[1] is not None:
            self._set_statistics(*args[:3])
        output = func(*args, **kwargs)
        if func is F.embedding:
            # A tied output projection must not shrink the embedding.
            self.done.add(id(args[1]))
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        name = self.names.get(id(weight))
        if not self.rescale or func not in _PROJECTIONS or name is None or id(weight) in self.done:
            return output
        self.done.add(id(weight))
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        side = [-1] + [1] * (output.dim() - 2 if _PROJECTIONS[func] == 1 else 0)
        mean = None
        if bias is not None:
            output = output - bias.view(side)
        if id(bias) in self.names:
            axes = [i for i in range(output.dim()) if i != _PROJECTIONS[func] % output.dim()]
            n = output.numel() // len(bias)
            mean = output.float().mean(axes) * (n / (n + SHRINK))
            output = output - mean.view(side)
        spread = float(output.float().square().mean().sqrt())
        if math.isfinite(spread) and spread > 1e-8:
            factor = (GATE_STD if name in self.gates else BRANCH if name in self.branches else 1.0) / spread
            weight.mul_(factor)
            output = output * factor
        else:
            factor = 1
        if mean is not None:
            d = DRAWN.setdefault(id(bias), bias.clone())
            bias.copy_(d - mean * factor)
            return output + d.view(side)
        return output if bias is None else output + bias.view(side)

    def _set_statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> None:
        """The statistics of the batch, moved by about 20 %. Few values per channel are drawn towards all channels'."""
        if id(mean) in self.done:
            return
        self.done.add(id(mean))
        found_var, found_mean = torch.var_mean(x.float(), [axis for axis in range(x.dim()) if axis != 1], correction=0)
        count = x.numel() // x.shape[1]
        found_var = (count * found_var + 8 * found_var.mean()) / (count + 8)
        found_mean = found_mean * count / (count + 4)
        # A channel that is silent on the example must not be blown up on other inputs.
        found_var = found_var.clamp(min=0.05 * float(found_var.mean()) + 1e-6)
        rng = _generator(self.seed, self.names.get(id(mean), ""))
        shift, stretch = (torch.empty(2, x.shape[1]).uniform_(-0.2, 0.2, generator=rng)).to(found_mean)
        mean.copy_(found_mean + shift * found_var.sqrt())
        var.copy_(found_var * (1 + stretch))


def _apply(tensors: Mapping[str, Tensor], knobs: list[tuple[_Knob, ...]], gains: list[float]) -> None:
    """Moves the scores of every site by its gain. A tensor of several sites takes the mean of what they ask."""
    asked: dict[str, Tensor] = {}
    askers: dict[str, Tensor] = {}
    for site_knobs, gain in zip(knobs, gains, strict=True):
        for knob in site_knobs:
            asked[knob.name] = asked.get(knob.name, 0.0) + knob.mask * (knob.exponent * math.log(gain))
            askers[knob.name] = askers.get(knob.name, 0.0) + knob.mask
    for name, total in asked.items():
        step = (total / askers[name].clamp(min=1)).to(tensors[name])
        if "logit_scale" in name:
            tensors[name].add_(step)
        else:
            tensors[name].mul_(step.exp())


@contextmanager
def _module_paths(module: nn.Module) -> Iterator[list[str]]:
    """The path of the module whose forward runs, innermost last."""
    paths: list[str] = [""]
    handles: list[RemovableHandle] = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: paths.append(name)))
        handles.append(child.register_forward_hook(lambda *_: paths.pop() and None))
    try:
        yield paths
    finally:
        for handle in handles:
            handle.remove()


def _calibration_batch(example: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The example, joined along its first axis by variations of it until the batch has `CALIBRATION_BATCH` rows."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in example.values()}
    if len(sizes) != 1 or not 0 < (size := sizes.pop()) < CALIBRATION_BATCH:
        return dict(example)
    copies = math.ceil(CALIBRATION_BATCH / size) - 1
    return {name: torch.cat([x, *(_vary(x, _generator(seed, f"{name}#{i}")) for i in range(copies))])
            for name, x in example.items()}  # fmt: skip


def _vary(x: Tensor, rng: torch.Generator) -> Tensor:
    """Noise of the example's mean and spread over a dimmed copy; whole numbers change places; masks stay."""
    if x.is_floating_point():
        noise = torch.randn(x.shape, generator=rng).to(x) * x.float().std(correction=0).to(x)
        return (0.6 * x + 0.4 * x.mean() + 0.8 * noise).to(x.dtype)
    if x.dtype == torch.bool or int(x.max()) <= 1:
        return x
    return x.flatten()[torch.randperm(x.numel(), generator=rng).to(x.device)].view_as(x)


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.flatten().float()] if output.is_floating_point() else []
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for item in items for tensor in _floats(item)]


def _run(module: nn.Module, feeds: Mapping[str, Tensor], tap: ForwardTap | None = None) -> Any:
    # Some models (LeViT) cache tables made from parameters while in eval mode, and drop them on train().
    module.train()
    module.eval()
    if tap is None:
        return module(**feeds)
    with tap:
        return module(**feeds)


def _trace(module: nn.Module, feeds: Mapping[str, Tensor], names: dict[int, str]) -> _Trace:
    wanted = {parameter: parameter.requires_grad for parameter in module.parameters() if parameter.is_floating_point()}
    try:
        with _module_paths(module) as paths, torch.enable_grad():
            for parameter in wanted:
                parameter.requires_grad_(True)
            trace = _Trace(names, paths)
            _run(module, feeds, trace)
            return trace
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)


def _settle(
    module: nn.Module, example: Mapping[str, Tensor], tensors: dict[str, Tensor], seed: int
) -> tuple[_Trace, _Settle, list[float]]:
    names = {id(tensor): name for name, tensor in tensors.items()}
    feeds = _calibration_batch(example, seed)
    try:
        _run(module, feeds, _Settle(names, seed, {}, rescale=True))
    except Exception:  # whatever a module says that takes no other batch size; on the example itself it is raised below
        feeds = dict(example)
        _run(module, feeds, _Settle(names, seed, {}, rescale=True))
    trace = _trace(module, example, names)
    settle = _Settle(names, seed, trace.gates, rescale=True)
    settle.branches = trace.branches
    for n in trace.branches:
        if tensors[n].dim() == 1 and names.get(id(tensors[n])) and not n.endswith("zz"):
            if any(n.rsplit(".", 1)[0] + ".running_mean" == k for k in tensors):
                tensors[n].mul_(BRANCH)
    _run(module, feeds, settle)
    total = [1.0] * len(trace.sites)
    gains = settle.gains
    for _ in range(REFINEMENTS):
        _apply(tensors, trace.knobs, gains)
        total = [before * gain for before, gain in zip(total, gains, strict=True)]
        settle = _Settle(names, seed, trace.gates, rescale=False)
        _run(module, feeds, settle)
        inside = [ENTROPY_RANGE[0] <= entropy <= ENTROPY_RANGE[1] for entropy in settle.entropies]
        if all(inside):
            break
        gains = [1.0 if ok else gain for ok, gain in zip(inside, settle.gains, strict=True)]
    return trace, settle, total


def initialize(module: nn.Module, example: Mapping[str, Tensor], *, seed: int = 0) -> InitReport:
    """Sets every parameter and norm statistic of `module` so that each attention and gate matters for its output.

    `example` maps forward-argument names to tensors. The same seed and example give the same tensors, whatever the
    state of the global generators; index buffers, masks and computed tables stay as they are, tied tensors stay tied.
    The module is left in eval mode. Raises UsageError when it does not run on the example or its output is not finite.
    """
    DRAWN.clear()
    tensors = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        filled = _fill(module, seed)
        try:
            trace, settle, gains = _settle(module, example, tensors, seed)
            outputs = _floats(_run(module, example))
        except (RuntimeError, TypeError, ValueError) as error:
            raise UsageError(
                "the module does not run on its example", got=error, where=type(module).__name__
            ) from error
        module.train()
        module.eval()
    output = torch.cat(outputs) if outputs else torch.zeros(1)
    if not bool(output.isfinite().all()):
        raise UsageError("the module's output is not finite", where=type(module).__name__)
    return _report(seed, trace, settle, gains, float(output.std(correction=0)), filled)


def _report(
    seed: int, trace: _Trace, settle: _Settle, gains: list[float], output_std: float, filled: tuple[str, ...]
) -> InitReport:
    attentions = tuple(map(AttentionGain, trace.sites, settle.entropies, gains))
    notes = []
    for attention, knobs in zip(attentions, trace.knobs, strict=True):
        if not knobs:
            notes.append(f"{attention.site}: no weights found behind its scores, left as drawn")
        elif not ENTROPY_RANGE[0] <= attention.entropy <= ENTROPY_RANGE[1]:
            notes.append(f"{attention.site}: normalized entropy stays at {attention.entropy:.2f}")
    if not attentions:
        notes.append("no softmax over keys found")
    measured = [attention.entropy for attention in attentions]
    mean = sum(measured) / len(measured) if measured else None
    return InitReport(seed, mean, attentions, tuple(trace.gates), output_std, filled, tuple(notes))
