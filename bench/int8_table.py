"""bench/results/INT8.md out of what int8_models.py measured."""

from __future__ import annotations

from typing import Any

from int8_cases import CASES, Goals
from tables import against, share_of_ceiling, table, taken

OURS, FP32 = "attn-deploy INT8", "attn-deploy FP32"
PEERS = ("OpenVINO INT8", "ONNX Runtime INT8")
"""By NNCF, and by quantize_static; in the order of int8_peers.TOOLS."""


def markdown(result: dict[str, Any]) -> str:
    """Empty without a result."""
    if not result:
        return ""
    host, models, versions = result["host"], result["models"], result["versions"]
    batch1 = {name: model["batch1"] for name, model in models.items()}
    head = (
        f"Written by `make bench` (`{result['command']}`). Batch 1, {result['threads']} threads for everyone, all "
        "systems of a model in turns in one process. Times are medians; a ratio is the other's time over ours in the "
        "same round, median over rounds with its 95 % bootstrap interval: above 1 ours is faster. Everyone calibrated "
        "on the same samples and was judged against eager PyTorch on the same others."
    )
    where = (
        f"{host['cpu']}, {host['logical_cores']} cores, {result['instruction_set']}; ONNX Runtime "
        f"{versions.get('onnxruntime')}, OpenVINO {versions.get('openvino')}, NNCF {versions.get('nncf')}, PyTorch "
        f"{versions.get('torch')}; taken {taken(models)}."
    )
    parts = [
        "# INT8 on the CPU\n", f"{head}\n", f"{where}\n", "## Against the goals\n", _goals(batch1),
        "## What each INT8 keeps\n", _fidelity(batch1), "## Times\n", _times(batch1),
    ]  # fmt: skip
    return "\n".join(parts)


def _goals(cases: dict[str, Any]) -> str:
    openvino, onnxruntime = PEERS
    rows = []
    for name, case in cases.items():
        goals, systems = CASES[name].goals, case["systems"]
        ours = systems[OURS]
        stretch = against(systems[openvino]["ratio"], goals.stretch) if goals.stretch and openvino in systems else ""
        rows.append(
            [name, _kept(ours, goals), f"{ours['p50_ms']:.2f}", _ratio(systems, FP32, goals.over_fp32),
             _ratio(systems, openvino, goals.over_openvino), stretch, _ratio(systems, onnxruntime, None),
             _share(case, goals)]
        )  # fmt: skip
    head = ["model", "fidelity", "ours, ms", "over our FP32", f"over {openvino}", "stretch", f"over {onnxruntime}",
            "share of the VNNI ceiling"]  # fmt: skip
    return table(head, rows) + "\nBold: the goal, behind it in brackets, is met.\n"


def _kept(row: dict[str, Any], goals: Goals) -> str:
    """SQNR, and of trained weights agreement and the points of top-1 lost."""
    parts = [against(row["sqnr_db"], goals.sqnr_db, 1) + " dB"]
    if "agreement" in row:
        goal = None if goals.agreement is None else 100 * goals.agreement
        parts.append("agreement " + against(100 * row["agreement"], goal, 1) + " %")
    if "drop" in row:
        met = goals.max_drop is not None and round(row["drop"], 6) <= goals.max_drop
        text = f"{row['drop']:.2f}"
        limit = "" if goals.max_drop is None else f" ({goals.max_drop:.2f})"
        parts.append(f"top-1 drop {f'**{text}**' if met else text}{limit}")
    return ", ".join(parts)


def _ratio(systems: dict[str, Any], other: str, goal: float | None) -> str:
    if other not in systems:
        return "–"
    low, high = systems[other]["ratio_ci95"]
    return f"{against(systems[other]['ratio'], goal)}, {low:.2f}–{high:.2f}"


def _share(case: dict[str, Any], goals: Goals) -> str:
    text = share_of_ceiling(case["flops"], case["systems"][OURS]["p50_ms"], case["ceiling_gops"], "GOP/s")
    return f"{text} (goal {goals.ceiling_share:.0%})" if text and goals.ceiling_share else text


def _fidelity(cases: dict[str, Any]) -> str:
    shown = (OURS, *PEERS)
    rows = []
    for name, case in cases.items():
        cells = [_kept(case["systems"][s], Goals()) if s in case["systems"] else "–" for s in shown]
        rows.append([name, case["weights"], f"{case['judged']} {case['samples']}", str(case["calibrated"]), *cells])
    return table(["model", "weights", "judged on", "calibrated on", *shown], rows) + _absent(cases)


def _times(cases: dict[str, Any]) -> str:
    shown = (OURS, FP32, *PEERS)
    rows = []
    for name, case in cases.items():
        systems = case["systems"]
        times = [f"{systems[s]['p50_ms']:.2f} ms" if s in systems else "–" for s in shown]
        rows.append([name, *times, ", ".join(case["variants"].values())])
    return table(["model", *shown, "variants of ours"], rows)


def _absent(cases: dict[str, Any]) -> str:
    notes = [f"{name}, {system}: {why}" for name, case in cases.items() for system, why in case["absent"].items()]
    return f"\n–: not measured ({'; '.join(notes)}).\n" if notes else ""
