"""Terminal listings of everything but the receipt: inspect, validate, bench, run and doctor."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from attn_deploy import environment
from attn_deploy.benchmarking import Benchmark
from attn_deploy.cli_run import RunResult
from attn_deploy.doctor import Diagnosis
from attn_deploy.inspection import Inspection
from attn_deploy.localizing import Localization
from attn_deploy.manifest import graph_file
from attn_deploy.receipt import Tuning
from attn_deploy.report.levels import tuning_sentence
from attn_deploy.report.terminal import intent_lines, sites_table
from attn_deploy.report.tuning import plan_tables, tuning_tables
from attn_deploy.report.words import decibel, implementations, listed, milliseconds, printable, titled
from attn_deploy.retuning import Retuning
from attn_deploy.session import TensorSpec
from attn_deploy.validation import Validation

MARKS = {True: ("ok", "green"), False: ("missing", "red"), None: ("absent", "yellow")}


def inspection_tables(found: Inspection, *, all_sites: bool = False) -> RenderableType:
    """Inputs, outputs, sites, and for a bundle what each variant runs here; each graph after the other."""
    parts = [_inspection(found, all_sites)]
    for other in found.others:
        parts += [Text(), _inspection(other, all_sites)]
    return Group(*parts)


def _inspection(found: Inspection, all_sites: bool) -> RenderableType:
    chosen = next((v for v in found.variants if v.chosen), None)
    parts: list[RenderableType] = [
        Text(titled(found.graph, found.source), style="bold"),
        Text("inputs:  " + _specs(found.inputs)),
        Text("outputs: " + _specs(found.outputs)),
        *(intent_lines(found.sites, found.intent) if found.sites else ()),
        sites_table(found.sites, chosen.sites if chosen is not None else (), all_sites=all_sites),
    ]
    if found.variants:
        table = _table("variant", "precision", "MB", "INT8 share", "providers (nodes)")
        for variant in found.variants:
            name = variant.id + (" (chosen)" if variant.chosen else "")
            providers = variant.unavailable or _counts(variant.providers)
            share = variant.weighted_dtype_share.get("int8", 0.0)
            table.add_row(name, variant.precision, f"{variant.size_mb:.1f}", f"{share:.1%}", providers)
        parts.append(table)
        parts += [Text(f"{v.id}: {implementations(v.sites)}") for v in found.variants if v.sites]
        parts += [Text(f"{v.id}: {_counts(v.operators)}", style="dim") for v in found.variants if v.operators]
        parts += [Text(_tuned(v.id, v.tuning)) for v in found.variants if v.tuning is not None]
        for variant in found.variants:
            if variant.plan is not None:
                parts += [Text(f"\nprecision plan of {variant.id}", style="bold"), *plan_tables(variant.plan)]
    parts += [Text(f"{map_.file or (map_.module or '(top level)')}: {map_.shows}") for map_ in found.heatmaps]
    return Group(*parts)


def _tuned(variant: str, tuning: Tuning) -> str:
    """Where its levels were measured, and what to do where that was another CPU."""
    elsewhere = tuning.cpu != environment.host()["cpu"]
    advice = "; this is another CPU: attn-deploy tune BUNDLE measures here" if elsewhere else ""
    return printable(f"{variant}: levels {tuning_sentence(tuning)}{advice}")


def retuning_tables(result: Retuning) -> RenderableType:
    """Of each graph: its levels, what was measured, and what is chosen from here on."""
    parts: list[RenderableType] = []
    for name, found in result.graphs.items():
        if found.tuning is None:
            parts.append(Text(titled(name, "no part of the model has another level than stock here")))
        else:
            parts += tuning_tables(found.tuning)
        for row in found.candidates:
            time_ms = milliseconds(row.latency.p50_ms if row.latency is not None else None)
            parts.append(Text(printable(f"{row.id}: p50 {time_ms} ms" + (f", {row.reason}" if row.reason else ""))))
        change = "as before" if found.before == found.chosen else f"before: {found.before or 'nothing'}"
        parts.append(Text(printable(titled(name, f"chosen: {found.chosen} ({change})")), style="bold"))
    return Group(*parts)


def validation_tables(validation: Validation) -> RenderableType:
    """Variants against the reference."""
    table = _table("variant", "status", "SQNR dB", "agreement", "p50 ms")
    for row in validation.candidates:
        colour = "green" if row.status == "passed" else "red"
        agreement = row.parity.top1_agreement if row.parity is not None else None
        table.add_row(
            graph_file(row.graph, row.id),
            Text(row.status, style=colour),
            f"{row.parity.sqnr_db:.1f}" if row.parity is not None else "",
            f"{agreement:.2%}" if agreement is not None else "",
            f"{row.latency.p50_ms:.2f}" if row.latency is not None else "",
        )
    notes = [Text(f"{name}: not run here: {reason}", style="yellow") for name, reason in validation.skipped.items()]
    notes += [Text(f"{name}: was not run before, and has now passed", style="green") for name in validation.promoted]
    return Group(
        Text(f"{validation.bundle}: {validation.files} files are as they were written; against {validation.reference}"),
        table,
        *notes,
        *(localization_table(place) for place in validation.localized),
    )


def localization_table(found: Localization) -> RenderableType:
    """The first block that is out of its tolerance, and others that are not exact, the least margin first."""
    table = _table("", "module\noperators", "dB", "at\nleast", "max abs", "in", "runs as")
    rows = [("FIRST", found.first)] if found.first is not None else []
    rows += [("ok" if row.passed else "out", row) for row in found.worst if decibel(row.sqnr_db) != "exact"]
    for mark, row in rows:
        colour = "" if row.passed else "red"
        module = Text(", ".join([row.module or "(top level)", *row.between]), style=colour)
        table.add_row(
            Text(mark, style=colour), module.append(f"\n{listed(row.operators, 3)}", style="dim"),
            decibel(row.sqnr_db), f"{row.min_sqnr_db:g}", f"{row.max_abs:.2g}", row.arithmetic, listed(row.runs, 2),
        )  # fmt: skip
    counted = f"{found.out_of_tolerance} of {found.blocks} blocks are out of tolerance, the first: "
    variant = graph_file(found.graph, found.variant)
    return Group(
        Text(f"\n{variant}, block by block against {found.reference}, on {found.inputs}"),
        Text((counted if found.first else "") + found.verdict(), style="bold red" if found.first else "green"),
        *((table,) if rows else ()),
    )


def benchmark_tables(result: Benchmark) -> RenderableType:
    """Latency and ratio of every system, batch by batch; the GPU's own time where its events took it."""
    on_gpu = any(row.device is not None for row in result.rows)
    events = ["p50 ms by events"] if on_gpu else []
    table = _table("item", "system", "batch", "threads", "p50 ms", "p90 ms", *events, "compared")
    for row in result.rows:
        compared = ""
        if row.ratio is not None and row.ratio_ci95 is not None:
            low, high = row.ratio_ci95
            compared = f"{row.ratio:.2f}x the time [{low:.2f}, {high:.2f}]"
        latency = row.latency
        device = [_ms(row.device.p50_ms) if row.device is not None else ""] if on_gpu else []
        table.add_row(
            row.item, row.system, str(latency.batch), str(latency.threads), _ms(latency.p50_ms), _ms(latency.p90_ms),
            *device, compared,
        )  # fmt: skip
    note = "Each system is compared with the first of its item; more than 1x: the item is faster."
    warnings = [Text(f"warning: {w}", style="yellow") for w in result.warnings]
    return Group(*warnings, table, Text(note, style="dim"))


