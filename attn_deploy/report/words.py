"""Figures and sentences of a report, the same on a terminal and on a page. ABSENT stands for what was not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from attn_deploy.latency import FASTER, SLOWER
from attn_deploy.parity import EXACT_DB
from attn_deploy.receipt import MAIN, Accuracy, CandidateEntry, DataEntry, Intent, Latency, Peer, Receipt, SiteRun

ABSENT = "-"
FILES_NAMED = 5


def printable(text: str) -> str:
    """Control characters as `?`: a name in a receipt must not move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def decibel(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "exact" if value >= EXACT_DB else f"{value:.1f}"


def share(value: float | None) -> str:
    """0.973 -> `97.3 %`. Only all of it is `100 %`."""
    if value is None:
        return ABSENT
    if value in (0.0, 1.0):
        return f"{value:.0%}".replace("%", " %")
    return f"{min(max(100 * value, 0.1), 99.9):.1f} %"


def milliseconds(value: float | None) -> str:
    """Three significant digits: more than that no run repeats."""
    if value is None:
        return ABSENT
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def megabytes(value: float | None) -> str:
    """Zero is what an entry without files has."""
    if not value:
        return ABSENT
    if value < 0.001:
        return "<0.001"
    return f"{value:.{0 if value >= 1000 else 1 if value >= 1 else 3}f}"


def megaflops(flops: int) -> str:
    """1 MFLOP = 1e6 floating point operations; zero is what a site without an operator has."""
    if not flops:
        return ABSENT
    return f"{flops / 1e6:,.{1 if flops < 1e9 else 0}f}" if flops >= 1e5 else f"{flops / 1e6:.2g}"


def error(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2g}"


def interval(pair: tuple[float, float] | None, figure: Callable[[float], str] = milliseconds) -> str:
    return ABSENT if pair is None else f"[{figure(pair[0])}, {figure(pair[1])}]"


def accuracy(found: Accuracy | None) -> str:
    """`94.50 (95.00)`: the candidate's, and PyTorch's on the same samples."""
    return ABSENT if found is None else f"{found.value:.2f} ({found.reference:.2f})"


def int8_share(candidate: CandidateEntry) -> str:
    """Of the multiply-adds of linear layers and convolutions, as read back; ABSENT when nothing was read back."""
    shares = candidate.weighted_dtype_share
    return share(shares.get("int8", 0.0) if shares else None)


def sqnr(candidate: CandidateEntry) -> str:
    return decibel(candidate.parity.sqnr_db if candidate.parity is not None else None)


def agreement(candidate: CandidateEntry) -> str:
    return share(candidate.parity.top1_agreement if candidate.parity is not None else None)


def peak_memory(candidate: CandidateEntry) -> str:
    return megabytes(candidate.memory.peak_rss_mb if candidate.memory is not None else None)


def status(candidate: CandidateEntry) -> str:
    return candidate.status.replace("_", " ")


def implementations(runs: Sequence[SiteRun]) -> str:
    """`3 of 5 sites run as one kernel: native:Gate 3; inlined 2`; ABSENT when nothing was read back."""
    if not runs:
        return ABSENT
    kernels = sum(run.one_kernel for run in runs)
    kinds = Counter(run.implementation for run in sorted(runs, key=lambda run: not run.one_kernel))
    noun = "site runs" if len(runs) == 1 else "sites run"
    return f"{kernels} of {len(runs)} {noun} as one kernel: " + "; ".join(f"{k} {n}" for k, n in kinds.items())


def intent(found: Intent) -> str:
    """The share of the model's work inside recognized sites, and what it is a share of."""
    return (
        f"{share(found.flops_share)} of the model's {megaflops(found.flops)} MFLOPs and {share(found.bytes_share)} of "
        f"the {megabytes(found.bytes / 1e6)} MB that its operators read and write are inside recognized sites"
    )


INTENT_NOTE = (
    "per sample; FLOPs: 2 x multiply-adds of matrix products, convolutions and sites; bytes: operands and results of "
    "every operator, as if nothing were fused"
)


def differs(peer: Peer) -> bool:
    return peer.verdict == FASTER or (peer.verdict == SLOWER and peer.ratio_ci95[0] > 0)


def tempo(peer: Peer) -> str:
    """`1.51x faster`: the chosen candidate, against the peer."""
    if not differs(peer):
        return "no difference"
    return f"{peer.ratio:.2f}x faster" if peer.verdict == FASTER else f"{1 / peer.ratio:.2f}x slower"


def speed(peer: Peer) -> str:
    """`1.51x faster [1.24, 1.61]`; a slower one is told by the inverse of ratio and interval."""
    low, high = peer.ratio_ci95
    if not differs(peer):
        return f"neither faster nor slower: {peer.ratio:.2f}x [{low:.2f}, {high:.2f}]"
    if peer.verdict == SLOWER:
        low, high = 1 / high, 1 / low
    return f"{tempo(peer)} [{low:.2f}, {high:.2f}]"


def verdict(peer: Peer) -> str:
    """Of the chosen candidate, by its name where the receipt says which one shared the peer's run."""
    return f"{peer.against or 'the chosen candidate'} is {speed(peer)}"


def half_blocks(candidate: CandidateEntry) -> str | None:
    """What half precision costs the blocks alone, by emulation at export; None where nothing was measured."""
    if not candidate.blocks:
        return None
    worst = min((b for b in candidate.blocks if not b.kept), key=lambda b: b.sqnr_db, default=None)
    back = sum(b.kept for b in candidate.blocks)
    stays = "all of them back in FP32" if worst is None else (
        f"the worst alone {decibel(worst.sqnr_db)} dB ({worst.module or worst.value}), {back or 'none'} back in FP32"
    )  # fmt: skip
    return f"{len(candidate.blocks)} blocks by emulated rounding, {stays}"


RATIO_NOTE = (
    "A ratio is the peer's time over the chosen candidate's, the median over rounds in which both took a turn, with "
    "its 95 % interval: it holds where the machine's speed drifts, and so differs from the quotient of two p50."
)


def chosen_candidates(receipt: Receipt) -> list[tuple[str, CandidateEntry]]:
    """(target, candidate), in the order of choice; the peers are compared with the first."""
    by_id = {c.id: c for c in receipt.candidates}
    return [(target, by_id[chosen]) for target, chosen in receipt.chosen.items() if chosen in by_id]


def titled(graph: str, title: str) -> str:
    """A heading, with the graph that it is about where there are several."""
    return title if graph == MAIN else f"{graph}: {title}"


def chosen_line(receipt: Receipt) -> str:
    if receipt.graphs:
        return "; ".join(titled(graph, chosen_line(own)) for graph, own in receipt.by_graph().items())
    if receipt.chosen:
        return ", ".join(f"{chosen} for {target}" for target, chosen in receipt.chosen.items())
    states = {c.status for c in receipt.candidates}
    if not states:
        return "nothing: no candidate was built"
    if states == {"not_run"}:
        return "nothing: no candidate could be run here"
    return "nothing: no candidate passed"


def latencies(receipt: Receipt) -> list[Latency]:
    return [c.latency for c in receipt.candidates if c.latency is not None] + [peer.latency for peer in receipt.peers]


def threads(receipt: Receipt) -> str:
    found = sorted({latency.threads for latency in latencies(receipt)})
    return " and ".join(map(str, found)) if found else "not measured"


def created(receipt: Receipt) -> str:
    return receipt.created.replace("T", " ").replace("+00:00", " UTC")


def host_line(receipt: Receipt) -> str:
    """CPU, cores, instruction sets, memory and system, as far as they are known."""
    host = {key: value for key, value in receipt.host.items() if value not in (None, "")}
    parts = [str(host.get("cpu", "unknown CPU"))]
    cores, machine = host.get("logical_cores"), host.get("machine_cores")
    if cores is not None:
        parts.append(f"{cores} cores" if machine in (None, cores) else f"{cores} of {machine} cores")
    memory_mb = host.get("memory_total_mb")
    if isinstance(memory_mb, int | float):
        parts.append(f"{memory_mb / 1000:.0f} GB")
    parts += [str(host[key]) for key in ("instruction_sets", "os") if key in host]
    return ", ".join(parts)


def data_sentences(data: DataEntry, named: int = FILES_NAMED) -> list[str]:
    """What calibrated, what judged, and which files could not be read."""
    if data.path is None:
        return ["no data was given: parity was judged on made inputs, accuracy not at all"]
    labels = "labelled" if data.labelled else "without labels"
    sentences = [
        f"{data.path} ({labels}, seed {data.seed})",
        f"{data.calibration} samples calibrated, {data.judgement} judged",
    ]
    if data.unreadable:
        noun = "file" if len(data.unreadable) == 1 else "files"
        sentences.append(f"{len(data.unreadable)} unreadable {noun} passed over: {listed(data.unreadable, named)}")
    return sentences


def listed(names: Sequence[str], most: int) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", and {rest} more" if rest > 0 else "")
