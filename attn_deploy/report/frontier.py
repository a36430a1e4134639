"""What a search of precision tried and chose, in rows, sentences and a chart: the same on a terminal and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attn_deploy.receipt import FrontierPoint, PlanPart, Receipt, Search
from attn_deploy.report import words
from attn_deploy.report.chart import nice_ticks
from attn_deploy.report.sites import name_ranges

FRONTIER_HEADINGS = (
    "layers\nin INT8", "SQNR\ndB", "predicted\ndB", "agreement", "accuracy\n%", "p50\nms", "predicted\nms",
)  # fmt: skip
FRONTIER_NOTE = (
    "each row is a plan that was lowered and run whole: SQNR, agreement and accuracy on samples that calibration did "
    "not see; predicted: from its parts alone, as if their noise and their gains added up"
)
PART_HEADINGS = ("layers", "SQNR\ndB", "divergence", "gain\nus", "chosen")
PARTS_NOTE = "SQNR and divergence of the model's output with this part alone in INT8; gain: of one call, by a profile"

WIDTH, HEIGHT = 800, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 24, 16, 42


@dataclass(frozen=True)
class FrontierRow:
    """`verdict`: whether it keeps the budget, or why not; `cells` stand under FRONTIER_HEADINGS."""

    chosen: bool
    cells: tuple[str, ...]
    verdict: str


@dataclass(frozen=True)
class PartRow:
    """Alike parts of one fate: `label` names them as ranges, `cells` stand under PART_HEADINGS."""

    label: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Dot:
    """`role`: chosen, kept or missed. `text` stands beside it, `name` is what it tells when pointed at."""

    x: float
    y: float
    role: str
    text: str
    name: str


@dataclass(frozen=True)
class FrontierChart:
    """Time to the right, signal to noise upwards. Ticks are (place, text)."""

    dots: tuple[Dot, ...]
    path: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    description: str
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def searched_candidates(receipt: Receipt) -> list[tuple[str, Search]]:
    """(candidate, how its plan was found)."""
    return [(c.id, c.search) for c in receipt.candidates if c.search is not None]


def frontier_rows(search: Search) -> list[FrontierRow]:
    """The fastest by prediction first."""
    return [
        FrontierRow(
            point.chosen,
            (
                str(point.layers), words.decibel(point.sqnr_db), _predicted(point), words.share(point.agreement),
                words.ABSENT if point.accuracy is None else f"{point.accuracy:.2f}",
                words.milliseconds(point.measured_ms), words.milliseconds(point.predicted_ms),
            ),
            ", ".join([*(["chosen"] if point.chosen else []), f"misses: {point.fault}" if point.fault else "keeps it"]),
        )
        for point in search.frontier
    ]  # fmt: skip


def _predicted(point: FrontierPoint) -> str:
    return words.decibel(point.predicted_sqnr_db) if point.parts else words.ABSENT


def part_rows(parts: Sequence[PlanPart]) -> list[PartRow]:
    """One for alike parts (of names that differ in numbers alone) of one fate; figures of several are a range."""
    groups: dict[tuple[str, bool], list[PlanPart]] = {}
    for part in parts:
        shape = "".join("#" if c.isdigit() else c for c in part.name)
        groups.setdefault((shape.replace("##", "#"), part.quantized), []).append(part)
    rows = []
    for (_, quantized), alike in groups.items():
        names = ", ".join(n if count == 1 else f"{n} ({count})" for n, count in name_ranges(p.name for p in alike))
        divergences = [p.divergence for p in alike if p.divergence is not None]
        cells = (
            str(sum(p.layers for p in alike)), _span([p.sqnr_db for p in alike], "{:.1f}"),
            _span(divergences, "{:.1g}"), _span([p.gain_us for p in alike], "{:.0f}"), "INT8" if quantized else "FP32",
        )  # fmt: skip
        rows.append(PartRow(names, cells))
    return rows


def _span(values: Sequence[float], form: str) -> str:
    if not values:
        return words.ABSENT
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def search_sentence(search: Search) -> str:
    """What was asked, what was tried, and how it ended."""
    tried = f"{len(search.parts)} parts scored on {search.scored} samples, ranked by {search.ranked_by}; "
    tried += f"{len(search.frontier)} plans verified on {search.verified}"
    chosen = next((p for p in search.frontier if p.chosen), None)
    layers = sum(part.layers for part in search.parts)
    ending = "none keeps the budget; the nearest" if not search.met else "chosen"
    had = "" if chosen is None else f": {ending} has {chosen.layers} of {layers} layers in INT8"
    back = f", after {', '.join(search.reverted)} went back to FP32" if search.reverted else ""
    return f"budget {search.budget}. {tried}{had}{back}. Times of {search.cpu}, {search.threads} threads"


def frontier_chart(search: Search) -> FrontierChart | None:
    """None where no plan was timed."""
    points = [p for p in search.frontier if p.measured_ms is not None]
    if not points:
        return None
    end_ms = 1.08 * max(p.measured_ms or 0.0 for p in points) or 1.0
    end_db = max(1.1 * max((p.sqnr_db for p in points if p.parts), default=1.0), 1.0)  # FP32 itself stands at the edge

    def x(value_ms: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * value_ms / end_ms, 1)

    def y(value_db: float) -> float:
        share = min(max(value_db / end_db, 0.0), 1.0)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)

    dots = tuple(
        Dot(
            x=x(p.measured_ms or 0.0),
            y=y(p.sqnr_db),
            role="chosen" if p.chosen else "missed" if p.fault else "kept",
            text=str(p.layers),
            name=f"{p.layers} layers in INT8: {words.decibel(p.sqnr_db)} dB, {words.milliseconds(p.measured_ms)} ms"
            + (f", agreement {words.share(p.agreement)}" if p.agreement is not None else "")
            + (f", misses {p.fault}" if p.fault else ""),
        )
        for p in points
    )
    return FrontierChart(
        dots=dots,
        path="M" + "L".join(f"{dot.x} {dot.y}" for dot in dots),
        x_ticks=tuple((x(tick), f"{tick:g}") for tick in nice_ticks(end_ms)),
        y_ticks=tuple((y(tick), f"{tick:g}") for tick in nice_ticks(end_db)),
        description="; ".join(dot.name for dot in dots),
    )


def schemes(counts: dict[str, int]) -> str:
    """`48 int8-per-token, 2 float`."""
    return ", ".join(f"{count} {scheme}" for scheme, count in counts.items())