def _ms(value: float) -> str:
    """A GPU's calls are often shorter than what two decimals tell apart."""
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def benchmark_csv(result: Benchmark) -> str:
    """The rows as CSV, with a header."""
    stream = io.StringIO()
    names = ("item", "system", "batch", "threads", "runs", "p50_ms", "p90_ms", "p99_ms", "mean_ms", "against", "ratio",
             "ratio_low", "ratio_high", "verdict", "device_p50_ms")  # fmt: skip
    writer = csv.writer(stream)
    writer.writerow(names)
    for row in result.rows:
        low, high = row.ratio_ci95 or ("", "")
        latency = row.latency
        writer.writerow(
            [row.item, row.system, latency.batch, latency.threads, latency.runs, latency.p50_ms, latency.p90_ms,
             latency.p99_ms, latency.mean_ms, row.against or "", row.ratio or "", low, high, row.verdict or "",
             row.device.p50_ms if row.device is not None else ""]
        )  # fmt: skip
    return stream.getvalue()


def run_tables(results: Sequence[RunResult]) -> RenderableType:
    """For each input its classes, or its outputs in short."""
    parts: list[RenderableType] = []
    for result in results:
        parts.append(Text(result.input, style="bold"))
        if result.predictions:
            table = _table("class", "label", "score")
            for prediction in result.predictions:
                table.add_row(str(prediction.index), prediction.label, f"{prediction.score:.1%}")
            parts.append(table)
            continue
        for output in result.outputs:
            values = ", ".join(f"{v:.4g}" for v in output.values)
            parts.append(Text(f"  {output.name}: {output.dtype}{list(output.shape)} [{values}, ...]"))
    return Group(*parts)


def doctor_tables(diagnosis: Diagnosis) -> RenderableType:
    """Checks with what to do about each, then host and versions."""
    table = _table("check", "", "found")
    for check in diagnosis.checks:
        word, colour = MARKS[check.ok]
        found = Text(check.found)
        if check.next_step:
            found.append(f"\nnext: {check.next_step}", style="bold")
        table.add_row(check.name, Text(word, style=colour), found)
    host = ", ".join(f"{k} {v}" for k, v in diagnosis.host.items() if v is not None)
    versions = ", ".join(f"{k} {v}" for k, v in diagnosis.versions.items())
    return Group(table, Text(f"host: {host}", style="dim"), Text(f"versions: {versions}", style="dim"))


def _table(*columns: str) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if number < 2 else "default")
    return table


def _specs(specs: Iterable[TensorSpec]) -> str:
    return "; ".join(spec.describe() for spec in specs)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
