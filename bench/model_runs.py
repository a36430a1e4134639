"""What the benchmarks of whole models share: bundles of them, what a result depends on, results that a stopped run goes
on from, and systems in turns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import BUILD, RESULTS, ROOT, export

from attn_deploy import environment
from attn_deploy.latency import System, measure
from attn_deploy.runtimes import native

OPSET = 20

Feeds = Mapping[str, np.ndarray]
Runs = Mapping[str, Callable[[Feeds], Mapping[str, np.ndarray]]]


def fingerprint(*more: object) -> str:
    """What a measurement depends on besides the machine: our sources, the library, versions, and what is given."""
    key = hashlib.sha256(f"{more} {sorted(environment.versions().items())}".encode())
    files = sorted(f for folder in ("attn_deploy", "export", "runtimes") for f in (ROOT / folder).rglob("*.py"))
    library = native.library_path()
    for file in files + ([library] if library is not None else []):
        key.update(file.read_bytes())
    return key.hexdigest()[:16]


def bundle_of(name: str, state: str, arguments: Sequence[str]) -> Path:
    """The bundle of these arguments for the CPU, exported anew when anything that it comes from has changed."""
    return export([*arguments, "--target", "onnxruntime-cpu"], BUILD / "models" / state / f"{name}.attn")


@dataclass
class Results:
    """bench/results/STEM.json and the page made of it, written after every model: a stopped run goes on from there."""

    stem: str
    page: str
    command: str
    order: Sequence[str]
    threads: int
    markdown: Callable[[dict[str, Any]], str]
    models: dict[str, Any] = field(init=False)
    result: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.result = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.models = self.result.get("models", {})

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.stem}.json"

    def due(self, name: str, cases: Sequence[str], state: str) -> list[str]:
        """The cases of a model that are not there, or were taken with something else than `state`."""
        kept = self.models.get(name, {})
        return [case for case in cases if kept.get(case, {}).get("state") != state]

    def add(self, name: str, cases: Mapping[str, Any]) -> None:
        self.models[name] = {**self.models.get(name, {}), **cases}
        self.result = {
            "command": self.command,
            "threads": self.threads,
            "host": {k: v for k, v in environment.host().items() if v is not None},
            "versions": environment.versions(),
            "instruction_set": native.status().instruction_set,
            "models": {n: self.models[n] for n in self.order if n in self.models},
        }
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.result, indent=2) + "\n")
        (RESULTS / self.page).write_text(self.text())

    def text(self) -> str:
        return self.markdown(self.result)


def in_turns(
    runs: Runs, feeds: Feeds, *, threads: int, seconds: float, ceiling: Callable[[int], float | None]
) -> tuple[dict[str, Any], list[float | None]]:
    """Each system's times, interleaved in one run, and those of the others over the first one's; then the machine's
    ceiling before and after."""
    ours = next(iter(runs))
    before = ceiling(threads)
    measurement = measure([System(name, lambda run=run: run(feeds)) for name, run in runs.items()], max_total_s=seconds)
    after = ceiling(threads)
    rows = {}
    for name in runs:
        latency = measurement.latency(name, next(iter(feeds.values())).shape[0], threads)
        p10 = float(np.percentile(measurement.samples_ms[name], 10))
        row = {"p10_ms": p10, "p50_ms": latency.p50_ms, "ci95_ms": latency.ci95_ms, "runs": latency.runs}
        if name != ours:
            compared = measurement.compare(ours, name)
            row |= {"ratio": compared.ratio, "ratio_ci95": compared.ratio_ci95, "verdict": compared.verdict}
        rows[name] = row
    return rows, [before, after]


def load_average() -> float:
    return os.getloadavg()[0]
