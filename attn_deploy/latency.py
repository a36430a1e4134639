"""Latency of several systems measured against each other: interleaved in one process, one sample per call.

    measure(systems) -> Measurement -> .latency(name) -> receipt.Latency
                                    -> .compare(a, b) -> Comparison

A machine has slow phases that last seconds. Rounds in which every system takes a turn put each phase on all of them,
so a ratio inside one round holds where the times themselves do not.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from attn_deploy.errors import UsageError
from attn_deploy.receipt import Latency
from attn_deploy.session import Array
from attn_deploy.target import nearest

MIN_ROUNDS = 6
"""The interval comes from resampling rounds. From least to greatest, n rounds cover the true median with probability
1 - 2 * 0.5**n: 93.8 % for five, 96.9 % for six, so with fewer no interval could be called a 95 % one."""

ENOUGH_ROUNDS = 20
"""Where time is short, calls per round give way first until this many rounds fit."""

MAX_ROUNDS = 50
MIN_CALLS = 3
MAX_CALLS = 50
TURN_S = 0.1
"""A turn lasts about this long: several times the settling call, far less than a slow phase of the machine."""

PAUSE_S = 0.08
"""Before each turn. An ONNX Runtime worker spins 42 to 48 ms after its last call and PyTorch's about 10 ms (process CPU
time after the last call; 2 threads, ONNX Runtime 1.32, AMD EPYC); until then the next system lacks a core."""

RESAMPLES = 2000
_RESAMPLED_AT_ONCE = 4_000_000
"""Values: 32 MB."""

FASTER, SLOWER, NO_DIFFERENCE = "faster", "slower", "no difference"
SAME_WITHIN = 1.02
"""Times closer than this are the same. Even two sessions of one and the same model differ measurably: of 30 such pairs
(five in each of 6 processes) more than a quarter had an interval without 1, while 29 were within 2 % of each other and
the last 2.3 % apart (ONNX Runtime 1.32, 1 thread, 36 rounds, CPU time, since the machine was loaded)."""


@dataclass(frozen=True)
class System:
    """Something to call. `call` returns only when its results are there: copies count for everyone, or for no one.

    `device_ms` gives what the device's own events measured around the last call's work, where there is a device.
    """

    name: str
    call: Callable[[], object]
    device_ms: Callable[[], float] | None = None


@dataclass(frozen=True)
class Comparison:
    """`ratio` = time of `b` over time of `a`, the median over rounds; above 1, `a` is the faster one."""

    a: str
    b: str
    ratio: float
    ratio_ci95: tuple[float, float]
    verdict: str
    """faster | slower | no difference: of `a`, against `b`."""


@dataclass(frozen=True)
class Measurement:
    """`samples_ms`: float64[rounds, calls_per_round] by system; row r of every system is from the same round.
    `device_samples_ms`: the same by the device's events, for the systems that have them."""

    samples_ms: Mapping[str, Array]
    seed: int = 0
    device_samples_ms: Mapping[str, Array] = field(default_factory=dict)

    def latency(self, name: str, batch: int, threads: int) -> Latency:
        """The figures of one system for the receipt. Raises UsageError for a name that was not measured."""
        return self._figures(self._of(name), batch, threads)

    def device_latency(self, name: str, batch: int, threads: int) -> Latency | None:
        """The same by the device's events; None for a system without a device."""
        samples = self.device_samples_ms.get(name)
        return None if samples is None else self._figures(samples, batch, threads)

    def _figures(self, samples: Array, batch: int, threads: int) -> Latency:
        p50, p90, p99 = (float(value) for value in np.percentile(samples, [50, 90, 99]))
        return Latency(
            batch=batch,
            threads=threads,
            runs=samples.size,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            mean_ms=float(samples.mean()),
            ci95_ms=median_interval(samples, self.seed),
        )

    def compare(self, a: str, b: str) -> Comparison:
        """`a` against `b` by the ratio b/a of their medians in each round. Raises UsageError for an unknown name."""
        ratios = np.median(self._of(b), axis=1) / np.median(self._of(a), axis=1)
        ratio = float(np.median(ratios))
        interval = median_interval(ratios[:, None], self.seed)
        return Comparison(a=a, b=b, ratio=ratio, ratio_ci95=interval, verdict=verdict(ratio, interval))

    def clearly_faster(self, a: str, b: str) -> bool:
        """The verdict that a is faster than b."""
        return self.compare(a, b).verdict == FASTER

    def _of(self, name: str) -> Array:
        if name not in self.samples_ms:
            raise UsageError("no such system was measured", got=name, expected=nearest(name, self.samples_ms))
        return self.samples_ms[name]


