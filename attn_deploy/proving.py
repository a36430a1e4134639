"""Proof of candidates: what runs, parity, accuracy, latency and memory, all on the same file and session options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from attn_deploy import runtimes
from attn_deploy.accuracy import Judgement, Run, judge
from attn_deploy.built import Built
from attn_deploy.choice import Budget, share_fault
from attn_deploy.data import Part
from attn_deploy.errors import AttnDeployError, UnavailableError
from attn_deploy.latency import Measurement, System, measure
from attn_deploy.memory import measure_peak
from attn_deploy.parity import (
    FP32_MAX_REL,
    FP32_MIN_SQNR_DB,
    INT8_MIN_SQNR_DB,
    Case,
    Moments,
    SiteCase,
    Tolerance,
    case_row,
    compare,
    parity_fault,
    summarize,
)
from attn_deploy.readback import PROVIDERS, dtype_shares, provider_fault, site_runs
from attn_deploy.receipt import CandidateEntry, CaseParity, Memory, Parity, SiteParity, SiteRun
from attn_deploy.session import Array, Session, TensorSpec
from attn_deploy.target import Precision

BYTES_PER_MB = 1_000_000


@dataclass
class Proof:
    """What is known of a candidate so far. `fault` ends its way: what comes after it is not measured."""

    built: Built
    session: Session | None
    """None for a candidate that its runtime did not open; that is its fault then."""
    fault: str | None = None
    asked_fault: str | None = None
    """Set when the fault is that the result is not what was asked (exit code 4)."""
    sites: tuple[SiteRun, ...] = ()
    dtype_share: dict[str, float] = field(default_factory=dict)
    weighted_dtype_share: dict[str, float] = field(default_factory=dict)
    cases: list[CaseParity] = field(default_factory=list)
    site_parity: list[SiteParity] = field(default_factory=list)
    judgement: Judgement | None = None
    memory: Memory | None = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert self.session is not None, self.fault
        return self.session.run(feeds)


def opened(built: Built, threads: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Proof:
    """A candidate with its session. One that its runtime refuses is no error yet: another lowering may do. Raises
    UnavailableError where the runtime itself is missing."""
    try:
        reason = runtimes.prepare(built.target, built.files[0], library=built.library, options=built.options)
        if reason is not None:
            fault = f"the stock graph would run in its place: {reason}"
            return Proof(built, None, fault=fault, asked_fault=fault)
        return Proof(built, open_candidate(built, threads, inputs, outputs))
    except UnavailableError:
        raise
    except AttnDeployError as error:
        fault = "; ".join([f"it does not open: {error.what}", *(f"{name} {text}" for name, text in error.details())])
        return Proof(built, None, fault=fault, asked_fault=fault)


def open_candidate(built: Built, threads: int, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Session:
    """The session that everything is measured on."""
    return runtimes.open_session(
        built.target,
        built.files[0],
        inputs=inputs,
        outputs=outputs,
        threads=threads,
        library=built.library,
        options=built.options,
    )


def read_back(proof: Proof, feeds: Mapping[str, Array]) -> None:
    """Sites and dtype shares from one profiled call; a precision or provider that is not what was asked is a fault."""
    built = proof.built
    if proof.session is None:
        return
    nodes = runtimes.read_back(built.target, built.files[0], feeds, library=built.library, options=built.options)
    proof.sites = site_runs(built.sites, nodes)
    proof.dtype_share, proof.weighted_dtype_share = dtype_shares(nodes, [root for _, root in built.sites])
    proof.asked_fault = share_fault(built.target, built.precision, proof.weighted_dtype_share) or provider_fault(
        PROVIDERS[built.target], nodes
    )
    proof.fault = proof.fault or proof.asked_fault


def check_parity(
    proof: Proof, cases: Sequence[Case], references: Sequence[Mapping[str, Array]], tolerance: Tolerance,
    *, has_data: bool,
) -> None:  # fmt: skip
    """Made inputs, and each site alone. INT8 ranges fit the data they were calibrated for: stress cases are reported
    and do not judge it, nor do made inputs when there is data to judge by."""
    if proof.session is None:
        return
    exact = not proof.built.precision.quantized
    for case, reference in zip(cases, references, strict=True):
        judged = exact or (case.typical and not has_data)
        proof.cases += compare(case, reference, proof.run(case.feeds), tolerance, judged=judged)
    if proof.built.site_cases is not None:
        for site in proof.built.site_cases():
            proof.site_parity.append(_site_parity(site, proof.built, tolerance))
    proof.fault = proof.fault or parity_fault(_parity(proof), tolerance)


def site_tolerance(built: Built, site: SiteCase, tolerance: Tolerance) -> Tolerance:
    """`tolerance` is the candidate's; in INT8 it is for what computes in INT8, and the user's part of it is for the
    outputs of the model alone, in which a site's noise is a small part."""
    if not built.precision.quantized:
        return tolerance
    if site.arithmetic is Precision.FP32:
        return Tolerance(FP32_MIN_SQNR_DB, FP32_MAX_REL)
    return Tolerance(min(tolerance.min_sqnr_db, INT8_MIN_SQNR_DB), tolerance.max_rel)


LOSS_DB = 3.0
"""How far an INT8 variant may fall behind what its receipt says of the same made inputs: kernels round differently."""


