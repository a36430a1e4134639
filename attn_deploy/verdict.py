"""Is what was built what was asked? The last stage before a bundle is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from attn_deploy.errors import AttnDeployError, NotAsAskedError, ParityError, TooSlowError
from attn_deploy.proving import Proof
from attn_deploy.readback import PROVIDERS
from attn_deploy.receipt import Receipt, Search, SiteEntry, SiteRun
from attn_deploy.report.sites import paired
from attn_deploy.target import Precision

All = Literal["all"]


class Asked(Protocol):
    """The part of the export's options that the verdict reads."""

    @property
    def precisions_asked(self) -> bool: ...
    @property
    def keep_best(self) -> bool: ...
    @property
    def max_latency_ms(self) -> float | None: ...
    @property
    def require_fused(self) -> int | All | None: ...


Locate = Callable[[Proof], str]
"""Where a candidate that failed parity went wrong first."""


def require_fused(options: Asked, sites: Sequence[SiteEntry], proofs: Sequence[Proof]) -> None:
    """Candidates with fewer sites that run as one kernel than were asked get a fault, and so are not chosen."""
    for proof in proofs:
        proof.fault = proof.fault or fusion_fault(options.require_fused, sites, proof.sites)


def fusion_fault(required: int | All | None, sites: Sequence[SiteEntry], runs: Sequence[SiteRun]) -> str | None:
    """Why a candidate has too few sites that run as one kernel, with the list of those that do not; or None."""
    attention = [s for s in sites if s.kind != "softmax"]  # a softmax over classes is no attention
    kernels = sum(run.one_kernel for run in runs)
    enough = kernels == len(attention) > 0 if required == "all" else required is None or kernels >= required
    if enough:
        return None
    others = [
        f"{site.module or '(top level)'}: {_what_runs(site, run)}"
        for site, run in zip(attention, paired(attention, runs), strict=True)
        if run is None or not run.one_kernel
    ]
    return f"{kernels} of {len(attention)} sites run as one kernel; not so " + ("; ".join(others) or "any")


def _what_runs(site: SiteEntry, run: SiteRun | None) -> str:
    if run is None:
        return f"skipped, {site.reason}"
    count = f" ({len(run.nodes)} nodes)" if len(run.nodes) > 1 else ""
    return f"{site.operator} {run.implementation}{count}"


def require_as_asked(options: Asked, receipt: Receipt, proofs: Sequence[Proof], locate: Locate) -> None:
    """What was asked is what was built, or this raises and nothing is written."""
    error = _verdict(options, receipt, proofs, locate)
    if error is not None and not (options.keep_best and isinstance(error, ParityError)):
        error.receipt = receipt  # type: ignore[attr-defined]
        raise error


def _verdict(
    options: Asked, receipt: Receipt, proofs: Sequence[Proof], locate: Locate
) -> AttnDeployError | None:  # fmt: skip
    unfused = {p.built.id for p in proofs if fusion_fault(options.require_fused, receipt.sites, p.sites) is not None}
    for target, precision in dict.fromkeys((p.built.target, p.built.precision) for p in proofs):
        tried = [p for p in proofs if p.built.target is target and p.built.precision is precision]
        if any(p.fault is None for p in tried):
            continue
        fused = [p for p in tried if p.built.id not in unfused]
        if not fused and options.precisions_asked:
            return _not_fused(options, receipt, tried)
        if not fused:
            continue
        proof = fused[0]
        promised = options.precisions_asked or precision is Precision.FP32
        if proof.asked_fault is not None and promised:
            return NotAsAskedError(
                f"{precision} on {target} was asked and is not what was built", where=proof.built.id,
                got=proof.asked_fault,
                expected=f"90 % or more in {str(precision).upper()}, and every node on {PROVIDERS[target]}",
                next_step="see the exempt layers in the receipt, or leave out this precision or target; --precision "
                "auto promises no share",
            )  # fmt: skip
        search = proof.built.search
        if promised and search is not None and not search.met:
            return _no_plan(proof, search)
        if promised:
            return ParityError(
                f"the {precision} candidate is not the same model", got=proof.fault,
                where=proof.built.id if options.keep_best else f"{proof.built.id}, {locate(proof)}",
                next_step="loosen the budget (--min-sqnr, --min-agreement, --max-drop), leave layers out with "
                "--exclude MODULE, or keep the best with --keep-best",
            )  # fmt: skip
    without = [p for p in proofs if p.built.target not in receipt.chosen and p.built.id in unfused]
    if without:
        return _not_fused(options, receipt, without)
    if options.max_latency_ms is not None:
        for name, chosen in receipt.chosen.items():
            latency = next(c.latency for c in receipt.candidates if c.id == chosen)
            if latency is not None and latency.p50_ms > options.max_latency_ms:
                return TooSlowError(
                    f"the fastest candidate for {name} is too slow", where=chosen, got=f"{latency.p50_ms:.2f} ms",
                    expected=f"{options.max_latency_ms:g} ms at most", next_step="more --threads, or another precision",
                )  # fmt: skip
    return None


def _no_plan(proof: Proof, search: Search) -> ParityError:
    """No plan of a search keeps the budget: about the nearest, with its figures."""
    nearest = next(point for point in search.frontier if point.chosen)
    layers = sum(part.layers for part in search.parts)
    agreement = "" if nearest.agreement is None else f", agreement {nearest.agreement:.4f}"
    return ParityError(
        "no plan with a layer in INT8 keeps the budget", where=proof.built.id,
        got=f"the nearest has {nearest.layers} of {layers} layers in INT8: {nearest.sqnr_db:.1f} dB{agreement} on "
        f"{search.verified} samples; {nearest.fault or proof.fault}",
        expected=search.budget,
        next_step="loosen the budget (--min-sqnr, --min-agreement, --max-drop), or keep the nearest with --keep-best",
    )  # fmt: skip


def _not_fused(options: Asked, receipt: Receipt, proofs: Sequence[Proof]) -> NotAsAskedError:
    """About the candidate with the most sites that run as one kernel."""
    nearest = max(proofs, key=lambda proof: sum(run.one_kernel for run in proof.sites))
    return NotAsAskedError(
        "fewer attention sites run as one kernel than was asked", where=nearest.built.id,
        got=fusion_fault(options.require_fused, receipt.sites, nearest.sites),
        expected=f"--require-fused {options.require_fused}",
        next_step="ask for as many as there are kernels for (attn-deploy doctor lists the native ones; what is "
        "`inlined` runs as stock operators), or leave out --require-fused",
    )  # fmt: skip