def verdict(ratio: float, ratio_ci95: tuple[float, float]) -> str:
    """A difference has to be certain (the interval leaves out 1) and large enough to matter (`SAME_WITHIN`)."""
    low, high = ratio_ci95
    if low > 1.0 and ratio > SAME_WITHIN:
        return FASTER
    if high < 1.0 and ratio < 1.0 / SAME_WITHIN:
        return SLOWER
    return NO_DIFFERENCE


def median_interval(samples: Array, seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the median of `samples` [rounds, calls]; two rounds or more.

    Whole rounds are drawn: calls of one round share the machine's state, and drawn one by one they would
    pass for independent and make the interval too narrow.
    """
    rounds = samples.shape[0]
    picks = np.random.default_rng(seed).integers(rounds, size=(RESAMPLES, rounds))
    per_chunk = max(1, _RESAMPLED_AT_ONCE // samples.size)
    medians = np.concatenate(
        [
            np.median(samples[chunk].reshape(len(chunk), -1), axis=1)
            for chunk in (picks[start : start + per_chunk] for start in range(0, RESAMPLES, per_chunk))
        ]
    )
    tail = tail_percent(rounds)
    low, high = np.percentile(medians, [tail, 100.0 - tail])
    return float(low), float(high)


def tail_percent(rounds: int) -> float:
    """Percent to cut from each end of the bootstrap distribution: 2.5 for many rounds, less for few.

    The plain percentile interval is too narrow for few rounds: at seven it called 10 % of equal systems different. This
    is the expanded percentile interval, Phi(-sqrt(n / (n - 1)) * t) with Student's t for n - 1 degrees of freedom
    (Hesterberg 2015, "What Teachers Should Know about the Bootstrap", arXiv:1411.5279), under which it was 2 to 5 %
    from six rounds on. t comes from the normal quantile z (Abramowitz & Stegun 1964, 26.7.5, the first terms).
    """
    normal = NormalDist()
    z = normal.inv_cdf(0.975)
    freedom = rounds - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return 100.0 * normal.cdf(-t * math.sqrt(rounds / freedom))


def measure(
    systems: Sequence[System],
    *,
    max_total_s: float,
    rounds: int | None = None,
    calls_per_round: int | None = None,
    warmup_s: float = 0.5,
    pause_s: float = PAUSE_S,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Warm every system up, then let all of them take a turn in each round, in an order that changes by round.

    `rounds` and `calls_per_round` left out are chosen from the time of a warm call and `max_total_s`. That budget
    counts from the start of the warm-up, so what compiles on its first call is better called once beforehand; it ends
    the measurement between rounds, though never before `MIN_ROUNDS`. `progress` gets (rounds done, rounds planned).
    A lone system pauses and settles as well, so that its figures compare with those taken in company.

    Raises UsageError for no system, two of one name, or too few rounds or calls; what a call raises goes through.
    """
    _check(systems, rounds, calls_per_round)
    started_s = clock()
    call_s = 0.0
    for system in systems:
        sleep(pause_s)
        call_s += _warm_up(system, warmup_s, clock)
    plan = plan_rounds(
        call_s,
        pauses_s=pause_s * len(systems),
        budget_s=max_total_s - (clock() - started_s),
        systems=len(systems),
        rounds=rounds,
        calls=calls_per_round,
    )
    if progress is not None:
        progress(0, plan.rounds)
    samples_ms: dict[str, list[list[float]]] = {system.name: [] for system in systems}
    device_ms: dict[str, list[list[float]]] = {s.name: [] for s in systems if s.device_ms is not None}
    orders = _orders(len(systems), seed)
    last_round_s = 0.0
    for done in range(plan.rounds):
        round_started_s = clock()
        if done >= MIN_ROUNDS and round_started_s - started_s + last_round_s > max_total_s:
            break
        for system in (systems[index] for index in next(orders)):
            sleep(pause_s)
            turn = _turn(system, plan.calls, clock)
            samples_ms[system.name].append(turn.host_ms)
            if system.device_ms is not None:
                device_ms[system.name].append(turn.device_ms)
        last_round_s = clock() - round_started_s
        if progress is not None:
            progress(done + 1, plan.rounds)
    return Measurement(_arrays(samples_ms), seed, _arrays(device_ms))


def _arrays(samples_ms: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Array]:
    return {name: np.asarray(rows, dtype=np.float64) for name, rows in samples_ms.items()}


@dataclass(frozen=True)
class Plan:
    """How many rounds, and how many timed calls of each system in each of them."""

    rounds: int
    calls: int


def plan_rounds(
    call_s: float, *, pauses_s: float, budget_s: float, systems: int, rounds: int | None, calls: int | None
) -> Plan:
    """Fill in what the caller left open. Summed over systems: `call_s` one warm call of each, `pauses_s` of a round.

    Rounds carry the interval and calls the percentiles: calls shrink to `MIN_CALLS` so that `ENOUGH_ROUNDS` fit, and
    to one so that `MIN_ROUNDS` do.
    """
    call_s = max(call_s, 1e-9)

    def calls_that_fit(wanted_rounds: int) -> int:
        return int((budget_s / wanted_rounds - pauses_s) / call_s) - 1  # less the settling call

    if calls is None:
        wanted = min(max(math.ceil(TURN_S * systems / call_s), MIN_CALLS), MAX_CALLS)
        enough = max(calls_that_fit(rounds or ENOUGH_ROUNDS), MIN_CALLS)
        most = max(calls_that_fit(rounds or MIN_ROUNDS), 1)
        calls = min(wanted, enough, most)
    if rounds is None:
        rounds = min(max(int(budget_s / (pauses_s + (calls + 1) * call_s)), MIN_ROUNDS), MAX_ROUNDS)
    return Plan(rounds, calls)


def _check(systems: Sequence[System], rounds: int | None, calls_per_round: int | None) -> None:
    names = [system.name for system in systems]
    if not names or len(set(names)) != len(names):
        raise UsageError(
            "cannot tell the systems to measure apart",
            got=", ".join(names) or "no system",
            expected="one system or more, each under its own name",
        )
    if rounds is not None and rounds < MIN_ROUNDS:
        raise UsageError(
            "too few rounds for an interval", got=rounds, expected=f"{MIN_ROUNDS} or more, or none to choose by time"
        )
    if calls_per_round is not None and calls_per_round < 1:
        raise UsageError("too few calls per round", got=calls_per_round, expected="1 or more, or none")


def _warm_up(system: System, warmup_s: float, clock: Callable[[], float]) -> float:
    """Call for `warmup_s`, two times at least; the time of a warm call in seconds, from the later half of the calls.

    By time, not by count: the first 0.3 s of a process ran 1.45x slower on the reference machine.
    """
    started_s = clock()
    calls_s: list[float] = []
    while len(calls_s) < 2 or clock() - started_s < warmup_s:
        call_started_s = clock()
        system.call()
        calls_s.append(clock() - call_started_s)
    return float(np.median(calls_s[len(calls_s) // 2 :]))


@dataclass(frozen=True)
class _Turn:
    """Milliseconds of each call by the host's clock, and by the device's events where there are any."""

    host_ms: list[float]
    device_ms: list[float]


def _turn(system: System, calls: int, clock: Callable[[], float]) -> _Turn:
    """An unrecorded call goes before: after a switch caches and threads belong to another."""
    system.call()
    samples_ms: list[float] = []
    device_ms: list[float] = []
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on whichever system happens to allocate the object that sets it off
    try:
        for _ in range(calls):
            call_started_s = clock()
            system.call()
            samples_ms.append((clock() - call_started_s) * 1e3)
            if system.device_ms is not None:
                device_ms.append(system.device_ms())
    finally:
        if collecting:
            gc.enable()
    return _Turn(samples_ms, device_ms)


def _orders(count: int, seed: int) -> Iterator[list[int]]:
    """Orders in which, over a full cycle, each system follows each other one equally often and takes each place alike.

    Rows of a Williams design (E. J. Williams 1949): 0, 1, n-1, 2, n-2, ... shifted by one for each row. Every row is
    followed by its mirror image, which balances odd counts and cancels a steady drift (A B, B A). `seed` says which
    system gets which number.
    """
    zigzag = [(step + 1) // 2 if step % 2 else -(step // 2) % count for step in range(count)]
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    shift = 0
    while True:
        row = [numbers[(place + shift) % count] for place in zigzag]
        yield row
        yield row[::-1]
        shift += 1
