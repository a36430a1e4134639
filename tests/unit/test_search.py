"""The choice of parts for INT8: the knapsack, the frontier, and what is given back."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from attn_deploy.search import (
    BUCKETS,
    GAIN_SHARES,
    Part,
    Plan,
    Verified,
    decibel,
    fastest,
    find,
    frontier,
    gain_us,
    knapsack,
    loss,
    noise,
)

ABC = (Part("a", 0.001, 50.0), Part("b", 0.004, 60.0), Part("c", 0.002, 20.0))


def random_parts(seed: int, count: int) -> list[Part]:
    rng = np.random.default_rng(seed)
    return [
        Part(f"p{n}", float(10 ** rng.uniform(-5, -2)), float(rng.uniform(-10, 100))) for n in range(count)
    ]  # fmt: skip


def best_by_trying_all(parts: list[Part], capacity: float) -> float:
    subsets = itertools.chain.from_iterable(itertools.combinations(parts, k) for k in range(len(parts) + 1))
    return max(sum(p.gain_us for p in s) for s in subsets if sum(p.loss for p in s) <= capacity)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_the_knapsack_finds_what_trying_all_subsets_finds(seed: int, share: float) -> None:
    parts = random_parts(seed, 11)
    capacity = share * sum(p.loss for p in parts)
    plan = knapsack(parts, capacity)
    assert loss(parts, plan) <= capacity * (1 + 1e-9)
    rounded = capacity * (1 - len(parts) / BUCKETS)
    assert best_by_trying_all(parts, rounded) <= gain_us(parts, plan) <= best_by_trying_all(parts, capacity)


def test_a_part_that_gains_nothing_is_never_taken_and_one_without_loss_always() -> None:
    parts = [Part("slower", 0.0, -3.0), Part("equal", 0.0, 0.0), Part("free", 0.0, 1.0), Part("dear", 2.0, 9.0)]
    assert knapsack(parts, 1.0) == {"free"}
    assert knapsack(parts, 2.0) == {"free", "dear"}


def test_losses_and_decibels_are_each_others_inverse() -> None:
    assert decibel(noise(28.0)) == pytest.approx(28.0)
    assert noise(20.0) == pytest.approx(0.01)
    assert math.isfinite(decibel(0.0))


def test_the_frontier_goes_from_all_that_gains_to_nothing_and_holds_the_budgets_own_plan() -> None:
    parts = [*random_parts(3, 20), Part("slower", 0.0, -1.0)]
    capacity = noise(24.0)
    plans = frontier(parts, capacity)
    assert plans[0] == {p.name for p in parts if p.gain_us > 0}
    assert plans[-1] == frozenset()
    assert knapsack(parts, capacity) in plans
    gains = [gain_us(parts, plan) for plan in plans]
    assert gains == sorted(gains, reverse=True)
    assert len(set(plans)) == len(plans) > 4
    for share in GAIN_SHARES:
        assert any(share <= gain / gains[0] < share + 0.15 for gain in gains)


def measured(truth: dict[str, float], least_db: float, tried: list[Plan]) -> object:
    """A model whose parts really lose `truth`, and a budget."""

    def verify(plan: Plan) -> Verified:
        tried.append(plan)
        found_db = min(decibel(sum(truth[name] for name in plan)), 120.0)
        return Verified(plan, found_db, None, None, None if found_db >= least_db else f"{found_db:.1f} dB")

    return verify


def test_where_losses_add_up_as_assumed_the_fastest_plan_of_the_budget_is_found() -> None:
    parts = random_parts(5, 12)
    budget_db = 22.0
    found = find(parts, noise(budget_db), measured({p.name: p.loss for p in parts}, budget_db, []))  # type: ignore[arg-type]
    assert found.best is not None
    assert gain_us(parts, found.best.plan) >= gain_us(parts, knapsack(parts, noise(budget_db)))
    assert all(v.fault is not None for v in found.tried if gain_us(parts, v.plan) > gain_us(parts, found.best.plan))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_plan_that_misses_gives_back_its_worst_parts_until_it_holds(count: int) -> None:
    """Of forty parts, nearly alike, the budget has room for a few less than all."""
    parts = [Part(f"p{n}", 1e-3 * (1 + n / 100), 10.0) for n in range(40)]
    truth = {p.name: p.loss for p in parts}
    kept = 40 - count
    least_db = decibel(sum(sorted(truth.values())[:kept])) - 0.01
    tried: list[Plan] = []
    found = find(parts, sum(truth.values()) * 1.01, measured(truth, least_db, tried))  # type: ignore[arg-type]
    assert found.best is not None
    assert found.best.plan == {f"p{n}" for n in range(kept)}
    assert found.reverted[found.best.plan] == tuple(f"p{n}" for n in range(39, kept - 1, -1))
    assert len(tried) == len(set(tried))


def test_no_more_is_given_back_than_pays() -> None:
    """What holds already is faster than what would be left."""
    parts = [Part("loud", 1e-2, 10.0), Part("quiet", 1e-4, 9.0)]
    found = find(parts, noise(38.0), measured({"loud": 1e-2, "quiet": 1e-4}, 38.0, []))  # type: ignore[arg-type]
    assert found.best is not None
    assert found.best.plan == {"quiet"}
    assert found.reverted == {}


def test_a_budget_that_no_plan_meets_leaves_the_nearest() -> None:
    found = find(ABC, noise(60.0), measured({p.name: p.loss for p in ABC}, 60.0, []))  # type: ignore[arg-type]
    assert found.best is None
    assert found.nearest.plan == {"a"}
    assert found.nearest.fault == "30.0 dB"


def test_where_nothing_gains_only_all_or_nothing_is_left_to_measure() -> None:
    parts = [Part("a", 1e-3, -1.0), Part("b", 1e-3, 0.0)]
    found = find(parts, None, measured({"a": 1e-3, "b": 1e-3}, 20.0, []))  # type: ignore[arg-type]
    assert [v.plan for v in found.holding] == [frozenset(), {"a", "b"}]
    missed = find(parts, None, measured({"a": 1e-3, "b": 1e-3}, 40.0, []))  # type: ignore[arg-type]
    assert missed.best is not None
    assert missed.best.plan == frozenset()


def test_among_equally_fast_plans_the_one_that_loses_least_is_taken() -> None:
    def holding(name: str, found_db: float) -> Verified:
        return Verified(frozenset({name}), found_db, None, None, None)

    plans = [holding("fast", 20.0), holding("near", 30.0), holding("slow", 40.0)]
    times_ms = {frozenset({"fast"}): 1.0, frozenset({"near"}): 1.01, frozenset({"slow"}): 1.1}
    assert fastest(plans, times_ms) is plans[1]
