"""Timing logic on a fake clock, and the verdicts on series whose truth is known."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.latency import (
    ENOUGH_ROUNDS,
    MAX_ROUNDS,
    MIN_ROUNDS,
    SAME_WITHIN,
    Measurement,
    System,
    measure,
    median_interval,
    plan_rounds,
    tail_percent,
    verdict,
)


class FakeMachine:
    """A clock that only calls and sleeps move on; `log` holds what happened, in order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.log.append("pause")
        self.now_s += duration_s

    def system(self, name: str, duration_s: float | Callable[[], float]) -> System:
        def call() -> None:
            self.log.append(name)
            self.now_s += duration_s() if callable(duration_s) else duration_s

        return System(name, call)

    def measure(self, *systems: System, max_total_s: float = 1e6, **options: object) -> Measurement:
        return measure(systems, max_total_s=max_total_s, clock=self.clock, sleep=self.sleep, **options)  # type: ignore[arg-type]

    def turns(self) -> list[list[str]]:
        """The calls between two pauses, in order; the warm-ups come first."""
        turns: list[list[str]] = []
        for event in self.log:
            if event == "pause":
                turns.append([])
            else:
                turns[-1].append(event)
        return turns


def test_50_ms_added_to_a_system_are_50_ms_more_in_its_p50() -> None:
    machine = FakeMachine()
    measured = machine.measure(
        machine.system("plain", 0.010), machine.system("delayed", 0.060), rounds=6, calls_per_round=4
    )
    plain, delayed = measured.latency("plain", 1, 2), measured.latency("delayed", 1, 2)
    assert delayed.p50_ms - plain.p50_ms == pytest.approx(50.0)
    assert delayed.mean_ms - plain.mean_ms == pytest.approx(50.0)
    assert (plain.batch, plain.threads, plain.runs) == (1, 2, 24)


def test_percentiles_and_interval_come_from_the_samples() -> None:
    samples = np.arange(1.0, 101.0).reshape(20, 5)
    latency = Measurement({"a": samples}).latency("a", 8, 1)
    assert latency.p50_ms == 50.5
    assert latency.p90_ms == pytest.approx(90.1)
    assert latency.p99_ms == pytest.approx(99.01)
    assert latency.mean_ms == 50.5
    low, high = latency.ci95_ms
    assert 1.0 <= low < 50.5 < high <= 100.0


def test_the_time_of_a_devices_events_is_kept_beside_the_hosts_for_the_systems_that_have_them() -> None:
    machine = FakeMachine()
    events = itertools.count(1.0)
    on_device = machine.system("gpu", 0.010)
    on_device = System(on_device.name, on_device.call, device_ms=lambda: next(events))
    measured = machine.measure(on_device, machine.system("cpu", 0.010), rounds=6, calls_per_round=4)
    assert measured.device_samples_ms["gpu"].shape == (6, 4)
    device = measured.device_latency("gpu", 1, 2)
    assert device is not None
    assert (device.p50_ms, device.runs) == (12.5, 24)  # the first 24 events: warm-up and settling calls are not read
    assert measured.latency("gpu", 1, 2).p50_ms == pytest.approx(10.0)
    assert measured.device_latency("cpu", 1, 2) is None


def test_each_turn_is_a_pause_then_one_unrecorded_call_then_the_samples() -> None:
    machine = FakeMachine()
    measured = machine.measure(
        machine.system("a", 1.0), machine.system("b", 1.0), rounds=6, calls_per_round=3, pause_s=0.08
    )
    turns = machine.turns()[2:]  # after both warm-ups
    assert len(turns) == 12
    assert all(turn in (["a"] * 4, ["b"] * 4) for turn in turns)
    assert measured.samples_ms["a"].shape == (6, 3)


def test_a_slow_call_right_after_the_switch_is_not_a_sample() -> None:
    machine = FakeMachine()
    cold_after_switch = machine.system("cold", lambda: 0.5 if machine.log[-2] == "pause" else 0.01)
    measured = machine.measure(cold_after_switch, machine.system("other", 0.01), rounds=6, calls_per_round=3)
    assert measured.samples_ms["cold"].max() == pytest.approx(10.0)


