"""`make coverage`: every model of the table in turn, each in a process of its own; then COVERAGE.md.

A run that was stopped goes on where it was: records are kept in build/coverage/ and hold as long as the sources and
the installed versions are the same. `python -m attention_coverage NAME...` measures these alone, always anew, and
leaves COVERAGE.md as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import msgspec

from attention_coverage import table
from attention_coverage.measure import Record, measure_apart
from attention_coverage.models import BY_NAME, FOLDER, MODELS, CoverageModel
from attn_deploy import environment

ROOT = FOLDER.parents[1]
RECORDS = ROOT / "build" / "coverage"
SOURCES = ("attn_deploy", "export", "runtimes", "tests/coverage")


def fingerprint() -> str:
    """Of all that a record depends on: code, configs, expectations, versions."""
    digest = hashlib.sha256(repr(sorted(environment.versions().items())).encode())
    files = [p for folder in SOURCES for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".json")]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _kept(path: Path) -> Record | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def _measured(models: list[CoverageModel], folder: Path, threads: int, *, again: bool) -> list[Record]:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for done, model in enumerate(models):
        path = folder / f"{model.name}.json"
        record = None if again else _kept(path)
        if record is None:
            record = measure_apart(model, path, threads=threads)
        says = "passed" if record.passed else "FAILED"
        print(f"{done + 1}/{len(models)} {model.name}: {says}, {sum(record.seconds.values()):.0f} s", file=sys.stderr)
        records.append(record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(prog="attention_coverage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the table; all when left out")
    parser.add_argument("--threads", type=int, default=environment.available_cores())
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BY_NAME]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not in the table; expected {', '.join(BY_NAME)}")
    host = environment.host()
    began = time.perf_counter()
    models = [BY_NAME[name] for name in arguments.names] or list(MODELS)
    folder = RECORDS / fingerprint()
    records = _measured(models, folder, arguments.threads, again=bool(arguments.names))
    if arguments.names:
        print(table.coverage_md(records))
    else:
        table.write(records, ROOT, table.results(records, host, arguments.threads, time.perf_counter() - began))
    return 0 if all(r.passed for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
