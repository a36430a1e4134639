"""Nine models in FP32 on the CPU: ours against every peer, interleaved in one process, beside the machine's ceiling.

    make bench        (or: python bench/cpu_models.py [--models vit_tiny_patch16_224 ...] [--cases batch1 loaded])

`batch1` is the table of the README: each system's median, and the median over rounds of its time over ours with its
95 % bootstrap interval. `batch8` is the same at batch 8; `loaded` at batch 1 while another process keeps one core busy,
ours as it is opened for such a host (`load(..., spinning=False)`). The share of the ceiling is 2 x the model's
multiply-adds (as export/work.py counts) over our time and what fused multiply-adds alone reach on as many threads, just
before and after (bench/peak.cc, compiled here).

Every session is asked for 2 threads. A turn of a system comes after a pause in which the threads of the one before stop
spinning (attn_deploy/latency.py). Goes on where it was stopped: a case of a model is kept as long as the sources, the
library and the versions are those it was taken with. Writes bench/results/cpu_models.json and bench/results/CPU.md.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from cpu_table import markdown
from model_runs import OPSET, Results, Runs, bundle_of, fingerprint, in_turns, load_average
from roofline import ceiling_gflops

import attn_deploy
from attn_deploy.bundle import open_bundle
from attn_deploy.inputs import make_feeds
from attn_deploy.parity import sqnr_db
from attn_deploy.peers import ON_CPU, Place, open_peers
from attn_deploy.receipt import MAIN
from attn_deploy.target import Precision, Target

MODELS = (
    "vit_tiny_patch16_224", "vit_small_patch16_224", "swin_tiny_patch4_window7_224", "seresnet50", "ecaresnet50t",
    "efficientnet_b0", "mobilenetv3_large_100", "mobilevit_s", "botnet26t_256",
)  # fmt: skip
WEIGHTS = "init:0"
"""Weights do not change the time; made ones need no download."""

OURS, SPINNING = "attn-deploy", "attn-deploy-spinning"

FEW = ("onnxruntime", "onnxruntime-no-spinning", "openvino")
CASES: dict[str, tuple[int, tuple[str, ...], float]] = {
    "batch1": (1, ON_CPU, 25.0),
    "batch8": (8, FEW, 12.0),
    "loaded": (1, FEW, 10.0),
}
"""Case -> batch, peers, seconds of measuring."""


def main() -> int:
    arguments = parse()
    warnings.filterwarnings("ignore")
    results = Results("cpu_models", "CPU.md", "python bench/cpu_models.py", MODELS, arguments.threads, markdown)
    state = fingerprint(arguments.threads)
    for name in arguments.models:
        due = list(arguments.cases) if arguments.fresh else results.due(name, arguments.cases, state)
        if not due:
            print(f"{name}: kept", flush=True)
            continue
        results.add(name, measured(name, due, state, arguments))
    print(results.text())
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=tuple(CASES))
    parser.add_argument("--against", nargs="+", choices=ON_CPU, metavar="PEER", help="only these, in every case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="of measuring, in every case")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an earlier run")
    return parser.parse_args()


def measured(name: str, cases: Sequence[str], state: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The cases of one model: bundle and peers are opened once for all of them."""
    made = [f"timm:{name}", "--weights", WEIGHTS, "--precision", "fp32", "--threads", str(arguments.threads)]
    bundle = bundle_of(f"{name}-fp32", state, made)
    receipt = open_bundle(bundle).receipt()
    assert receipt.intent is not None
    flops = receipt.intent.flops
    wanted = arguments.against or list(dict.fromkeys(peer for case in cases for peer in CASES[case][1]))
    done: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(attn_deploy.load(bundle, threads=arguments.threads, target="onnxruntime-cpu"))
        captured = captured_of(name, arguments.threads)
        place = Place(Target.ONNXRUNTIME_CPU, Precision.FP32, arguments.threads, OPSET)
        found, absent = open_peers(stack, captured, wanted, place)
        opened = dict(zip((peer for peer in wanted if peer not in absent), found, strict=True))
        sleeping = stack.enter_context(
            attn_deploy.load(bundle, threads=arguments.threads, target="onnxruntime-cpu", spinning=False)
        )
        ours = {case: {OURS: session.run} for case in CASES} | {"loaded": {OURS: sleeping.run, SPINNING: session.run}}
        for case in cases:
            batch, peers, seconds = CASES[case]
            graph = session.manifest.graphs[MAIN]
            feeds = make_feeds(graph.examples, batch=batch, seed=31)
            runs = ours[case] | {p: opened[p].run for p in arguments.against or peers if p in opened}
            distance = sqnr_to_ours(runs, feeds)
            with busy_core() if case == "loaded" else contextlib.nullcontext():
                systems, ceilings = in_turns(
                    runs, feeds, threads=arguments.threads, seconds=arguments.seconds or seconds, ceiling=ceiling_gflops
                )
            for peer, db in distance.items():
                systems[peer]["sqnr_db_to_ours"] = db
            done[case] = {
                "state": state, "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "batch": batch,
                "variant": session.variant, "flops": flops * batch,
                "absent": {p: why for p, why in absent.items() if p in (arguments.against or peers)},
                "systems": systems, "ceiling_gflops": ceilings, "load_average": load_average(),
            }  # fmt: skip
            print(name, case, *(f"{s}: {r['p50_ms']:.2f} ms" for s, r in systems.items()), sep="\n  ")
    return done


def captured_of(name: str, threads: int) -> Any:
    import torch

    from attn_deploy.export.capture import capture
    from attn_deploy.export.sources import SourceRequest, load_source
    from attn_deploy.session import DimBounds

    torch.set_num_threads(threads)
    return capture(load_source(f"timm:{name}", SourceRequest("", WEIGHTS, {}, ())), {"batch": DimBounds()})


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another process that computes all the time, wherever the system puts it."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def sqnr_to_ours(runs: Runs, feeds: Any) -> dict[str, float]:
    """How far each peer's output is from ours in dB. torch.compile compiles here, outside the time of measuring."""
    outputs = {name: next(iter(run(feeds).values())) for name, run in runs.items()}
    ours = outputs.pop(OURS)
    return {name: round(sqnr_db(ours, output), 1) for name, output in outputs.items()}


if __name__ == "__main__":
    sys.exit(main())
