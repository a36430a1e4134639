"""Tuning: every part of a model at every level it has, measured in place, and the faster kept.

    tune(model, feeds, ...) -> Tuned -> levels by unit, and the receipt's Tuning

First each level is profiled where every unit that has it runs at it, in turns, and alike units take the plainest of
their fastest levels. Then, in a run of its own and without a profile, the whole model of these choices is measured
against stock and against each uniform level: where one of them is clearly faster, that is kept instead. What is kept
is a candidate like others: a third run, with their peers, chooses it only if it is clearly faster than stock.

A model may have levels in INT8 beside those in floating point: they are profiled in the same run, so that times of both
precisions compare, and each part gets the fastest of either. Which mixture is faster as a whole is for the candidates'
own run to tell.
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
from attn_deploy.errors import UnavailableError
from attn_deploy.latency import Comparison, Measurement, System, measure
from attn_deploy.levels import floating, is_int8
from attn_deploy.memory import BYTES_PER_MB
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

COPIES = 2
"""Of its weights in a session: the model's, and those packed for the kernels."""

INT8_SIZE = 0.25
"""Of a session in INT8, by that of one in FP32."""

MEMORY_SHARE = 0.5

Levels = Mapping[str, str]
"""Unit -> level; a unit that is left out is stock."""


class Levelled(Protocol):
    """A model that can be lowered with its units at any of their levels, as export/levelled.py makes it."""

    @property
    def groups(self) -> Sequence[Sequence[Unit]]:
        """Alike units together."""

    @property
    def levels(self) -> Sequence[str]:
        """All that some unit has, the plainest first; the first is stock. Those in INT8 follow those in FP32."""

    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[TensorSpec]: ...

    def uniform(self, level: str) -> dict[str, str]:
        """Every unit at this level, or the next plainer that it has."""

    def save(self, levels: Levels, path: Path) -> tuple[Path, ...]:
        """Lowers the model to files."""


@dataclass(frozen=True)
class Tuned:
    """`levels` is what is kept, of every unit; `uniform` its name where it is a uniform level, from stock to the
    `coarsest`. Both are of FP32; `int8` are the fastest of the levels in INT8, of units that have some, beside the
    fastest of all others."""

    levels: dict[str, str]
    uniform: str | None
    coarsest: str
    groups: tuple[GroupTimes, ...]
    against_stock: Comparison | None
    threads: int
    batch: int

    @property
    def int8(self) -> dict[str, str]:
        return {unit: group.fastest_int8() for group in self.groups for unit in group.units}

    def entry(self, precision: Precision = Precision.FP32) -> Tuning:
        """For the receipt: what is kept of FP32 with the times of its levels, or of INT8 with those of all."""
        if precision.quantized:
            rows = [_row(group, group.fastest_int8(), group.levels) for group in self.groups]
            of_model = None
        else:
            of_model = self.against_stock
            rows = [_row(group, self.levels[group.units[0]], _floating(group.levels)) for group in self.groups]
        return Tuning(
            cpu=str(environment.host()["cpu"]),
            threads=self.threads,
            batch=self.batch,
            units=tuple(rows),
            ratio=None if of_model is None else of_model.ratio,
            ratio_ci95=None if of_model is None else of_model.ratio_ci95,
        )


def _floating(levels: Sequence[str]) -> list[str]:
    return [level for level in levels if not is_int8(level)]


def _row(group: GroupTimes, level: str, levels: Sequence[str]) -> UnitTuning:
    gain, (low, high) = group.gain(level, STOCK)
    times_us = {name: round(group.time_us(name), 1) for name in levels}
    return UnitTuning(group.units, level, times_us, round(gain, 4), (round(low, 4), round(high, 4)))


def tune(
    model: Levelled, feeds: Mapping[str, Array], *, threads: int, seconds: float, progress: Progress,
    min_call_ms: float = 0.0, verdict: bool = True,
) -> Tuned | None:  # fmt: skip
    """The levels that are fastest on this host. None for a model without units, or one of which a stock call takes less
    than `min_call_ms`. `verdict` False: without the second run, of whole models in FP32. Raises UnavailableError where
    memory has no room for a session of every level at once."""
    if not model.groups:
        return None
    batch = next(iter(feeds.values())).shape[0]
    with tempfile.TemporaryDirectory() as folder:
        saved = _Saved(model, Path(folder), threads)
        _check_memory(saved)
        if min_call_ms and _call_ms(saved, feeds) < min_call_ms:
            return None
        progress.stage("tuning: levels")
        groups = _ranked(saved, feeds, seconds * RANKING_SHARE, progress.step)
        levels = {unit: group.fastest_floating() for group in groups for unit in group.units}
        systems = {name: model.uniform(name) for name in _floating(model.levels)}
        chosen = next((name for name, uniform in systems.items() if uniform == levels), CHOSEN)
        systems |= {chosen: levels}
        kept, against = chosen, None
        if chosen != STOCK and verdict:
            progress.stage("tuning: verdict")
            measurement = _whole_models(saved, systems, feeds, seconds * (1 - RANKING_SHARE), progress.step)
            kept = kept_system(measurement, chosen)
            against = measurement.compare(kept, STOCK) if kept != STOCK else None
    uniform_name = kept if kept in model.levels else None
    return Tuned(systems[kept], uniform_name, _floating(model.levels)[-1], groups, against, threads, batch)


NATIVE_SUFFIX, TUNED_SUFFIX = "-native", "-tuned"
"""How the ids of candidates end: every unit at its coarsest level, and each at the level that tuning kept."""


