"""Where the bars of the latency chart stand, in the units of its SVG view box."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attn_deploy.receipt import Latency, Receipt
from attn_deploy.report import words

WIDTH = 800
LABEL_WIDTH, VALUE_WIDTH = 240, 195
"""Left of the bars their names, right of them their figures."""

TOP, ROW_HEIGHT, AXIS_HEIGHT = 8, 34, 28
BAR_HEIGHT = 16
LABEL_CHARACTERS = 30
"""What fits into LABEL_WIDTH at the 13 px of the style sheet."""

HEADROOM = 1.25
"""The axis ends here at most, over the longest bar: one wide interval must not shrink all bars to nothing."""

TICKS = 6


@dataclass(frozen=True)
class Bar:
    """`role`: chosen, candidate or peer. `clipped`: the interval goes on beyond the end of the axis."""

    name: str
    label: str
    role: str
    value: str
    center_y: float
    x: float
    width: float
    low_x: float
    high_x: float
    clipped: bool

    @property
    def top_y(self) -> float:
        return self.center_y - BAR_HEIGHT / 2


@dataclass(frozen=True)
class Chart:
    width: float
    height: float
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    """(x, text)."""
    axis_y: float
    bar_height: float
    value_x: float
    description: str


def latency_chart(receipt: Receipt) -> Chart | None:
    """p50 of every candidate and peer with its 95 % interval; None when nothing was measured."""
    rows = _rows(receipt)
    if not rows:
        return None
    longest_ms = max(latency.p50_ms for _, _, latency in rows)
    end_ms = min(max(max(latency.ci95_ms[1], latency.p50_ms) for _, _, latency in rows), HEADROOM * longest_ms)
    end_ms = end_ms or 1.0
    plot_width = WIDTH - LABEL_WIDTH - VALUE_WIDTH

    def x(value_ms: float) -> float:
        return round(LABEL_WIDTH + plot_width * min(max(value_ms / end_ms, 0.0), 1.0), 1)

    bars = tuple(
        Bar(
            name=name,
            label=name if len(name) <= LABEL_CHARACTERS else name[: LABEL_CHARACTERS - 1] + "\N{HORIZONTAL ELLIPSIS}",
            role=role,
            value=f"{words.milliseconds(latency.p50_ms)} ms {words.interval(latency.ci95_ms)}",
            center_y=TOP + ROW_HEIGHT * (index + 0.5),
            x=x(0.0),
            width=max(round(x(latency.p50_ms) - x(0.0), 1), 1.0),
            low_x=x(latency.ci95_ms[0]),
            high_x=x(latency.ci95_ms[1]),
            clipped=latency.ci95_ms[1] > end_ms,
        )
        for index, (name, role, latency) in enumerate(rows)
    )
    axis_y = TOP + ROW_HEIGHT * len(bars)
    return Chart(
        width=WIDTH,
        height=axis_y + AXIS_HEIGHT,
        bars=bars,
        ticks=tuple((x(value), f"{value:g}") for value in nice_ticks(end_ms)),
        axis_y=axis_y,
        bar_height=BAR_HEIGHT,
        value_x=WIDTH - VALUE_WIDTH + 12,
        description="; ".join(f"{bar.name}: {bar.value}" for bar in bars),
    )


def _rows(receipt: Receipt) -> list[tuple[str, str, Latency]]:
    chosen = set(receipt.chosen.values())
    rows = [
        (c.id, "chosen" if c.id in chosen else "candidate", c.latency)
        for c in receipt.candidates
        if c.latency is not None
    ]
    return rows + [(peer.name, "peer", peer.latency) for peer in receipt.peers]


def nice_ticks(end: float) -> list[float]:
    """0 and the multiples of a step of 1, 2 or 5 times a power of ten, up to `end`; TICKS steps at most."""
    rough = end / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
    return [round(index * step, 12) for index in range(int(end / step + 1e-9) + 1)]
