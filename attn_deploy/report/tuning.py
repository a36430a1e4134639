"""Tuning, search and plans as rich tables. Only the command line imports this module."""

from __future__ import annotations

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.receipt import Search, Tuning
from attn_deploy.report import words
from attn_deploy.report.frontier import (
    FRONTIER_HEADINGS,
    FRONTIER_NOTE,
    PART_HEADINGS,
    PARTS_NOTE,
    frontier_rows,
    part_rows,
    search_sentence,
)
from attn_deploy.report.levels import LEVELS_NOTE, level_headings, level_rows, tuning_sentence
from attn_deploy.report.sites import name_ranges


def tuning_tables(tuning: Tuning) -> list[RenderableType]:
    """A row for alike parts: the level kept, its gain, and the time at each level; and where it was measured."""
    table = _table()
    table.add_column("parts", overflow="fold")
    table.add_column("level")
    table.add_column("gain")
    for heading in level_headings(tuning):
        table.add_column(f"{heading}\nus", justify="right", no_wrap=True)
    for row in level_rows(tuning):
        table.add_row(*(Text(words.printable(cell)) for cell in (row.label, row.level, row.gain, *row.times)))
    sentence = Text(words.printable(tuning_sentence(tuning)))
    return [table, sentence, Text(LEVELS_NOTE, style="dim")]


def search_tables(search: Search) -> list[RenderableType]:
    """A row for each plan that was tried, the fastest first; then what the parts lose and gain."""
    plans, parts = _table(), _table()
    plans.add_column("")
    for heading in FRONTIER_HEADINGS:
        plans.add_column(heading, justify="right", no_wrap=True)
    plans.add_column("budget", overflow="fold")
    for row in frontier_rows(search):
        style = "bold" if row.chosen else ""
        cells = [Text(cell, style=style) for cell in ("*" if row.chosen else "", *row.cells)]
        plans.add_row(*cells, Text(words.printable(row.verdict), style=style))
    parts.add_column("part", overflow="fold")
    for heading in PART_HEADINGS:
        parts.add_column(heading, justify="right", no_wrap=True)
    for part in part_rows(search.parts):
        parts.add_row(Text(words.printable(part.label)), *map(Text, part.cells))
    sentence = Text(words.printable(search_sentence(search)))
    notes = [Text(note, style="dim") for note in (FRONTIER_NOTE, PARTS_NOTE)]
    return [sentence, Text(), plans, notes[0], Text(), parts, notes[1]]


def plan_tables(plan: PrecisionPlan) -> list[RenderableType]:
    """A row for layers of one scheme and reason; then what holds for the whole model."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in plan.layers:
        groups.setdefault((str(layer.scheme), layer.reason), []).append(layer.layer)
    table = _table()
    for heading in ("scheme", "layers", "why"):
        table.add_column(heading, overflow="fold")
    for (scheme, reason), layers in groups.items():
        names = ", ".join(n if count == 1 else f"{n} ({count})" for n, count in name_ranges(layers))
        table.add_row(scheme, *(Text(words.printable(text)) for text in (names, reason)))
    done = [word for word, is_so in (("equalized", plan.equalized), ("biases corrected", plan.corrected)) if is_so]
    if plan.smoothing:
        strengths = sorted(set(plan.smoothing.values()))
        done.append(f"{len(plan.smoothing)} norms smoothed, strength {', '.join(f'{s:g}' for s in strengths)}")
    return [table, *([Text("; ".join(done), style="dim")] if done else [])]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
