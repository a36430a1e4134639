"""What stands between the product of query and key and the product with value, shared by the attention operators.

A variation of it is a set of flags; the flags name the form: Attention, AttentionCausal, AttentionBiasMask, ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attn_deploy.ops.form import Array, Input, Shape, lines, require, softmax_float64

LOWEST = "-3.4028234663852886e38"
"""The lowest float32: a masked score. Not -inf, which makes NaN of a fully masked row."""

NORM_EPS = 1e-12
"""The least length by which a query or key is divided, as in torch.nn.functional.normalize."""


@dataclass(frozen=True)
class Scores:
    """causal: token i sees keys 0..i (aligned at the first token, as in torch's scaled_dot_product_attention).
    bias: finite, added to the scaled scores, [batch|1, heads|1, query_len, key_len].
    mask: bool, true where a query sees a key, [batch|1, heads|1, query_len|1, key_len].
    softcap: scaled scores s become softcap * tanh(s / softcap) before the bias (Gemma 2, 2024, section 2).
    cosine: query and key are divided by their lengths, scores multiplied by head_scale [heads] (Swin V2: Liu et al.
    2022, equation 2).
    """

    causal: bool = False
    bias: bool = False
    mask: bool = False
    softcap: bool = False
    cosine: bool = False

    @property
    def suffix(self) -> str:
        flags = ("cosine", "softcap", "causal", "bias", "mask")
        return "".join(flag.capitalize() for flag in flags if getattr(self, flag))

    @property
    def inputs(self) -> tuple[Input, ...]:
        head_scale = (Input("head_scale"),) if self.cosine else ()
        bias = (Input("bias"),) if self.bias else ()
        return head_scale + bias + ((Input("mask", "bool"),) if self.mask else ())

    @property
    def attributes(self) -> dict[str, type]:
        names = ("scale", "softcap") if self.softcap else ("scale",)
        return dict.fromkeys(names, float)

    def check(self, extra: tuple[Shape, ...], full: Shape) -> None:
        """Shapes of the inputs behind query, key and value; `full` is [batch, heads, query_len, key_len]."""
        if self.cosine:
            require(extra[0] == full[1:2], f"head_scale {extra[0]} is not {full[1:2]}")
        for shape in extra[int(self.cosine) :]:
            fits = len(shape) == 4 and all(s in (1, f) for s, f in zip(shape, full, strict=True))
            require(fits, f"bias or mask {shape} does not broadcast to {full}")

    def body(self) -> str:
        """ONNX text from `q` [..., query_len, head_dim] and `kt` [..., head_dim, key_len] to the weights `p`.

        The scale multiplies the scores: ONNX Runtime then folds it into FusedMatMul. A masked row gives 0 since
        its weights are cut by the mask once more after the softmax.
        """
        masked = self.causal or self.mask
        steps = ["products", "scaled"]
        statements = list(self._cosine_statements()) if self.cosine else ["products = MatMul (q, kt)"]
        statements += [
            "scale_value = Constant <value_float: float = @scale> ()",
            "scaled = Mul (products, scale_value)",
        ]
        if self.softcap:
            statements += [
                "cap = Constant <value_float: float = @softcap> ()",
                "uncapped = Div (scaled, cap)",
                "bent = Tanh (uncapped)",
                "capped = Mul (bent, cap)",
            ]
            steps.append("capped")
        if self.bias:
            statements.append(f"biased = Add ({steps[-1]}, bias)")
            steps.append("biased")
        if masked:
            statements += [*self._keep_statements(), f"lowest = Constant <value_float: float = {LOWEST}> ()"]
            statements.append(f"seen_scores = Where (keep, {steps[-1]}, lowest)")
            steps.append("seen_scores")
        statements.append(f"{'p_all' if self.mask else 'p'} = Softmax <axis: int = -1> ({steps[-1]})")
        if self.mask:
            statements += ["zero = Constant <value_float: float = 0.0> ()", "p = Where (keep, p_all, zero)"]
        return lines(*statements)

    def _cosine_statements(self) -> Iterator[str]:
        yield f"shortest = Constant <value_float: float = {NORM_EPS}> ()"
        for name, axis in (("q", -1), ("kt", -2)):
            yield f"{name}_axis = Constant <value_ints: ints = [{axis}]> ()"
            yield f"{name}_norm = ReduceL2 <keepdims: int = 1> ({name}, {name}_axis)"
            yield f"{name}_length = Max ({name}_norm, shortest)"
            yield f"{name}_unit = Div ({name}, {name}_length)"
        yield "cosines = MatMul (q_unit, kt_unit)"
        yield "head_axes = Constant <value_ints: ints = [1, 2]> ()"
        yield "per_head = Unsqueeze (head_scale, head_axes)"
        yield "products = Mul (cosines, per_head)"

    def _keep_statements(self) -> Iterator[str]:
        if not self.causal:
            yield "keep = Identity (mask)"
            return
        yield "query_len = Shape <start: int = -2, end: int = -1> (q)"
        yield "key_len = Shape <start: int = -1> (kt)"
        yield "square = Concat <axis: int = 0> (query_len, key_len)"
        yield "ones = ConstantOfShape <value: tensor = float[1] one {1.0}> (square)"
        yield "triangle = Trilu <upper: int = 0> (ones)"
        yield f"{'keep' if not self.mask else 'seen'} = Cast <to: int = 9> (triangle)"
        if self.mask:
            yield "keep = And (seen, mask)"

    def reference(
        self, query: Array, key: Array, extra: tuple[Array, ...], scale: float, softcap: float = 0.0
    ) -> Array:
        """Weights [..., heads, query_len, key_len] in float64 from [..., heads, len, head_dim] query and key."""
        query, key = query.astype(np.float64), key.astype(np.float64)
        if self.cosine:
            query, key = _unit(query), _unit(key)
        scores = np.matmul(query, np.swapaxes(key, -1, -2)) * scale
        if self.cosine:
            scores = scores * extra[0].astype(np.float64)[:, None, None]
        if self.softcap:
            scores = softcap * np.tanh(scores / softcap)
        keep = None
        if self.bias:
            scores = scores + extra[int(self.cosine)].astype(np.float64)
        if self.mask:
            keep = extra[-1]
        if self.causal:
            seen = np.tri(scores.shape[-2], scores.shape[-1]) > 0
            keep = seen if keep is None else keep & seen
        return softmax_float64(scores, keep)


def _unit(vectors: Array) -> Array:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), NORM_EPS)


def all_scores() -> list[Scores]:
    """The forms that exist: causal, bias, mask and a cap in every combination; cosine with bias and mask."""
    plain = [Scores(*flags) for flags in itertools.product((False, True), repeat=4)]
    cosine = [Scores(bias=b, mask=m, cosine=True) for b, m in itertools.product((False, True), repeat=2)]
    return plain + cosine
