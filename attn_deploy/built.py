"""What building hands to proving: a candidate as files. It stands between the two, which do not import each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from attn_deploy.parity import SiteCase
from attn_deploy.receipt import BlockLoss, Tuning
from attn_deploy.target import Precision, Target


@dataclass(frozen=True)
class Built:
    """A candidate as it was built: its files, and the operators' names that its sites were lowered from."""

    id: str
    target: Target
    precision: Precision
    files: tuple[Path, ...]
    library: bool
    sites: tuple[tuple[str, str], ...]
    """(module, name of the operator's node in the canonical model)."""
    exempt: tuple[str, ...] = ()
    storage: dict[str, float] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    """What the session must be opened with: lowering counts on it."""
    blocks: tuple[BlockLoss, ...] = ()
    tuning: Tuning | None = None
    site_cases: Callable[[], Iterator[SiteCase]] | None = None