def tuned_levels(tuned: Tuned) -> dict[Precision, dict[str, str]]:
    """The levels of each unit, by precision: what the recipe offers candidates by. A precision has its own levels, so
    their names are without it."""
    return {
        Precision.FP32: tuned.levels,
        Precision.INT8: {unit: floating(level) for unit, level in tuned.int8.items()},
    }


def is_tuned(candidate: Built, tuned: Tuned) -> bool:
    """Whether the candidate runs at the levels that were kept."""
    if candidate.target is not Target.ONNXRUNTIME_CPU:
        return False
    if candidate.precision is Precision.FP32:
        suffix = {STOCK: "", tuned.coarsest: NATIVE_SUFFIX}.get(tuned.uniform or "", TUNED_SUFFIX)
    elif candidate.precision is Precision.INT8 and any(is_int8(level) for level in tuned.int8.values()):
        coarsest = all(group.fastest_int8() == group.levels[-1] for group in tuned.groups)
        suffix = NATIVE_SUFFIX if coarsest else TUNED_SUFFIX
    else:
        return False
    return candidate.id == f"{candidate.target}-{candidate.precision}{suffix}"


def kept_system(measurement: Measurement, chosen: str) -> str:
    """What of a run of whole models is kept: the chosen one, unless others (stock, a uniform level) are clearly faster;
    of those the one that gains most."""
    others = [name for name in measurement.samples_ms if name != chosen and measurement.clearly_faster(name, chosen)]
    return max(others, key=lambda name: measurement.compare(name, chosen).ratio, default=chosen)


class _Saved:
    """The lowerings of one model as files, each written when it is first needed."""

    def __init__(self, model: Levelled, folder: Path, threads: int) -> None:
        self.model = model
        self.threads = threads
        self._folder = folder
        self._files: dict[tuple[tuple[str, str], ...], tuple[Path, ...]] = {}

    def files(self, levels: Levels) -> tuple[Path, ...]:
        """The model first."""
        key = tuple(sorted(levels.items()))
        if key not in self._files:
            self._files[key] = self.model.save(levels, self._folder / f"{len(self._files)}.onnx")
        return self._files[key]

    def system(self, name: str, levels: Levels, feeds: Mapping[str, Array]) -> tuple[System, Callable[[], None]]:
        """An opened session to measure, and what closes it."""
        session = runtimes.open_session(
            Target.ONNXRUNTIME_CPU, self.files(levels)[0], inputs=self.model.inputs, outputs=self.model.outputs,
            threads=self.threads, library=True,
        )  # fmt: skip
        return System(name, lambda: session.run(feeds)), session.close


def _check_memory(saved: _Saved) -> None:
    model_mb = sum(f.stat().st_size for f in saved.files(saved.model.uniform(STOCK))) / BYTES_PER_MB
    sizes = [INT8_SIZE if is_int8(level) else 1.0 for level in saved.model.levels]
    needed_mb = COPIES * model_mb * (sum(sizes) + 1)
    total_mb = environment.host()["memory_total_mb"]
    if isinstance(total_mb, int) and needed_mb > MEMORY_SHARE * total_mb:
        raise UnavailableError(
            "there is not enough memory to tune", got=f"{total_mb} MB in all",
            expected=f"{needed_mb / MEMORY_SHARE:.0f} MB for sessions of every level beside each other",
            next_step="tune on a host with more memory",
        )  # fmt: skip


def _call_ms(saved: _Saved, feeds: Mapping[str, Array]) -> float:
    """Of the quickest call of some."""
    system, close = saved.system(STOCK, saved.model.uniform(STOCK), feeds)
    try:
        measurement = measure([system], max_total_s=0.1, rounds=6, calls_per_round=3, warmup_s=0.02, pause_s=0.0)
    finally:
        close()
    return float(measurement.samples_ms[STOCK].min())


def _ranked(
    saved: _Saved, feeds: Mapping[str, Array], seconds: float, step: Callable[[int, int], None]
) -> tuple[GroupTimes, ...]:
    """Each uniform level profiled, in turns."""
    from attn_deploy.runtimes.onnxruntime_profile import ProfiledSession

    model = saved.model
    with contextlib.ExitStack() as stack:
        sessions = {
            level: stack.enter_context(
                ProfiledSession(saved.files(model.uniform(level))[0], threads=saved.threads, library=True)
            )
            for level in model.levels
        }
        systems = [System(level, _call(session, feeds)) for level, session in sessions.items()]
        measurement = measure(systems, max_total_s=seconds, progress=step)
        calls = {level: session.finish() for level, session in sessions.items()}
    rounds, per_round = next(iter(measurement.samples_ms.values())).shape
    times = {level: recorded(of_level, rounds, per_round) for level, of_level in calls.items()}
    return tuple(group_times(model.groups, times, rounds))


def _call(session: ProfiledSession, feeds: Mapping[str, Array]) -> Callable[[], None]:
    return lambda: session.run(feeds)


def recorded(calls: Sequence[list[runtimes.RunNode]], rounds: int, per_round: int) -> list[list[runtimes.RunNode]]:
    """Without the warm-up, and without the settling call that `measure` puts before each turn."""
    turns = calls[-rounds * (per_round + 1) :]
    return [call for place, call in enumerate(turns) if place % (per_round + 1)]


def _whole_models(
    saved: _Saved, systems: Mapping[str, Levels], feeds: Mapping[str, Array], seconds: float,
    step: Callable[[int, int], None],
) -> Measurement:  # fmt: skip
    """In turns, and without a profile."""
    with contextlib.ExitStack() as stack:
        opened = []
        for name, levels in systems.items():
            system, close = saved.system(name, levels, feeds)
            stack.callback(close)
            opened.append(system)
        return measure(opened, max_total_s=seconds, progress=step)
