"""`attn-deploy cache`: artifacts that belong to this host, as TensorRT engines. Losing them costs time only."""

from __future__ import annotations

import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attn_deploy.cli_output import print_json
from attn_deploy.memory import BYTES_PER_MB
from attn_deploy.runtimes.device_cache import DeviceCache, Entry

cache = typer.Typer(help="Show or remove what was made for this host alone.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]


@cache.command("list")
def list_entries(json: Json = False) -> None:
    """Show what is kept, the last used first."""
    kept = DeviceCache()
    entries = kept.entries()
    if json:
        print_json({"folder": str(kept.folder), "limit_bytes": kept.limit_bytes, "entries": entries})
        return
    console = Console()
    if entries:
        console.print(_table(entries))
    total_mb = sum(e.size for e in entries) / BYTES_PER_MB
    limit_mb = kept.limit_bytes / BYTES_PER_MB
    counted = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
    console.print(f"{counted}, {total_mb:.1f} of at most {limit_mb:.0f} MB in {kept.folder}", soft_wrap=True)


@cache.command()
def clear(json: Json = False) -> None:
    """Remove everything; it is made again when it is needed."""
    kept = DeviceCache()
    freed = kept.clear()
    if json:
        print_json({"folder": str(kept.folder), "freed_bytes": freed})
        return
    Console().print(f"Freed {freed / BYTES_PER_MB:.1f} MB in {kept.folder}", soft_wrap=True)


def _table(entries: list[Entry]) -> Table:
    table = Table("kind", "depends on", "MB", "last used")
    for entry in entries:
        depends = ", ".join(f"{name} {_short(value)}" for name, value in sorted(entry.key.items()))
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(sep=" ", timespec="minutes")
        table.add_row(entry.kind, depends, f"{entry.size / BYTES_PER_MB:.1f}", used)
    return table


def _short(value: str) -> str:
    """Hashes are told apart by their beginning."""
    return value[:12] + "..." if len(value) > 40 else value
