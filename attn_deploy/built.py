"""What building hands to proving: a candidate as files. It stands between the two, which do not import each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attn_deploy.manifest import Variant
from attn_deploy.parity import SiteCase
from attn_deploy.precision_plan import PrecisionPlan
from attn_deploy.receipt import BlockLoss, Search, Tuning
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
    plan: PrecisionPlan | None = None
    plan_file: Path | None = None
    statistics_file: Path | None = None
    """The plan that it was lowered by, and what that needed of calibration, as files."""
    search: Search | None = None
    site_cases: Callable[[], Iterator[SiteCase]] | None = None

    @property
    def held(self) -> tuple[Path, ...]:
        """All files of it."""
        return self.files + tuple(file for file in (self.plan_file, self.statistics_file) if file is not None)

    def variant(self, library: str | None, names: Mapping[Path, str]) -> Variant:
        """As the manifest has it; `names` are those of its files in the bundle."""
        plan, statistics = (None if f is None else names[f] for f in (self.plan_file, self.statistics_file))
        files = tuple(names[file] for file in self.files)
        return Variant(str(self.target), str(self.precision), files, library, self.options, plan, statistics)
