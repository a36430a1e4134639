"""Which parts of a model to compute in INT8: the fastest plan that keeps the budget.

    parts, each with its loss and its gain -> plans (knapsack) -> verified whole -> the fastest that holds

Loss and gain are of each part alone, so N parts cost N trials and not 2**N. Losses add up: where errors are small the
output's error is the sum of what each part contributes, and what different layers round off is uncorrelated, so that
powers add (the assumption of HAWQ-V3, Yao et al. 2021, section 3.3, and of Zhou et al., Adaptive Quantization for Deep
Neural Network, 2018, section 4; near the minimum a divergence of class scores is quadratic in the error and adds up as
well). It is an assumption: every plan is verified whole, on samples that calibration did not see, and one that misses
gives back its worst parts until it holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BUCKETS = 4096
"""Of the knapsack's capacity. A loss counts as the next multiple of a bucket, so that a plan never passes the capacity;
for it a hundred parts may leave 1.2 % of the capacity unused, on average."""

GAIN_SHARES = (0.85, 0.7, 0.5, 0.3, 0.1)
"""Of what all parts gain together: where the frontier has plans. Each costs a pass over the judged samples."""

BISECTIONS = 24
"""Of a capacity on a logarithmic scale: far below what the buckets tell apart."""

REVERTED_AT_MOST = 3

SAME_TIME = 1.02
"""Plans this close are equally fast: the one that loses less is better then."""


@dataclass(frozen=True)
class Part:
    """`loss`: of the model's output when this part alone is in INT8, on a scale that adds up: noise over signal, or a
    divergence. `gain_us`: what that saves of one call."""

    name: str
    loss: float
    gain_us: float


Plan = frozenset[str]
"""The parts in INT8."""


@dataclass(frozen=True)
class Verified:
    """A plan tried whole. `fault`: why it misses the budget, or None."""

    plan: Plan
    sqnr_db: float
    agreement: float | None
    accuracy: float | None
    fault: str | None


@dataclass(frozen=True)
class Found:
    """`tried`: the plans by what they are predicted to take, the fastest first. `best`: the fastest of them that holds;
    None where none does. `reverted`: of each plan that gave parts back, which."""

    tried: tuple[Verified, ...]
    best: Verified | None
    reverted: Mapping[Plan, tuple[str, ...]]

    @property
    def holding(self) -> tuple[Verified, ...]:
        """All that keep the budget, the fastest by prediction first."""
        return tuple(v for v in self.tried if v.fault is None)

    @property
    def nearest(self) -> Verified:
        """The one that comes nearest to the budget: in INT8 anywhere, and with the least noise."""
        return max((v for v in self.tried if v.plan), key=lambda v: v.sqnr_db, default=self.tried[0])


def noise(sqnr_db: float) -> float:
    """Noise power by signal power."""
    return float(10 ** (-sqnr_db / 10))


def decibel(loss: float) -> float:
    """The inverse of `noise`; what no noise is stays finite."""
    return float(-10 * math.log10(max(loss, 1e-20)))


def knapsack(parts: Sequence[Part], capacity: float) -> Plan:
    """The parts that gain most together with losses of `capacity` at most; exact but for the buckets. Parts that gain
    nothing are never taken, those without loss always."""
    offered = [p for p in parts if p.gain_us > 0 and p.loss <= capacity]
    free = [p for p in offered if p.loss <= 0]
    rest = [p for p in offered if p.loss > 0]
    best = np.zeros(BUCKETS + 1)
    took = np.zeros((len(rest), BUCKETS + 1), bool)
    weights = [min(math.ceil(p.loss / capacity * BUCKETS), BUCKETS) for p in rest]
    for row, (part, weight) in enumerate(zip(rest, weights, strict=True)):
        with_it = np.full(BUCKETS + 1, -np.inf)
        with_it[weight:] = best[: BUCKETS + 1 - weight] + part.gain_us
        took[row] = with_it > best
        best = np.maximum(best, with_it)
    chosen, place = [p.name for p in free], BUCKETS
    for row in range(len(rest) - 1, -1, -1):
        if took[row, place]:
            chosen.append(rest[row].name)
            place -= weights[row]
    return frozenset(chosen)


def frontier(parts: Sequence[Part], capacity: float | None) -> list[Plan]:
    """Plans from all parts that gain to none, the fastest first: with the least loss for each of GAIN_SHARES, the part
    that loses least, and the best for the budget's own `capacity`; and all parts, gain or not, since a part between two
    in INT8 may cost more in floating point than it seems."""
    gaining = [p for p in parts if p.gain_us > 0]
    plans: list[Plan] = []
    if gaining:
        everything = frozenset(p.name for p in gaining)
        total_us = gain_us(parts, everything)
        plans = [everything, *(_least_loss(gaining, share * total_us) for share in GAIN_SHARES)]
        plans.append(frozenset({min(gaining, key=lambda p: p.loss).name}))
    if capacity is not None:
        plans.append(knapsack(parts, capacity))
    plans += [frozenset(p.name for p in parts), frozenset()]
    gains = {plan: gain_us(parts, plan) for plan in plans}
    return sorted(gains, key=lambda plan: (-gains[plan], sorted(plan)))


def _least_loss(gaining: Sequence[Part], least_us: float) -> Plan:
    """The plan that gains `least_us` with the least capacity, as far as bisection finds it."""
    losses = [max(p.loss, 1e-20) for p in gaining]
    low, high = math.log(min(losses)), math.log(sum(losses) * (1 + 2 * len(losses) / BUCKETS))
    plan = frozenset(p.name for p in gaining)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = knapsack(gaining, math.exp(middle))
        if gain_us(gaining, found) >= least_us:
            plan, high = found, middle
        else:
            low = middle
    return plan


def gain_us(parts: Iterable[Part], plan: Plan) -> float:
    return sum(p.gain_us for p in parts if p.name in plan)


def loss(parts: Iterable[Part], plan: Plan) -> float:
    return sum(p.loss for p in parts if p.name in plan)


def find(parts: Sequence[Part], capacity: float | None, verify: Callable[[Plan], Verified]) -> Found:
    """Verifies the frontier. The fastest plan that holds is found, or one between it and the next faster, which missed:
    that one gives back its worst parts, one to three, as long as it stays faster than what holds."""
    tried = [verify(plan) for plan in frontier(parts, capacity)]
    holding = next((place for place, v in enumerate(tried) if v.fault is None), len(tried))
    reverted: dict[Plan, tuple[str, ...]] = {}
    least_us = gain_us(parts, tried[holding].plan) if holding < len(tried) else 0.0
    if holding:
        worst = sorted((p for p in parts if p.name in tried[holding - 1].plan), key=lambda p: -p.loss)
        for count in range(1, min(REVERTED_AT_MOST, len(worst)) + 1):
            gone = tuple(p.name for p in worst[:count])
            plan = tried[holding - 1].plan - set(gone)
            if not plan or gain_us(parts, plan) <= least_us:
                break
            verified = verify(plan)
            reverted[plan] = gone
            tried.insert(holding + count - 1, verified)
            if verified.fault is None:
                break
    best = next((v for v in tried if v.fault is None and v.plan), None)
    if best is None and not any(p.gain_us > 0 for p in parts):
        best = tried[0]
    return Found(tuple(tried), best, reverted)


def fastest(holding: Sequence[Verified], measured_ms: Mapping[Plan, float]) -> Verified:
    """Of plans that keep the budget the one that loses least among the fastest by measurement."""
    least_ms = min(measured_ms[v.plan] for v in holding)
    return max((v for v in holding if measured_ms[v.plan] <= least_ms * SAME_TIME), key=lambda v: v.sqnr_db)
