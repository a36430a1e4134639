"""Records -> COVERAGE.md, for people, and bench/results/coverage.json, for programs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from attention_coverage.measure import BATCHES, Record
from attn_deploy import environment
from attn_deploy.export.rewrite.apply import SITE_MIN_SQNR_DB
from attn_deploy.parity import FP32_MAX_REL, FP32_MIN_SQNR_DB

COMMAND = "make coverage"

HEAD = f"""# Coverage

Made by `{COMMAND}`; the figures with host, versions and every site are in `bench/results/coverage.json`. Weights are
the project's own initializer's, under which every attention matters (`export/initializer.py`).

- **attention**: what recognition found and rewrote, of what is expected. The expectation is checked in
  (`tests/coverage/expected.json`) and comes from each model's own module tree; kinds and module paths must agree.
  Each was compared with the nodes it stands for in PyTorch at export, {SITE_MIN_SQNR_DB:g} dB or more.
- **skipped**: left as PyTorch wrote it, with the reason.
- **site**: the worst site, its operator in ONNX Runtime against PyTorch on the same inputs; 200 dB: identical.
- **output**: the worst output of `canonical.onnx` in ONNX Runtime without our library and of `portable.onnx` in ONNX
  Runtime and OpenVINO, against eager PyTorch, batches {" and ".join(map(str, BATCHES))}. It must reach
  {FP32_MIN_SQNR_DB:g} dB and {FP32_MAX_REL:g} of the range.
- **native**: the same of what runs on the CPU with our native library: every kernel for its site alone, with the linear
  layers around it, in one block, and in ONNX Runtime's blocked layout; how many of these the model has stands behind.
- **unproven**: sites whose corruption on purpose would not show in the model's output.
- **seconds**: capture, recognition with rewriting and proof of every site, ONNX.
- **memory**: peak of the whole, checks included.

| model | parameters | attention | skipped | site | output | native | unproven | seconds | memory |
|---|--:|---|---|--:|--:|--:|--:|--:|--:|
"""


def coverage_md(records: Sequence[Record]) -> str:
    passed = sum(r.passed for r in records)
    wrong = [_complaint(r) for r in records if not r.passed]
    verdict = f"\n{passed} of {len(records)} models pass.\n"
    return HEAD + "".join(_row(r) for r in records) + verdict + "".join(wrong)


def _row(record: Record) -> str:
    seconds = record.seconds
    stages = (
        seconds.get("capture", 0.0),
        seconds.get("recognition", 0.0) + seconds.get("rewriting", 0.0),
        seconds.get("onnx", 0.0),
    )
    cells = (
        f"`{record.source}`",
        f"{record.parameters / 1e6:.1f} M",
        _attention(record) or "none",
        "; ".join(f"{n} {kind}: {reason}" for (kind, reason), n in _skips(record).items()),
        _worst_db([s.sqnr_db for s in record.sites]),
        _worst_db([o.sqnr_db for o in record.outputs if not o.native]),
        _native(record),
        str(len(record.unproven) or ""),
        " + ".join(f"{s:.1f}" for s in stages),
        f"{record.peak_mb / 1000:.1f} GB",
    )
    return f"| {' | '.join(cells)} |\n"


def _attention(record: Record) -> str:
    rows = [c for c in record.counts if c.found or c.expected]
    return ", ".join(
        f"{c.found} {c.kind}" if c.found == c.expected else f"**{c.found} of {c.expected}** {c.kind}" for c in rows
    )


def _skips(record: Record) -> Counter[tuple[str, str]]:
    return Counter((kind, reason) for kind, _, reason in record.skipped)


def _worst_db(values: Sequence[float]) -> str:
    return f"{min(values):.0f} dB" if values else ""


def _native(record: Record) -> str:
    found = [o.sqnr_db for o in record.outputs if o.native]
    return f"{_worst_db(found)} ({len(found)})" if found else "none"


def _complaint(record: Record) -> str:
    """What is wrong with a model, in full."""
    lines = [] if record.error is None else [record.error.replace("\n", " ")]
    lines += record.differences
    lines += [f"{module}: unproven" for module in record.unproven]
    lines += [f"{s.module}: {s.sqnr_db:.0f} dB" for s in record.sites if s.sqnr_db < FP32_MIN_SQNR_DB]
    lines += [
        f"{o.file}.onnx in {o.engine}: {o.sqnr_db:.0f} dB, {o.max_rel:.1g} of the range"
        for o in record.outputs
        if not o.passed
    ]
    return f"\n**{record.name}**\n" + "".join(f"- {line}\n" for line in lines)


def results(records: Sequence[Record], host: environment.HostFacts, threads: int, took_s: float) -> dict[str, Any]:
    return {
        "command": COMMAND,
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "took_s": round(took_s, 1),
        "threads": threads,
        "quiet": environment.quiet_note(host),
        "host": host,
        "versions": environment.versions(),
        "passed": sum(r.passed for r in records),
        "models": [msgspec.to_builtins(r) for r in records],
    }


def write(records: Sequence[Record], root: Path, found: dict[str, Any]) -> None:
    (root / "COVERAGE.md").write_text(coverage_md(records))
    folder = root / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coverage.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