def test_slow_calls_of_the_warm_up_are_not_samples() -> None:
    machine = FakeMachine()
    measured = machine.measure(
        machine.system("a", lambda: 0.1 if machine.now_s < 0.4 else 0.01), rounds=6, calls_per_round=3, warmup_s=0.5
    )
    assert measured.samples_ms["a"].max() == pytest.approx(10.0)


@pytest.mark.parametrize(("call_s", "calls"), [(0.125, 4), (0.25, 2), (3.0, 2)])
def test_warm_up_lasts_half_a_second_and_two_calls_at_least(call_s: float, calls: int) -> None:
    machine = FakeMachine()
    machine.measure(machine.system("a", call_s), rounds=6, calls_per_round=1)
    assert len(machine.turns()[0]) == calls


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_over_a_cycle_every_system_follows_every_other_equally_often_and_takes_every_place(count: int) -> None:
    machine = FakeMachine()
    names = [f"s{index}" for index in range(count)]
    cycle = 2 * count
    machine.measure(*(machine.system(name, 0.01) for name in names), rounds=max(cycle, 6), calls_per_round=1)
    sequence = [turn[0] for turn in machine.turns()[count:]][: cycle * count]
    rounds = [sequence[start : start + count] for start in range(0, len(sequence), count)]
    assert all(sorted(order) == names for order in rounds)
    pairs = Counter(pair for order in rounds for pair in itertools.pairwise(order))
    assert set(pairs.values()) == {2}
    assert len(pairs) == count * (count - 1)
    places = Counter((name, place) for order in rounds for place, name in enumerate(order))
    assert set(places.values()) == {2}
    assert len(places) == count * count


def test_the_order_is_the_same_for_the_same_seed_only() -> None:
    logs = []
    for seed in (1, 1, 2):
        machine = FakeMachine()
        machine.measure(*(machine.system(name, 0.01) for name in "abcde"), rounds=10, calls_per_round=1, seed=seed)
        logs.append(machine.log)
    assert logs[0] == logs[1] != logs[2]


def test_the_budget_ends_the_measurement_between_rounds_but_not_before_the_minimum() -> None:
    machine = FakeMachine()
    slow = machine.measure(
        machine.system("a", 1.0), machine.system("b", 2.0), rounds=40, calls_per_round=3, max_total_s=1.0
    )
    assert slow.samples_ms["a"].shape == slow.samples_ms["b"].shape == (MIN_ROUNDS, 3)
    machine = FakeMachine()
    fits_ten = machine.measure(
        machine.system("a", 1.0), rounds=40, calls_per_round=3, max_total_s=42.5, pause_s=0.0
    )  # a warm-up of 2 s, then 4 s a round
    assert fits_ten.samples_ms["a"].shape == (10, 3)
    assert machine.now_s <= 42.5


def test_no_collection_of_garbage_falls_into_a_timed_call() -> None:
    machine = FakeMachine()
    states: list[tuple[str, bool]] = []

    def call() -> None:
        states.append((machine.log[-1], gc.isenabled()))
        machine.log.append("call")
        machine.now_s += 1.0

    machine.measure(System("a", call), rounds=6, calls_per_round=2)
    warm_up_calls = 2
    assert states[warm_up_calls:] == [("pause", True), ("call", False), ("call", False)] * 6
    assert gc.isenabled()


def test_progress_tells_the_rounds_done_and_planned() -> None:
    machine = FakeMachine()
    seen: list[tuple[int, int]] = []
    machine.measure(
        machine.system("a", 0.01), rounds=7, calls_per_round=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(done, 7) for done in range(8)]


def test_an_error_of_a_system_goes_through() -> None:
    machine = FakeMachine()

    def fail() -> None:
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        machine.measure(System("a", fail))