def judge_by_row(proof: Proof, row: CandidateEntry | None) -> None:
    """INT8 that was judged on data is held to what it gave on made inputs when it was proven, as its row of the receipt
    says: its ranges fit the data, not noise, so that a fixed floor would say nothing here."""
    judged = proof.session is not None and proof.built.precision.quantized
    if not judged or row is None or row.parity is None or row.status != "passed":
        return
    recorded = {(c.name, c.output): c.sqnr_db for c in row.parity.cases}
    proof.fault = None
    for number, case in enumerate(proof.cases):
        floor = recorded.get((case.name, case.output), 0.0) - LOSS_DB
        passed = case.sqnr_db >= floor
        proof.cases[number] = replace(case, judged=True, passed=passed)
        if not passed:
            proof.fault = (
                f"output {case.output!r} on {case.name}: {case.sqnr_db:.1f} dB, receipt {floor + LOSS_DB:.1f} dB"
            )


def _site_parity(site: SiteCase, built: Built, of_candidate: Tolerance) -> SiteParity:
    session = runtimes.open_session(
        built.target,
        site.model,
        library=built.library,
        options=runtimes.options_of_parts(built.target, built.options),
    )
    moments = Moments()
    got = next(iter(session.run(site.feeds).values()))
    moments.add(site.expected, got.reshape(site.expected.shape))
    found = moments.fidelity()
    tolerance = site_tolerance(built, site, of_candidate)
    return SiteParity(
        site.module, found.max_abs, found.max_rel, found.cosine, found.sqnr_db, passed=tolerance.holds(found),
        min_sqnr_db=None if tolerance == of_candidate else tolerance.min_sqnr_db,
    )  # fmt: skip


def check_accuracy(
    proofs: Sequence[Proof],
    part: Part,
    batch_size: int,
    reference: Run,
    scores: str | None,
    budget: Budget,
    progress: Callable[[int], None] | None,
) -> None:
    """One pass over the judged samples for all candidates that are still in the race."""
    alive = [p for p in proofs if p.fault is None]
    if not alive:
        return
    runs: dict[str, Run] = {p.built.id: p.run for p in alive}
    judgements = judge(_stream(part, batch_size), reference, runs, scores, progress)
    for proof in alive:
        judgement = proof.judgement = judgements[proof.built.id]
        tolerance = budget.tolerance(proof.built.precision)
        for output, fidelity in judgement.fidelity.items():
            proof.cases.append(
                case_row("data", judgement.samples, output, fidelity, judged=True, passed=tolerance.holds(fidelity))
            )
        proof.fault = parity_fault(_parity(proof), tolerance) or budget.accuracy_fault(
            judgement.agreement, judgement.accuracy
        )


def _stream(part: Part, batch_size: int) -> Iterable[tuple[dict[str, Array], Array | None]]:
    return ((batch.feeds, batch.labels) for batch in part.batches(batch_size))


def _parity(proof: Proof) -> Parity:
    agreement = proof.judgement.agreement if proof.judgement is not None else None
    return summarize(proof.cases, proof.site_parity, agreement)


def measure_latency(
    proofs: Sequence[Proof],
    peers: Sequence[System],
    feeds: Mapping[str, Array],
    *,
    max_total_s: float,
    progress: Callable[[int, int], None] | None,
) -> Measurement | None:
    """Candidates without a fault and the peers, interleaved in one run. None when no candidate is left."""
    alive = [p for p in proofs if p.fault is None]
    if not alive:
        return None
    systems = [System(p.built.id, _call(p, feeds)) for p in alive]
    return measure([*systems, *peers], max_total_s=max_total_s, progress=progress)


def _call(proof: Proof, feeds: Mapping[str, Array]) -> Callable[[], object]:
    return lambda: proof.run(feeds)


def measure_memory(proof: Proof, feeds: Mapping[str, Array], threads: int) -> None:
    """Peak memory of a fresh process that opens the candidate and runs it."""
    payload = {
        "target": str(proof.built.target),
        "model": str(proof.built.files[0]),
        "library": proof.built.library,
        "options": proof.built.options,
        "threads": threads,
        "feeds": {name: [str(a.dtype), list(a.shape)] for name, a in feeds.items()},
    }
    try:
        proof.memory = Memory(round(measure_peak("attn_deploy.run_alone", payload), 1))
    except AttnDeployError:
        proof.memory = None


def entry(proof: Proof, measurement: Measurement | None, batch: int, threads: int) -> CandidateEntry:
    """The candidate's row of the receipt."""
    built = proof.built
    latency = None
    if measurement is not None and built.id in measurement.samples_ms:
        latency = measurement.latency(built.id, batch, threads)
    return CandidateEntry(
        id=built.id,
        target=str(built.target),
        precision=str(built.precision),
        status="failed" if proof.fault else "passed",
        reason=proof.fault,
        sites=proof.sites,
        dtype_share=proof.dtype_share,
        weighted_dtype_share=proof.weighted_dtype_share,
        exempt=built.exempt,
        storage=built.storage,
        storage_mb=round(sum(f.stat().st_size for f in built.files) / BYTES_PER_MB, 3),
        parity=_parity(proof) if proof.cases else None,
        accuracy=proof.judgement.accuracy if proof.judgement is not None else None,
        latency=latency,
        memory=proof.memory,
        blocks=built.blocks,
        tuning=built.tuning,
        schemes={} if built.plan is None else built.plan.counts,
        search=built.search,
    )
