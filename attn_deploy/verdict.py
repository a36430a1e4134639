"""Is what was built what was asked? The last stage before a bundle is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from attn_deploy.errors import AttnDeployError, NotAsAskedError, ParityError, TooSlowError
from attn_deploy.proving import Proof
from attn_deploy.receipt import Receipt
from attn_deploy.target import Precision


class Asked(Protocol):
    """The part of the export's options that the verdict reads."""

    @property
    def precisions(self) -> Sequence[Precision]: ...
    @property
    def precisions_asked(self) -> bool: ...
    @property
    def keep_best(self) -> bool: ...
    @property
    def max_latency_ms(self) -> float | None: ...


def require_as_asked(options: Asked, receipt: Receipt, proofs: Sequence[Proof]) -> None:
    """What was asked is what was built, or this raises and nothing is written."""
    error = _verdict(options, receipt, proofs)
    if error is not None and not (options.keep_best and isinstance(error, ParityError)):
        error.receipt = receipt  # type: ignore[attr-defined]
        raise error


def _verdict(options: Asked, receipt: Receipt, proofs: Sequence[Proof]) -> AttnDeployError | None:
    for precision in options.precisions:
        tried = [p for p in proofs if p.built.precision is precision]
        if not tried or any(p.fault is None for p in tried):
            continue
        proof = tried[0]
        if proof.asked_fault is not None and options.precisions_asked:
            return NotAsAskedError(
                f"{precision} was asked and is not what was built", where=proof.built.id, got=proof.asked_fault,
                expected="90 % or more",
                next_step="see the exempt layers in the receipt, or leave out this --precision",
            )  # fmt: skip
        if options.precisions_asked or precision is Precision.FP32:
            return ParityError(
                f"the {precision} candidate is not the same model", where=proof.built.id, got=proof.fault,
                next_step="loosen the budget (--min-sqnr, --min-agreement, --max-drop), leave layers out with "
                "--exclude MODULE, or keep the best with --keep-best",
            )  # fmt: skip
    if options.max_latency_ms is not None:
        for target, chosen in receipt.chosen.items():
            latency = next(c.latency for c in receipt.candidates if c.id == chosen)
            if latency is not None and latency.p50_ms > options.max_latency_ms:
                return TooSlowError(
                    f"the fastest candidate for {target} is too slow", where=chosen, got=f"{latency.p50_ms:.2f} ms",
                    expected=f"{options.max_latency_ms:g} ms at most", next_step="more --threads, or another precision",
                )  # fmt: skip
    return None