@pytest.mark.parametrize("call_s", [1e-5, 1e-3, 0.02, 0.3, 3.0])
def test_automatic_rounds_fill_the_budget_without_leaving_it(call_s: float) -> None:
    machine = FakeMachine()
    measured = machine.measure(machine.system("a", call_s), machine.system("b", 1.5 * call_s), max_total_s=60.0)
    rounds, calls = measured.samples_ms["a"].shape
    assert MIN_ROUNDS <= rounds <= MAX_ROUNDS
    assert calls >= 1
    assert machine.now_s <= 60.0 or (rounds, calls) == (MIN_ROUNDS, 1)


@pytest.mark.parametrize(
    ("call_s", "budget_s", "expected"),
    [
        (0.010, 60.0, (50, 20)),  # time enough: turns of 0.1 s, the most rounds
        (0.010, 6.1, (20, 13)),  # calls give way so that 20 rounds fit
        (1.0, 30.0, (7, 3)),  # three calls are kept while the fewest rounds fit
        (1.0, 20.0, (6, 2)),
        (1.0, 1.0, (6, 1)),  # the least there is, over the budget
    ],
)
def test_calls_give_way_before_rounds_when_time_is_short(
    call_s: float, budget_s: float, expected: tuple[int, int]
) -> None:
    plan = plan_rounds(call_s, pauses_s=0.16, budget_s=budget_s, systems=2, rounds=None, calls=None)
    assert (plan.rounds, plan.calls) == expected


def test_what_the_caller_fixed_is_kept_and_the_rest_fits_around_it() -> None:
    fixed_rounds = plan_rounds(0.05, pauses_s=0.1, budget_s=10.5, systems=1, rounds=40, calls=None)
    assert (fixed_rounds.rounds, fixed_rounds.calls) == (40, 2)
    fixed_calls = plan_rounds(0.05, pauses_s=0.1, budget_s=10.0, systems=1, rounds=None, calls=18)
    assert (fixed_calls.rounds, fixed_calls.calls) == (9, 18)
    assert fixed_calls.rounds < ENOUGH_ROUNDS


@pytest.mark.parametrize(
    ("systems", "options"),
    [
        ([], {}),
        (["a", "a"], {}),
        (["a"], {"rounds": MIN_ROUNDS - 1}),
        (["a"], {"calls_per_round": 0}),
    ],
    ids=["no-system", "two-of-one-name", "too-few-rounds", "no-call"],
)
def test_a_measurement_that_cannot_be_told_apart_or_judged_is_refused(
    systems: list[str], options: dict[str, int]
) -> None:
    machine = FakeMachine()
    with pytest.raises(UsageError):
        machine.measure(*(machine.system(name, 0.01) for name in systems), **options)
    assert machine.log == []


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    measurement = Measurement({"onnxruntime": np.ones((6, 1))})
    with pytest.raises(UsageError, match="onnxruntime"):
        measurement.latency("onxruntime", 1, 1)
    with pytest.raises(UsageError):
        measurement.compare("onnxruntime", "eager")


def noisy(rng: np.random.Generator, base_ms: float, noise: float, rounds: int = 30, calls: int = 10) -> np.ndarray:
    """Skewed, as latencies are: nothing makes a call faster than it can be."""
    return base_ms * (1.0 + noise * rng.lognormal(0.0, 1.0, (rounds, calls)))


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.2])
def test_equal_systems_show_no_difference_in_95_of_100_seeds(noise: float) -> None:
    verdicts: Counter[str] = Counter()
    for seed in range(100):
        rng = np.random.default_rng(seed)
        measured = Measurement({"a": noisy(rng, 10.0, noise), "b": noisy(rng, 10.0, noise)}, seed=seed)
        verdicts[measured.compare("a", "b").verdict] += 1
    assert verdicts["no difference"] >= 95


