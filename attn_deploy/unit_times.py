"""What each part of a model takes inside the whole of it, from profiled calls of its lowerings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np

from attn_deploy.latency import tail_percent
from attn_deploy.levels import is_int8
from attn_deploy.readback import is_of
from attn_deploy.session import Array


class Unit(Protocol):
    """A part of a model that can run at several levels. `levels`: the plainest first. `nodes`: names in the canonical
    model; what runs of them at any level has a name that starts with one."""

    @property
    def name(self) -> str: ...
    @property
    def levels(self) -> tuple[str, ...]: ...
    @property
    def nodes(self) -> tuple[str, ...]: ...


class Timed(Protocol):
    """A node that ran, as attn_deploy.runtimes.RunNode gives it."""

    @property
    def name(self) -> str: ...
    @property
    def op_type(self) -> str: ...
    @property
    def time_us(self) -> float: ...


Calls = Sequence[Sequence[Timed]]
"""The nodes of each call, both in the order of the run."""

TO_PLAIN, TO_BLOCKED = "ReorderOutput", "ReorderInput"
"""ONNX Runtime's nodes between the blocked layout of convolutions and the plain one. What is not blocked needs the
first before it and the second behind it, under names of their own."""


QUARTILE = 0.25
"""Of a unit's calls the time that is quoted. A call that another process took part of the CPU from is longer, never
shorter, and a unit is short enough for most of its calls to be left in peace, which a whole model's are not."""

RESAMPLES = 500

TIE = 0.02
"""By how much of its time a level may be slower than the fastest and still count as equally fast."""


@dataclass(frozen=True)
class GroupTimes:
    """Alike units, measured together. `samples_us`: float64[rounds, calls, units] by level; row r of every level is
    from the same round."""

    units: tuple[str, ...]
    samples_us: Mapping[str, Array]

    @property
    def levels(self) -> tuple[str, ...]:
        """The plainest first."""
        return tuple(self.samples_us)

    def fastest(self, levels: Sequence[str] | None = None) -> str:
        """The plainest of the levels (default: all) that takes hardly longer than the fastest. Whether the model of
        these choices really gains is for a run of whole models to say: many small gains are clear only there."""
        offered = [level for level in self.levels if levels is None or level in levels]
        best = min(self.time_us(level) for level in offered)
        return next(level for level in offered if self.time_us(level) <= best * (1 + TIE))

    def fastest_int8(self) -> str:
        """Of the levels in INT8, or of all where the units have none of these."""
        int8 = [level for level in self.levels if is_int8(level)]
        return self.fastest(int8 or None)

    def fastest_floating(self) -> str:
        return self.fastest([level for level in self.levels if not is_int8(level)])

    def time_us(self, level: str) -> float:
        """Of one unit."""
        return float(_times(self.samples_us[level])) / len(self.units)

    def gain(self, level: str, over: str) -> tuple[float, tuple[float, float]]:
        """The time at level `over` divided by that at `level`, with its bootstrap 95 % interval: rounds are drawn, the
        same of both."""
        ratio = self.time_us(over) / self.time_us(level)
        if level == over:
            return ratio, (ratio, ratio)
        rounds = self.samples_us[level].shape[0]
        picks = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
        ratios = [_times(self.samples_us[over][rows]) / _times(self.samples_us[level][rows]) for rows in picks]
        tail = tail_percent(rounds)
        low, high = np.percentile(ratios, [tail, 100.0 - tail])
        return ratio, (float(low), float(high))


def _times(samples_us: Array) -> np.float64:
    """Of all units together, each by its lower quartile over calls."""
    calls = samples_us.reshape(-1, samples_us.shape[-1])
    place = int(QUARTILE * (len(calls) - 1))
    return np.partition(calls, place, axis=0)[place].sum()


def group_times(groups: Sequence[Sequence[Unit]], calls: Mapping[str, Calls], rounds: int) -> list[GroupTimes]:
    """`groups` of alike units; `calls` by level, of a model in which every unit that has the level runs at it: as many
    calls in each of the rounds. What recording costs is taken off, by the cheapest node there is."""
    recording_us = min(_MOST_RECORDING_US, *(_cheapest_us(of_level) for of_level in calls.values()))
    units = [unit for group in groups for unit in group]
    times = {level: _unit_times(units, of_level, recording_us) for level, of_level in calls.items()}
    found, place = [], 0
    for group in groups:
        columns = slice(place, place + len(group))
        levels = (level for level in group[0].levels if level in calls)
        samples_us = {level: times[level][:, columns].reshape(rounds, -1, len(group)) for level in levels}
        found.append(GroupTimes(tuple(unit.name for unit in group), samples_us))
        place += len(group)
    return found


_MOST_RECORDING_US = 10.0
"""Of a node, on a loaded machine (5 us; ONNX Runtime 1.32): a model may have no node that does next to nothing."""

_LEAST_US = 0.1
"""A unit of which nothing is left to run still has a time, so that ratios exist."""


def _unit_times(units: Sequence[Unit], calls: Calls, recording_us: float) -> Array:
    """Microseconds [calls, units]."""
    times = np.full((len(calls), len(units)), _LEAST_US)
    owners: dict[tuple[str, ...], list[int | None]] = {}
    for row, nodes in zip(times, calls, strict=True):
        names = tuple(node.name for node in nodes)
        if names not in owners:
            owners[names] = unit_of_each(units, nodes)
        for node, owner in zip(nodes, owners[names], strict=True):
            if owner is not None:
                row[owner] += max(node.time_us - recording_us, 0.0)
    return times


def unit_of_each(units: Sequence[Unit], nodes: Sequence[Timed]) -> list[int | None]:
    """The number of the unit that each node belongs to, or None. A change of layout belongs to the unit that is in the
    plain one."""
    roots = {root: number for number, unit in enumerate(units) for root in unit.nodes}
    found = [_owner(node.name, roots) for node in nodes]
    for place in range(len(nodes) - 2, -1, -1):
        if nodes[place].op_type == TO_PLAIN:
            found[place] = found[place + 1]
    for place in range(1, len(nodes)):
        if nodes[place].op_type == TO_BLOCKED:
            found[place] = found[place - 1]
    return found


def _owner(name: str, roots: Mapping[str, int]) -> int | None:
    """Of the longest root that the name comes from."""
    own = [root for root in _beginnings(name) if root in roots and is_of(name, root)]
    return roots[max(own, key=len)] if own else None


def _beginnings(name: str) -> list[str]:
    return [name, *(name[:end] for end, letter in enumerate(name) if letter in "/_")]


def _cheapest_us(calls: Calls) -> float:
    """The median over calls of the node that takes the least; of reshapes and the like, which do next to nothing, it is
    what recording costs."""
    by_name: dict[str, list[float]] = {}
    for nodes in calls:
        for node in nodes:
            by_name.setdefault(node.name, []).append(node.time_us)
    return min((median(times) for times in by_name.values()), default=0.0)
