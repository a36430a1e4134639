"""Which weights move the scores of each softmax, feed a gate, or end a residual branch: read off the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_deploy.export.forward_tap import MASKED_BELOW, PROJECTIONS, ForwardTap


class WeightTrace(ForwardTap):
    """Names of the weights that move each softmax, that feed a gate, and that end a residual branch."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.origins: dict[Any, tuple[Any, list[Tensor]]] = {}
        # Per softmax: tensor name -> the power of the gain that its entries take, 0 where they do not move the scores.
        self.knobs: list[dict[str, Tensor]] = []
        self.gates: set[str] = set()
        self.branches: set[str] = set()
        self.has_attention = False
        """Whether a softmax is of a product of two maps, queries and keys; those of gates are not."""

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
                return weights if func in PROJECTIONS or func in (torch.addmm, F.batch_norm) else []
            parents = (parent for parent, _ in node.next_functions)
            node = next((parent for parent in parents if parent and not hasattr(parent, "variable")), None)
        return []

    def scores(self, scores: Tensor, dim: int) -> Tensor:
        found = [item for item in self._reach(scores.grad_fn) if id(item[0]) in self.names]
        tensors = [tensor for tensor, _, _ in found]
        self.has_attention |= any(exponent < 1 for _, _, exponent in found)
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
