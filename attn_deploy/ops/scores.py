"""What stands between the product of query and key and the product with value, shared by the attention operators.

A variation of it is a set of flags; the flags name the form: Attention, AttentionCausal, AttentionBiasMask, ...
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attn_deploy.ops.form import Array, Input, lines, softmax_float64

LOWEST = "-3.4028234663852886e38"
"""The lowest float32: a masked score. Not -inf, which makes NaN of a fully masked row."""


@dataclass(frozen=True)
class Scores:
    """causal: token i sees keys 0..i (aligned at the first token, as in torch's scaled_dot_product_attention).
    bias: finite, added to the scaled scores, [batch|1, heads|1, query_len, key_len].
    mask: bool, true where a query sees a key, [batch|1, heads|1, query_len|1, key_len].
    """

    causal: bool = False
    bias: bool = False
    mask: bool = False

    @property
    def suffix(self) -> str:
        return ("Causal" if self.causal else "") + ("Bias" if self.bias else "") + ("Mask" if self.mask else "")

    @property
    def inputs(self) -> tuple[Input, ...]:
        bias = (Input("bias"),) if self.bias else ()
        return bias + ((Input("mask", "bool"),) if self.mask else ())

    def body(self) -> str:
        """ONNX text from `q` [..., query_len, head_dim] and `kt` [..., head_dim, key_len] to the weights `p`.

        The scale multiplies the scores: ONNX Runtime then folds it into FusedMatMul. A masked row gives 0 since
        its weights are cut by the mask once more after the softmax.
        """
        masked = self.causal or self.mask
        return lines(
            "scale_value = Constant <value_float: float = @scale> ()",
            "products = MatMul (q, kt)",
            f"{'scaled' if self.bias or masked else 'scores'} = Mul (products, scale_value)",
            f"{'biased' if masked else 'scores'} = Add (scaled, bias)" if self.bias else "",
            *(self._keep_statements() if masked else ()),
            f"lowest = Constant <value_float: float = {LOWEST}> ()" if masked else "",
            f"scores = Where (keep, {'biased' if self.bias else 'scaled'}, lowest)" if masked else "",
            f"{'p_all' if self.mask else 'p'} = Softmax <axis: int = -1> (scores)",
            "zero = Constant <value_float: float = 0.0> ()" if self.mask else "",
            "p = Where (keep, p_all, zero)" if self.mask else "",
        )

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

    def reference(self, query: Array, key: Array, extra: tuple[Array, ...], scale: float) -> Array:
        """Weights [..., query_len, key_len] in float64 from [..., len, head_dim] query and key."""
        scores = np.matmul(query.astype(np.float64), np.swapaxes(key, -1, -2).astype(np.float64)) * scale
        keep = None
        if self.bias:
            scores = scores + extra[0].astype(np.float64)
        if self.mask:
            keep = extra[-1]
        if self.causal:
            seen = np.tri(scores.shape[-2], scores.shape[-1]) > 0
            keep = seen if keep is None else keep & seen
        return softmax_float64(scores, keep)


def all_scores() -> list[Scores]:
    return [Scores(*flags) for flags in itertools.product((False, True), repeat=3)]
