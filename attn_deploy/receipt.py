"""receipt.json: what was found, what was built, what really runs, and the proof. Other programs rely on it."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

SCHEMA_VERSION = 1

MAIN = "main"
"""The graph of a bundle that has only one."""


class SiteEntry(msgspec.Struct, frozen=True):
    """One attention of the source. `flops` and `bytes` are per sample: 2 x multiply-adds, operands and result."""

    kind: str
    module: str
    source_line: str
    operator: str | None
    status: str
    """recognized | skipped | unproven"""
    reason: str | None
    flops: int
    bytes: int
    node: str | None = None
    """The operator's node in canonical.onnx: the root of every name that it is lowered to."""
    graph: str = MAIN


class SiteRun(msgspec.Struct, frozen=True):
    """What runs one site in one opened session: read back, not assumed."""

    module: str
    implementation: str
    provider: str
    nodes: tuple[str, ...]

    @property
    def one_kernel(self) -> bool:
        """Whether a single node of the session is the whole site."""
        return len(self.nodes) == 1 and self.implementation.startswith(("native:", "ort:", "trt:"))


class KindCount(msgspec.Struct, frozen=True):
    """How many sites of one kind became one operator (None: those that were skipped)."""

    kind: str
    operator: str | None
    recognized: int
    unproven: int
    skipped: int


class Intent(msgspec.Struct, frozen=True):
    """What the export set out to do for attention. Per sample, as export/work.py counts: `flops` is 2 x multiply-adds
    of matrix products, convolutions and our operators; `bytes` what all operators read and write. `site_` is what of
    it is inside recognized sites."""

    kinds: tuple[KindCount, ...] = ()
    flops: int = 0
    bytes: int = 0
    site_flops: int = 0
    site_bytes: int = 0
    flops_share: float = 0.0
    bytes_share: float = 0.0


class Fidelity(msgspec.Struct, frozen=True):
    """Distance of one set of outputs to its reference. `max_rel` is max_abs over the reference's largest magnitude."""

    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float


class SiteParity(msgspec.Struct, frozen=True):
    """Of one site alone. `min_sqnr_db`: what it is held to where that is not the candidate's tolerance, as attention in
    FP32 between INT8 layers."""

    module: str
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    passed: bool
    min_sqnr_db: float | None = None


class CaseParity(msgspec.Struct, frozen=True):
    """Parity on one kind of input. `judged` says whether the verdict depends on it."""

    name: str
    inputs: int
    output: str
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    judged: bool
    passed: bool


class Parity(msgspec.Struct, frozen=True):
    """`max_abs`, `max_rel`, `cosine`, `sqnr_db`: worst of the judged cases. `top1_agreement`: on the judged data."""

    inputs: int
    max_abs: float
    max_rel: float
    cosine: float
    sqnr_db: float
    top1_agreement: float | None
    cases: tuple[CaseParity, ...]
    sites: tuple[SiteParity, ...]


class Accuracy(msgspec.Struct, frozen=True):
    """`value` and `reference` in percent; `reference` is PyTorch's on the same samples."""

    metric: str
    value: float
    reference: float
    samples: int


class Latency(msgspec.Struct, frozen=True):
    batch: int
    threads: int
    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    ci95_ms: tuple[float, float]
    """Bootstrap interval of the median."""


class Memory(msgspec.Struct, frozen=True):
    peak_rss_mb: float


class BlockLoss(msgspec.Struct, frozen=True):
    """One block of a half graph on the reference's values, its roundings emulated on the CPU at export. `kept`: it went
    back to FP32; `sqnr_db` is what it had before, `reason` why."""

    module: str
    value: str
    sqnr_db: float
    kept: bool = False
    reason: str = ""


class UnitTuning(msgspec.Struct, frozen=True):
    """One kind of the parts that can run at several levels, from ONNX Runtime's own operators (`stock`) to one kernel
    for a whole block. `units` are alike, so they were measured together and run alike: at `level`. `times_us` is the
    time of one of them by level inside the whole model, the lower quartile over calls; `gain` the ratio of stock's to
    the kept level's, with its interval over rounds."""

    units: tuple[str, ...]
    level: str
    times_us: dict[str, float]
    gain: float
    gain_ci95: tuple[float, float]


class Tuning(msgspec.Struct, frozen=True):
    """Where and how the levels of a candidate were chosen. `ratio` is stock's time over that of the levels kept, of the
    whole model in a run of its own after the choice; None where stock itself was kept."""

    cpu: str
    threads: int
    batch: int
    units: tuple[UnitTuning, ...]
    ratio: float | None = None
    ratio_ci95: tuple[float, float] | None = None


class PlanPart(msgspec.Struct, frozen=True):
    """A part of the model that search put into INT8 alone: `layers` of its weighted layers. `sqnr_db` and `divergence`
    (Kullback-Leibler, nats, of the class scores; None without such) are the whole model's then, against FP32 on samples
    that calibrate. `gain_us`: what its INT8 form saves inside the whole model on this host, for one call."""

    name: str
    layers: int
    sqnr_db: float
    divergence: float | None
    gain_us: float
    quantized: bool
    """Whether the chosen plan has it in INT8."""


class FrontierPoint(msgspec.Struct, frozen=True):
    """A plan that search tried whole. `predicted_` follows from its parts alone; the rest was taken on samples that
    calibration did not see, the time in turns with all other points."""

    parts: int
    layers: int
    """Weighted layers in INT8."""
    predicted_sqnr_db: float
    sqnr_db: float
    agreement: float | None
    accuracy: float | None
    """Percent, where there are labels."""
    predicted_ms: float
    measured_ms: float | None
    fault: str | None
    """Why it misses the budget."""
    chosen: bool = False


