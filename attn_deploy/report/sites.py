"""Rows of a table of sites: each with what runs it, and identical ones drawn together into ranges."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from attn_deploy.receipt import KindCount, SiteEntry, SiteRun

MANY_SITES = 16
"""More rows than this are drawn together."""

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")


@dataclass(frozen=True)
class SiteRow:
    """`module` may be a range that stands for `count` sites; `flops` is of each. `provider` without its long suffix."""

    module: str
    count: int
    kind: str
    operator: str | None
    status: str
    reason: str | None
    source_line: str
    flops: int
    implementation: str | None
    provider: str | None

    @property
    def label(self) -> str:
        return self.module if self.count == 1 else f"{self.module} ({self.count})"


class _OfModule(Protocol):
    @property
    def module(self) -> str: ...


Entry = TypeVar("Entry", bound=_OfModule)


def paired(sites: Sequence[SiteEntry], entries: Iterable[Entry]) -> list[Entry | None]:
    """For each site its entry of the same module. A module with several sites has its entries in their order."""
    waiting: dict[str, collections.deque[Entry]] = collections.defaultdict(collections.deque)
    for entry in entries:
        waiting[entry.module].append(entry)
    return [waiting[s.module].popleft() if s.operator is not None and waiting[s.module] else None for s in sites]


def site_rows(sites: Sequence[SiteEntry], runs: Sequence[SiteRun], *, all_sites: bool = False) -> list[SiteRow]:
    """One row per site; with more than `MANY_SITES` of them, one per range of sites that differ in nothing but the
    numbers of their modules, unless `all_sites`."""
    rows = [_row(site, run) for site, run in zip(sites, paired(sites, runs), strict=True)]
    if all_sites or len(rows) <= MANY_SITES:
        return rows
    groups: dict[SiteRow, list[str]] = {}
    for row in rows:
        groups.setdefault(replace(row, module=""), []).append(row.module)
    return [
        replace(like, module=module, count=count)
        for like, modules in groups.items()
        for module, count in name_ranges(modules)
    ]


def _row(site: SiteEntry, run: SiteRun | None) -> SiteRow:
    return SiteRow(
        module=site.module or "(top level)",
        count=1,
        kind=site.kind,
        operator=site.operator,
        status=site.status,
        reason=site.reason,
        source_line=site.source_line,
        flops=site.flops,
        implementation=run.implementation if run is not None else None,
        provider=run.provider.replace("ExecutionProvider", "") if run is not None else None,
    )


def kind_counts(sites: Sequence[SiteEntry]) -> list[KindCount]:
    """Kind x operator, in order of appearance."""
    counts: dict[tuple[str, str | None], collections.Counter[str]] = {}
    for site in sites:
        counts.setdefault((site.kind, site.operator), collections.Counter())[site.status] += 1
    return [
        KindCount(kind, operator, found["recognized"], found["unproven"], found["skipped"])
        for (kind, operator), found in counts.items()
    ]


def name_ranges(names: Iterable[str]) -> list[tuple[str, int]]:
    """`blocks.0.attn`, `blocks.1.attn` -> (`blocks.0-1.attn`, 2), for names that differ in numbers only.

    A range stands for every name in it: `layers.0-1.blocks.0-1` is given for exactly those four.
    """
    shapes: dict[tuple[str, ...], collections.Counter[tuple[tuple[int, ...], ...]]] = {}
    for name in names:
        parts = _NUMBER.split(name)
        numbers = tuple((int(n),) for n in parts[1::2])
        shapes.setdefault(tuple(parts[::2]), collections.Counter())[numbers] += 1
    return [
        (_spelled(literals, positions), count)
        for literals, found in shapes.items()
        for positions, count in _merged(found, len(literals) - 1).items()
    ]


def _merged(found: dict[tuple[tuple[int, ...], ...], int], places: int) -> dict[tuple[tuple[int, ...], ...], int]:
    """Draws together what differs in one place only, from the last place (the innermost module) to the first."""
    for place in reversed(range(places)):
        alike: dict[tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]], tuple[list[int], int]] = {}
        for positions, count in found.items():
            values, total = alike.get((positions[:place], positions[place + 1 :]), ([], 0))
            alike[positions[:place], positions[place + 1 :]] = ([*values, *positions[place]], total + count)
        found = {(*before, tuple(sorted(values)), *after): count for (before, after), (values, count) in alike.items()}
    return found


def _spelled(literals: Sequence[str], positions: Sequence[Sequence[int]]) -> str:
    spans = [_spans(numbers) for numbers in positions]
    return "".join(text for pair in zip(literals, [*spans, ""], strict=True) for text in pair)


def _spans(numbers: Sequence[int]) -> str:
    """Ascending numbers: 0, 1, 2, 5 -> `0-2,5`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
