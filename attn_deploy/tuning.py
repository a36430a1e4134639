"""Tuning: every part of a model at every level it has, measured in place, and the faster kept.

    tune(model, feeds, ...) -> Tuned -> levels by unit, and the receipt's Tuning

First each level is profiled where every unit that has it runs at it, in turns, and alike units choose the level than
which no other is clearly faster. Then, in a run of its own and without a profile, the whole model of these choices is
measured against stock and against each uniform level: what is not clearly faster than stock is not kept.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from attn_deploy import environment, runtimes
from attn_deploy.built import Built
from attn_deploy.latency import Comparison, Measurement, System, measure
from attn_deploy.progress import Progress
from attn_deploy.receipt import Tuning, UnitTuning
from attn_deploy.session import Array, TensorSpec
from attn_deploy.target import Precision, Target
from attn_deploy.unit_times import GroupTimes, Unit, group_times

if TYPE_CHECKING:
    from attn_deploy.runtimes.onnxruntime_profile import ProfiledSession

STOCK = "stock"
CHOSEN = "chosen"

SECONDS = 24.0
"""For both runs together: 20 rounds of ViT-Tiny's three levels on two cores."""

RANKING_SHARE = 0.6

MIN_CALL_MS = 0.5
"""Below it there is nothing to win that a call's fixed cost does not hide."""

Levels = Mapping[str, str]
"""Unit -> level; a unit that is left out is stock."""


