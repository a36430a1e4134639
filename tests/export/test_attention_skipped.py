"""What looks like an attention and is none of our operators is left as it is, with the reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from attn_deploy.export.recognize.site import Reason
from attn_deploy.export.rewrite import RewrittenModel

sys.path.insert(0, str(Path(__file__).parent))  # for attention_layers

from attention_layers import SCORES, Layers, X, attend, merged, model_of, scores_of

Rewritten = Callable[..., RewrittenModel]


def temperatures(m: Layers, x: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(scores * m.temperature, value))


def clamped(m: Layers, x: Tensor) -> Tensor:
    """Cut off where real scores may come, and the example's do not."""
    scores, value = scores_of(m, x)
    return merged(attend(scores.clamp(-20, 20), value))


def talking_before(m: Layers, x: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(m.talk(scores), value))


def talking_after(m: Layers, x: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(m.mix(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ value)


def bias_scaled_with_scores(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    query, key, value = m.heads(x)
    return merged(attend((query @ key.transpose(2, 3) + mask[:, None]) * 0.5, value))


def two_at_run_time(m: Layers, x: Tensor, mask: Tensor) -> Tensor:
    scores, value = scores_of(m, x)
    return merged(attend(scores + mask[:, None] + mask[:, None].transpose(2, 3), value))


def weights_given_away(m: Layers, x: Tensor) -> tuple[Tensor, Tensor]:
    scores, value = scores_of(m, x)
    weights = scores.softmax(-1)
    return merged(weights @ value), weights


EXTRA: dict[Callable[..., Any], tuple[str, ...]] = {bias_scaled_with_scores: (SCORES,), two_at_run_time: (SCORES,)}
SKIPPED: dict[Callable[..., Any], Reason] = {
    temperatures: Reason.NOT_AFFINE,
    clamped: Reason.NOT_AFFINE,
    talking_before: Reason.HEADS_MIXED,
    talking_after: Reason.HEADS_MIXED,
    bias_scaled_with_scores: Reason.NOT_AFFINE,
    two_at_run_time: Reason.RUNTIME_OPERANDS,
    weights_given_away: Reason.NOT_BETWEEN_PRODUCTS,
}


@pytest.mark.parametrize("case", SKIPPED, ids=lambda case: case.__name__)
def test_another_attention_is_skipped_with_its_reason(case: Callable[..., Any], rewritten: Rewritten) -> None:
    model = rewritten(model_of(case), X, *EXTRA.get(case, ()))
    assert model.sites == ()
    assert [s.reason for s in model.skipped] == [SKIPPED[case]]
