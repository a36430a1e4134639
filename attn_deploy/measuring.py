"""Latency and memory of candidates beside their peers: one interleaved run for each device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attn_deploy import proving
from attn_deploy.latency import Measurement, System
from attn_deploy.peers import Peer, Place, open_peers
from attn_deploy.progress import Progress
from attn_deploy.proving import Proof
from attn_deploy.receipt import Peer as PeerEntry
from attn_deploy.session import Array
from attn_deploy.target import Precision

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel

EXPORT_PEERS = ("onnxruntime", "eager")
"""Cheap to open: torch.compile and TensorRT's builder take minutes, which `bench` may."""

LATENCY_BUDGET_S = 30.0


@dataclass(frozen=True)
class Conditions:
    """What every call is measured under."""

    feeds: Mapping[str, Array]
    threads: int
    opset: int

    @property
    def batch(self) -> int:
        return next(iter(self.feeds.values())).shape[0]


@dataclass(frozen=True)
class Measured:
    """The runs of one export, one for each device. Times of two runs are never compared."""

    runs: tuple[tuple[Measurement, tuple[str, ...]], ...]
    """(run, names of the peers in it)."""
    conditions: Conditions
    absent: dict[str, str]
    """Peers that could not be measured, with the reason."""

    def of(self, candidate: str) -> Measurement | None:
        return next((run for run, _ in self.runs if candidate in run.samples_ms), None)

    def clearly_faster(self, a: str, b: str) -> bool:
        run = self.of(a)
        return run is not None and b in run.samples_ms and run.clearly_faster(a, b)

    def peer_entries(self, chosen: Sequence[str]) -> tuple[PeerEntry, ...]:
        """Each peer against the first chosen candidate of its run."""
        rows = []
        for run, names in self.runs:
            best = next((c for c in chosen if c in run.samples_ms), None)
            for name in names if best is not None else ():
                found = run.compare(str(best), name)
                latency = run.latency(name, self.conditions.batch, self.conditions.threads)
                rows.append(PeerEntry(name, latency, found.ratio, found.ratio_ci95, found.verdict, best))
        return tuple(rows)


def measure_candidates(
    proofs: Sequence[Proof], captured: CapturedModel, conditions: Conditions, progress: Progress
) -> Measured:
    """Candidates without a fault, those on a CPU and those on a GPU each in a run of their own with their peers. Host
    arrays in and out for everyone: copies count alike."""
    progress.stage("latency")
    runs: list[tuple[Measurement, tuple[str, ...]]] = []
    absent: dict[str, str] = {}
    for on_gpu in (False, True):
        alive = [p for p in proofs if p.fault is None and p.built.target.on_gpu is on_gpu]
        if not alive:
            continue
        with contextlib.ExitStack() as stack:
            opened, missing = open_peers(stack, captured, EXPORT_PEERS, _place(alive, conditions))
            absent |= missing
            peers = [System(peer.name, _call(peer, conditions.feeds)) for peer in opened]
            run = proving.measure_latency(
                alive, peers, conditions.feeds, max_total_s=LATENCY_BUDGET_S, progress=progress.step
            )
        assert run is not None
        runs.append((run, tuple(peer.name for peer in opened)))
    progress.stage("memory")
    for done, proof in enumerate(proofs):
        progress.step(done, len(proofs))
        if proof.fault is None:
            proving.measure_memory(proof, conditions.feeds, conditions.threads)
    return Measured(tuple(runs), conditions, absent)


def _place(alive: Sequence[Proof], conditions: Conditions) -> Place:
    """Peers on a GPU compute in the lowest precision that a candidate there has: theirs is the time to beat."""
    precisions = [p.built.precision for p in alive]
    lowest = next((p for p in (Precision.FP16, Precision.BF16) if p in precisions), precisions[-1])
    return Place(alive[0].built.target, lowest, conditions.threads, conditions.opset)


def _call(peer: Peer, feeds: Mapping[str, Array]) -> Callable[[], object]:
    return lambda: peer.run(feeds)