class Search(msgspec.Struct, frozen=True):
    """How a plan was found: the parts by what they cost and gain, and what the plans made of them measured. `met`:
    whether one of them keeps the budget; else the nearest is chosen."""

    cpu: str
    threads: int
    """Where and how gains and times were taken."""
    budget: str
    ranked_by: str
    """What of the parts was added up against the budget: noise, or divergence."""
    scored: int
    verified: int
    """Samples that scored the parts, and that verified plans."""
    parts: tuple[PlanPart, ...]
    frontier: tuple[FrontierPoint, ...]
    reverted: tuple[str, ...] = ()
    """Parts that went back to floating point after the knapsack had taken them."""
    met: bool = True


class CandidateEntry(msgspec.Struct, frozen=True):
    """One candidate. `id` names it within its graph: every graph has candidates of the same ids."""

    id: str
    target: str
    precision: str
    status: str
    """passed | failed | not_run"""
    reason: str | None
    sites: tuple[SiteRun, ...] = ()
    dtype_share: dict[str, float] = {}
    """Share of all multiply-adds by compute type in the opened session."""
    weighted_dtype_share: dict[str, float] = {}
    """The same over linear layers and convolutions only: what `int8` is judged by."""
    exempt: tuple[str, ...] = ()
    """Linear layers and convolutions left in floating point on purpose."""
    storage: dict[str, float] = {}
    """Megabytes of weights by stored type."""
    storage_mb: float = 0.0
    parity: Parity | None = None
    accuracy: Accuracy | None = None
    latency: Latency | None = None
    memory: Memory | None = None
    blocks: tuple[BlockLoss, ...] = ()
    """What half precision costs each block; of targets on a GPU."""
    tuning: Tuning | None = None
    """Of a candidate whose levels were chosen by measuring."""
    schemes: dict[str, int] = {}
    """Weighted layers by their scheme in the precision plan; without a plan empty."""
    search: Search | None = None
    """Of a candidate whose plan was searched."""
    graph: str = MAIN


class DataEntry(msgspec.Struct, frozen=True):
    """Which samples calibrated and which judged; `unreadable` are the files that were passed over.

    The `asked` numbers and the seed make the same split again.
    """

    path: str | None = None
    seed: int = 0
    split: str = "none"
    calibration_asked: int = 0
    judgement_asked: int = 0
    calibration: int = 0
    judgement: int = 0
    labelled: bool = False
    unreadable: tuple[str, ...] = ()


class Peer(msgspec.Struct, frozen=True):
    """A peer measured in the same interleaved run. `ratio` = the peer's time over the chosen candidate's."""

    name: str
    latency: Latency
    ratio: float
    ratio_ci95: tuple[float, float]
    verdict: str
    """faster | slower | no difference: of the chosen candidate, against this peer."""
    against: str | None = None
    """The chosen candidate that shared its run."""
    graph: str = MAIN


class GraphChoice(msgspec.Struct, frozen=True):
    """What a receipt of several graphs says of one of them, besides its rows."""

    chosen: dict[str, str]
    intent: Intent | None = None


class Receipt(msgspec.Struct, frozen=True):
    """Of several graphs, the rows of all stand together and name theirs; `graphs` has what there is once for each, and
    `chosen` and `intent` are the first graph's. Of one graph, `graphs` is empty."""

    schema_version: int
    source: str
    weights: str
    created: str
    command: str
    host: dict[str, str | int | float | None]
    versions: dict[str, str]
    data: DataEntry
    sites: tuple[SiteEntry, ...]
    candidates: tuple[CandidateEntry, ...]
    peers: tuple[Peer, ...]
    chosen: dict[str, str]
    warnings: tuple[str, ...] = ()
    intent: Intent | None = None
    graphs: dict[str, GraphChoice] = {}

    def by_graph(self) -> dict[str, Receipt]:
        """A receipt for each graph, as if the bundle held no other."""
        if not self.graphs:
            return {MAIN: self}
        return {
            name: msgspec.structs.replace(
                self,
                sites=tuple(s for s in self.sites if s.graph == name),
                candidates=tuple(c for c in self.candidates if c.graph == name),
                peers=tuple(p for p in self.peers if p.graph == name),
                chosen=found.chosen,
                intent=found.intent,
                graphs={},
            )
            for name, found in self.graphs.items()
        }


def merged(receipts: Mapping[str, Receipt]) -> Receipt:
    """One receipt of a bundle's graphs, by name in their order: the inverse of `by_graph`."""
    if list(receipts) == [MAIN]:
        return receipts[MAIN]
    first, graphs = next(iter(receipts.values())), receipts.items()
    replace = msgspec.structs.replace
    return replace(
        first,
        sites=tuple(replace(s, graph=name) for name, receipt in graphs for s in receipt.sites),
        candidates=tuple(replace(c, graph=name) for name, receipt in graphs for c in receipt.candidates),
        peers=tuple(replace(p, graph=name) for name, receipt in graphs for p in receipt.peers),
        warnings=tuple(dict.fromkeys(w for receipt in receipts.values() for w in receipt.warnings)),
        graphs={name: GraphChoice(receipt.chosen, receipt.intent) for name, receipt in graphs},
    )