class Levelled(Protocol):
    """A model that can be lowered with its units at any of their levels, as export/levelled.py makes it."""

    @property
    def groups(self) -> Sequence[Sequence[Unit]]:
        """Alike units together."""

    @property
    def levels(self) -> Sequence[str]:
        """All that some unit has, the plainest first; the first is stock."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def uniform(self, level: str) -> Levels:
        """Every unit at this level, or the next plainer that it has."""

    def save(self, levels: Levels, path: Path) -> tuple[Path, ...]:
        """Lowers the model to files."""


@dataclass(frozen=True)
class Tuned:
    """`levels` is what is kept, of every unit; `uniform` its name where it is a uniform level, from stock to the
    `coarsest`."""

    levels: dict[str, str]
    uniform: str | None
    coarsest: str
    groups: tuple[GroupTimes, ...]
    against_stock: Comparison | None
    threads: int
    batch: int

    def among(self, allowed: Sequence[str]) -> dict[str, str]:
        """The fastest of the allowed levels for each unit, by the same measurement: for INT8, where only sites have a
        level besides stock and run the same kernel on the same shapes."""
        return {unit: group.fastest(allowed) for group in self.groups for unit in group.units}

    def entry(self) -> Tuning:
        """For the receipt."""
        of_model = self.against_stock
        return Tuning(
            cpu=str(environment.host()["cpu"]),
            threads=self.threads,
            batch=self.batch,
            units=tuple(_row(group, self.levels[group.units[0]]) for group in self.groups),
            ratio=None if of_model is None else of_model.ratio,
            ratio_ci95=None if of_model is None else of_model.ratio_ci95,
        )


def _row(group: GroupTimes, level: str) -> UnitTuning:
    found = group.measurement.compare(level, STOCK)
    times_us = {name: round(group.time_us(name), 1) for name in group.levels}
    return UnitTuning(group.units, level, times_us, found.ratio, found.ratio_ci95)


def tune(
    model: Levelled, feeds: Mapping[str, Array], *, threads: int, seconds: float, progress: Progress,
    min_call_ms: float = 0.0,
) -> Tuned | None:  # fmt: skip
    """The levels that are fastest on this host. None for a model without units, or one of which a stock call takes less
    than `min_call_ms`. Needs room in memory for a session of every level."""
    if not model.groups:
        return None
    batch = next(iter(feeds.values())).shape[0]
    with tempfile.TemporaryDirectory() as folder:
        saved = _Saved(model, Path(folder), threads)
        if min_call_ms and _call_ms(saved, feeds) < min_call_ms:
            return None
        progress.stage("tuning: levels")
        groups = _ranked(saved, feeds, seconds * RANKING_SHARE, progress.step)
        levels = {unit: group.fastest() for group in groups for unit in group.units}
        if set(levels.values()) == {STOCK}:
            return Tuned(levels, STOCK, model.levels[-1], groups, None, threads, batch)
        progress.stage("tuning: verdict")
        measurement = _whole_models(saved, levels, feeds, seconds * (1 - RANKING_SHARE), progress.step)
    kept = kept_system(measurement)
    if kept != CHOSEN:
        levels = dict(model.uniform(kept))
    uniform = next((name for name in model.levels if dict(model.uniform(name)) == levels), None)
    against = None if uniform == STOCK else measurement.compare(kept, STOCK)
    return Tuned(levels, uniform, model.levels[-1], groups, against, threads, batch)


NATIVE_SUFFIX, TUNED_SUFFIX = "-native", "-tuned"
"""How the ids of candidates end: every unit at its coarsest level, and each at the level that tuning kept."""

SITES_ONLY = (STOCK, "site")
"""What units can be in INT8."""


def tuned_levels(tuned: Tuned) -> dict[Precision, dict[str, str]]:
    """The levels of the candidates that are no uniform level, which the recipe offers anyway."""
    found = {}
    if tuned.uniform not in (STOCK, tuned.coarsest):
        found[Precision.FP32] = tuned.levels
    sites = tuned.among(SITES_ONLY)
    offered = {unit for group in tuned.groups if "site" in group.levels for unit in group.units}
    if len({sites[unit] for unit in offered}) > 1:
        found[Precision.INT8] = sites
    return found


def is_tuned(candidate: Built, tuned: Tuned) -> bool:
    """Whether the candidate runs at the levels that were kept."""
    if candidate.target is not Target.ONNXRUNTIME_CPU or candidate.precision is not Precision.FP32:
        return False
    suffix = {STOCK: "", tuned.coarsest: NATIVE_SUFFIX}.get(tuned.uniform or "", TUNED_SUFFIX)
    return candidate.id == f"{candidate.target}-{candidate.precision}{suffix}"


def kept_system(measurement: Measurement) -> str:
    """What of a run of whole models (stock, uniform levels, perhaps the chosen mixture) is kept: the mixture, unless a
    uniform level is clearly faster; and stock, unless that is clearly faster than stock."""
    names = list(measurement.samples_ms)
    found = CHOSEN if CHOSEN in names else _fastest(measurement, names)
    better = [name for name in names if name != found and measurement.clearly_faster(name, found)]
    if better:
        found = _fastest(measurement, better)
    return found if found == STOCK or measurement.clearly_faster(found, STOCK) else STOCK


def _fastest(measurement: Measurement, names: Sequence[str]) -> str:
    """Against stock, by the paired rounds."""
    return max(names, key=lambda name: measurement.compare(name, STOCK).ratio)


class _Saved:
    """The lowerings of one model as files, each written when it is first needed."""

    def __init__(self, model: Levelled, folder: Path, threads: int) -> None:
        self.model = model
        self.threads = threads
        self._folder = folder
        self._paths: dict[tuple[tuple[str, str], ...], Path] = {}

    def path(self, levels: Levels) -> Path:
        key = tuple(sorted(levels.items()))
        if key not in self._paths:
            self._paths[key] = self.model.save(levels, self._folder / f"{len(self._paths)}.onnx")[0]
        return self._paths[key]

    def system(self, name: str, levels: Levels, feeds: Mapping[str, Array]) -> tuple[System, Callable[[], None]]:
        """An opened session to measure, and what closes it."""
        session = runtimes.open_session(
            Target.ONNXRUNTIME_CPU, self.path(levels), inputs=self.model.inputs, outputs=self.model.outputs,
            threads=self.threads, library=True,
        )  # fmt: skip
        return System(name, lambda: session.run(feeds)), session.close


def _call_ms(saved: _Saved, feeds: Mapping[str, Array]) -> float:
    system, close = saved.system(STOCK, saved.model.uniform(STOCK), feeds)
    try:
        measurement = measure([system], max_total_s=0.1, rounds=6, calls_per_round=3, warmup_s=0.02, pause_s=0.0)
    finally:
        close()
    return measurement.latency(STOCK, 1, saved.threads).p50_ms


def _ranked(
    saved: _Saved, feeds: Mapping[str, Array], seconds: float, step: Callable[[int, int], None]
) -> tuple[GroupTimes, ...]:
    """Each uniform level profiled, in turns."""
    from attn_deploy.runtimes.onnxruntime_profile import ProfiledSession

    model = saved.model
    with contextlib.ExitStack() as stack:
        sessions = {
            level: stack.enter_context(
                ProfiledSession(saved.path(model.uniform(level)), threads=saved.threads, library=True)
            )
            for level in model.levels
        }
        systems = [System(level, _call(session, feeds)) for level, session in sessions.items()]
        measurement = measure(systems, max_total_s=seconds, progress=step)
        calls = {level: session.finish() for level, session in sessions.items()}
    rounds, per_round = next(iter(measurement.samples_ms.values())).shape
    recorded = {level: _recorded(of_level, rounds, per_round) for level, of_level in calls.items()}
    return tuple(group_times(model.groups, recorded, rounds))


def _call(session: ProfiledSession, feeds: Mapping[str, Array]) -> Callable[[], None]:
    return lambda: session.run(feeds)


def _recorded(calls: Sequence[list[runtimes.RunNode]], rounds: int, per_round: int) -> list[list[runtimes.RunNode]]:
    """Without the warm-up, and without the settling call that `measure` puts before each turn."""
    turns = calls[-rounds * (per_round + 1) :]
    return [call for place, call in enumerate(turns) if place % (per_round + 1)]


def _whole_models(
    saved: _Saved, chosen: Levels, feeds: Mapping[str, Array], seconds: float, step: Callable[[int, int], None]
) -> Measurement:
    """Stock, every uniform level and the chosen levels, in turns and without a profile; what is the same once."""
    systems: dict[tuple[tuple[str, str], ...], tuple[str, Levels]] = {}
    for name, levels in [*((name, saved.model.uniform(name)) for name in saved.model.levels), (CHOSEN, chosen)]:
        systems.setdefault(tuple(sorted(levels.items())), (name, levels))
    with contextlib.ExitStack() as stack:
        opened = []
        for name, levels in systems.values():
            system, close = saved.system(name, levels, feeds)
            stack.callback(close)
            opened.append(system)
        return measure(opened, max_total_s=seconds, progress=step)
