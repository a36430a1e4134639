"""What tuning measured and kept, in rows and a sentence: the same on a terminal and on a page."""

from __future__ import annotations

from dataclasses import dataclass

from attn_deploy.levels import is_int8
from attn_deploy.receipt import Receipt, Tuning
from attn_deploy.report import words
from attn_deploy.report.sites import name_ranges

STOCK = "stock"


@dataclass(frozen=True)
class LevelRow:
    """Alike parts: `label` names them as ranges, `times` stand under `level_headings`."""

    label: str
    level: str
    gain: str
    times: tuple[str, ...]


def tuned_candidates(receipt: Receipt) -> list[tuple[str, Tuning]]:
    """(candidate, what was measured for it)."""
    return [(c.id, c.tuning) for c in receipt.candidates if c.tuning is not None]


def level_headings(tuning: Tuning) -> list[str]:
    """The levels that some part has, from stock to the coarsest: no part has them in another order."""
    longest = max(tuning.units, key=lambda unit: len(unit.times_us), default=None)
    if longest is None:
        return []
    found = list(longest.times_us)
    for unit in tuning.units:
        before = 0
        for level in unit.times_us:
            if level in found:
                before = found.index(level) + 1
            else:
                found.insert(before, level)
    return found


def level_rows(tuning: Tuning) -> list[LevelRow]:
    """Microseconds of one part at each level, and the gain of the one that was kept."""
    headings = level_headings(tuning)
    rows = []
    for unit in tuning.units:
        label = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in name_ranges(unit.units))
        gain = words.ABSENT if unit.level == STOCK else f"{unit.gain:.2f}x {_interval(unit.gain_ci95)}"
        times = tuple(f"{unit.times_us[h]:.0f}" if h in unit.times_us else words.ABSENT for h in headings)
        rows.append(LevelRow(label, unit.level, gain, times))
    return rows


def tuning_sentence(tuning: Tuning) -> str:
    """Where it was measured, and the whole model's verdict."""
    place = f"measured on {tuning.cpu} with {tuning.threads} threads, batch {tuning.batch}"
    if any(is_int8(unit.level) for unit in tuning.units):
        return f"{place}: for each part the fastest of its levels in INT8"
    if tuning.ratio is None or tuning.ratio_ci95 is None:
        return f"{place}: stock is kept, than which nothing is clearly faster"
    return f"{place}: {tuning.ratio:.2f}x {_interval(tuning.ratio_ci95)} over stock, the whole model in a second run"


LEVELS_NOTE = (
    "us: one part inside the whole model, the lower quartile over calls. stock: ONNX Runtime's operators; site: our "
    "kernel for the attention alone; linear: its linear layers too, each with what stands around it; block: all in one "
    "kernel; -int8: with weights and activations of linear layers in 8 bits"
)


def _interval(pair: tuple[float, float]) -> str:
    return words.interval(pair, lambda value: f"{value:.2f}")
