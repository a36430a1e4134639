"""Tuning as rich tables, for the receipt and for `attn-deploy tune`. Only the command line imports this module."""

from __future__ import annotations

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attn_deploy.receipt import Tuning
from attn_deploy.report import words
from attn_deploy.report.levels import LEVELS_NOTE, level_headings, level_rows, tuning_sentence


def tuning_tables(tuning: Tuning) -> list[RenderableType]:
    """A row for alike parts: the level kept, its gain, and the time at each level; and where it was measured."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("parts", overflow="fold")
    table.add_column("level")
    table.add_column("gain")
    for heading in level_headings(tuning):
        table.add_column(f"{heading}\nus", justify="right", no_wrap=True)
    for row in level_rows(tuning):
        table.add_row(*(Text(words.printable(cell)) for cell in (row.label, row.level, row.gain, *row.times)))
    sentence = Text(words.printable(tuning_sentence(tuning)))
    return [table, sentence, Text(LEVELS_NOTE, style="dim")]