@pytest.mark.parametrize("rounds", [6, 7, 8, 12, 20])
def test_the_interval_on_the_ratio_of_equal_systems_holds_1_even_with_few_rounds(rounds: int) -> None:
    held = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        measured = Measurement({name: noisy(rng, 10.0, 0.2, rounds) for name in "ab"}, seed=seed)
        low, high = measured.compare("a", "b").ratio_ci95
        held += low <= 1.0 <= high
    assert held >= 0.93 * 300


def test_a_system_that_takes_1_3_times_as_long_is_slower_and_the_other_faster() -> None:
    rng = np.random.default_rng(0)
    measured = Measurement({"ours": noisy(rng, 10.0, 0.1), "peer": noisy(rng, 13.0, 0.1)})
    ours = measured.compare("ours", "peer")
    assert ours.verdict == "faster"
    assert ours.ratio == pytest.approx(1.3, rel=0.05)
    assert ours.ratio_ci95[0] <= ours.ratio <= ours.ratio_ci95[1]
    peer = measured.compare("peer", "ours")
    assert peer.verdict == "slower"
    assert peer.ratio == pytest.approx(1.0 / ours.ratio, rel=0.01)


def test_a_slow_phase_that_hits_both_leaves_the_ratio_and_the_verdict_as_they_are() -> None:
    machine = FakeMachine()

    def during(base_s: float) -> Callable[[], float]:
        return lambda: base_s * (3.0 if 3.0 < machine.now_s < 6.0 else 1.0)

    measured = machine.measure(
        machine.system("a", during(0.010)), machine.system("b", during(0.013)), rounds=20, calls_per_round=10
    )
    assert measured.latency("a", 1, 1).p99_ms == pytest.approx(30.0)  # the phase did happen
    compared = measured.compare("a", "b")
    assert compared.ratio == pytest.approx(1.3)
    assert compared.verdict == "faster"


def test_a_certain_difference_too_small_to_matter_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    measured = Measurement({"a": noisy(rng, 10.0, 0.001), "b": noisy(rng, 10.1, 0.001)})
    compared = measured.compare("a", "b")
    assert compared.ratio_ci95[0] > 1.0
    assert compared.verdict == "no difference"


@pytest.mark.parametrize(
    ("ratio", "interval", "expected"),
    [
        (1.3, (1.2, 1.4), "faster"),
        (1.3, (0.9, 1.7), "no difference"),
        (SAME_WITHIN - 0.001, (1.001, 1.05), "no difference"),
        (0.8, (0.7, 0.9), "slower"),
        (0.8, (0.5, 1.1), "no difference"),
        (1.0 / SAME_WITHIN + 0.001, (0.95, 0.999), "no difference"),
    ],
)
def test_a_verdict_needs_certainty_and_size(ratio: float, interval: tuple[float, float], expected: str) -> None:
    assert verdict(ratio, interval) == expected


def test_the_interval_is_the_same_each_time_and_whole_rounds_are_drawn() -> None:
    rng = np.random.default_rng(0)
    per_round = 10.0 + rng.normal(size=(20, 1))
    same_within_rounds = np.repeat(per_round, 30, axis=1)
    assert median_interval(same_within_rounds) == median_interval(same_within_rounds)
    # Thirty equal calls in a round tell no more than one of them.
    assert median_interval(same_within_rounds) == median_interval(per_round)


def test_the_interval_of_many_samples_is_taken_in_parts_and_no_different(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(0).normal(10.0, 1.0, (25, 7))
    whole = median_interval(samples, seed=3)
    monkeypatch.setattr("attn_deploy.latency._RESAMPLED_AT_ONCE", 1000)
    assert median_interval(samples, seed=3) == whole


@pytest.mark.parametrize(("rounds", "percent"), [(6, 0.24), (20, 1.60), (10_000, 2.50)])
def test_the_tails_are_those_of_the_expanded_percentile_interval(rounds: int, percent: float) -> None:
    # Exact quantiles of Student's t (5 degrees: 2.5706, 19: 2.0930) put into the formula.
    assert tail_percent(rounds) == pytest.approx(percent, abs=0.03)
