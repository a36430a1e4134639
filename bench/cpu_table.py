"""bench/results/CPU.md out of what cpu_models.py measured."""

from __future__ import annotations

from typing import Any

from tables import against, share_of_ceiling, table, taken

TARGETS = {
    "vit_tiny_patch16_224": (1.3, 1.1, 1.3),
    "vit_small_patch16_224": (1.2, 1.0, 1.1),
    "swin_tiny_patch4_window7_224": (1.8, 1.05, 1.2),
    "seresnet50": (1.1, 1.0, 1.1),
    "ecaresnet50t": (1.3, 1.1, 1.3),
    "efficientnet_b0": (1.25, 1.35, 1.5),
    "mobilenetv3_large_100": (1.2, 1.6, 1.5),
    "mobilevit_s": (1.3, 1.1, 1.3),
    "botnet26t_256": (1.2, 1.0, 1.2),
}
"""Goals at batch 1: over plain ONNX Runtime, over OpenVINO, and (stretch) over the better of the two."""

OURS = "attn-deploy"
COLUMNS = {
    "attn-deploy-spinning": "ours, spinning",
    "onnxruntime": "plain ONNX Runtime", "onnxruntime-no-spinning": "… no spinning",
    "onnxruntime-flushed": "… denormals flushed", "onnxruntime-transformers": "… transformers optimizer",
    "onnxruntime-onnxscript": "… onnxscript fusions", "openvino": "OpenVINO", "compile": "torch.compile",
    "eager": "eager PyTorch",
}  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Empty without a result."""
    if not result:
        return ""
    host, models = result["host"], result["models"]
    parts = [
        "# FP32 on the CPU\n\nWritten by `make bench` (`python bench/cpu_models.py`). Times are medians; a ratio is a "
        "peer's time over ours in the same round, median over rounds with its 95 % bootstrap interval: above 1 ours is "
        "faster. 2 threads for everyone, all systems of a table in turns in one process.\n\n"
        f"{host['cpu']}, {host['logical_cores']} cores, {result['threads']} threads, {result['instruction_set']}; "
        f"ONNX Runtime {result['versions'].get('onnxruntime')}, OpenVINO {result['versions'].get('openvino')}, "
        f"PyTorch {result['versions'].get('torch')}; taken {taken(models)}.\n",
        "## Against the goals, batch 1\n\n" + _goals(models),
        "## Every peer, batch 1\n\n" + _peers(models, "batch1"),
        "## Batch 8\n\n" + _peers(models, "batch8"),
        "## Batch 1 with another process on one core\n\nOurs opened with `spinning=False`.\n\n"
        + _peers(models, "loaded"),
    ]
    return "\n".join(parts)


def _goals(models: dict[str, Any]) -> str:
    rows = []
    for name, (plain_goal, openvino_goal, stretch) in TARGETS.items():
        case = models.get(name, {}).get("batch1")
        systems = case["systems"] if case else {}
        if not {"onnxruntime", "openvino"} <= systems.keys():
            continue
        ours_ms = systems[OURS]["p50_ms"]
        share = share_of_ceiling(case["flops"], ours_ms, case["ceiling_gflops"], "GFLOP/s")
        plain, openvino = systems["onnxruntime"]["ratio"], systems["openvino"]["ratio"]
        better = min(plain, openvino)
        best = min(system["ratio"] for peer, system in systems.items() if peer.startswith("onnxruntime"))
        rows.append(
            [name, f"{ours_ms:.2f}", share, against(plain, plain_goal), against(openvino, openvino_goal),
             against(better, stretch), f"{best:.2f}"]
        )  # fmt: skip
    head = ["model", "ours, ms", "share of the FMA ceiling", "over plain ONNX Runtime", "over OpenVINO",
            "over the better (stretch)", "over the best of ONNX Runtime"]  # fmt: skip
    return table(head, rows) + (
        "\nBold: the goal, behind it, is met. The best of ONNX Runtime: whichever of its settings and tools below is "
        "the fastest.\n"
    )


def _peers(models: dict[str, Any], case_name: str) -> str:
    cases = {name: model[case_name] for name, model in models.items() if case_name in model}
    if not cases:
        return "Not measured yet.\n"
    shown = [p for p in COLUMNS if any(p in c["systems"] or p in c["absent"] for c in cases.values())]
    rows = [[name, f"{c['systems'][OURS]['p50_ms']:.2f}", *(_cell(c, p) for p in shown)] for name, c in cases.items()]
    notes = {f"{COLUMNS[p]}: {why}" for c in cases.values() for p, why in c["absent"].items()}
    note = f"\n–: not measured ({'; '.join(sorted(notes))}).\n" if notes else ""
    return table(["model", "ours, ms", *(COLUMNS[p] for p in shown)], rows) + note


def _cell(case: dict[str, Any], peer: str) -> str:
    found = case["systems"].get(peer)
    if found is None:
        return "–"
    low, high = found["ratio_ci95"]
    return f"{found['p50_ms']:.2f} ms, {found['ratio']:.2f}x ({low:.2f}–{high:.2f})"
