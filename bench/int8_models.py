"""INT8 on the CPU: what it keeps of each model and how fast it is, against our FP32 and the INT8 of OpenVINO (NNCF) and
ONNX Runtime, in one interleaved run for each model.

    make bench        (or: python bench/int8_models.py [--models vit_tiny_patch16_224 ...] [--precision auto])

Batch 1, 2 threads for everyone. All systems are judged on the same samples, which nobody calibrated on, against eager
PyTorch: SQNR, share of equal top-1, points of top-1 lost. Ratios are of times in the same round, median over rounds
with its 95 % bootstrap interval. Our FP32 is the one that `attn-deploy export` chose for the same model on this host.
The share of the ceiling is 2 x the model's multiply-adds (as export/work.py counts) over our time and what VNNI alone
reaches on as many threads, just before and after (bench/peak_int8.cc).

`--precision auto` takes the plan that is searched under the goal as budget in place of INT8 wherever it can be had.
Needs ATTN_DEPLOY_DATA for photographs, trained weights and CIFAR-10; without it the models that can do with made inputs
are judged on these and the others are left out. Goes on where it was stopped, as bench/cpu_models.py. Writes
bench/results/int8_models.json and bench/results/INT8.md.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cifar_nets import images
from common import BUILD, data_folder
from int8_cases import CASES, Case, Samples
from int8_peers import TOOLS, opened, quantized
from int8_table import FP32, OURS, PEERS, markdown
from model_runs import OPSET, Results, bundle_of, fingerprint, in_turns, load_average
from roofline import ceiling_int8_gops

import attn_deploy
from attn_deploy.accuracy import Judgement, judge, scores_output
from attn_deploy.bundle import open_bundle
from attn_deploy.data import open_data
from attn_deploy.errors import AttnDeployError
from attn_deploy.inputs import make_feeds, named_specs
from attn_deploy.preprocess import read_preprocess
from attn_deploy.receipt import MAIN
from attn_deploy.target import Precision

if TYPE_CHECKING:
    from attn_deploy.export.capture import CapturedModel
    from attn_deploy.export.sources import LoadedSource

BATCH1 = "batch1"
SECONDS = 30.0
TARGET = "onnxruntime-cpu"


def main() -> int:
    arguments = parse()
    warnings.filterwarnings("ignore")
    command = "python bench/int8_models.py" + (" --precision auto" if arguments.precision == Precision.AUTO else "")
    results = Results("int8_models", "INT8.md", command, tuple(CASES), arguments.threads, markdown)
    state = fingerprint(arguments.threads, arguments.precision, arguments.samples)
    failed = []
    for name in arguments.models:
        case = CASES[name]
        if not arguments.fresh and not results.due(name, [BATCH1], state):
            print(f"{name}: kept", flush=True)
        elif case.trained and data_folder() is None:
            print(f"{name}: left out: ATTN_DEPLOY_DATA is not set", flush=True)
        else:
            try:
                results.add(name, {BATCH1: {"state": state, **measured(name, case, state, arguments)}})
            except (AttnDeployError, subprocess.CalledProcessError) as error:  # the others are measured all the same
                failed.append(name)
                print(f"{name}: failed: {error}", flush=True)
    print(results.text())
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=tuple(CASES), metavar="MODEL")
    parser.add_argument("--precision", choices=[Precision.INT8, Precision.AUTO], default=Precision.INT8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of measuring, for each model")
    parser.add_argument("--samples", type=int, help="at most so many to calibrate and to judge: a trial, no result")
    parser.add_argument("--fresh", action="store_true", help="keep nothing of an earlier run")
    return parser.parse_args()


class Data:
    """The samples of a case, the same split for us and for peers: `attn-deploy export` makes it by the same rule."""

    def __init__(self, case: Case, source: LoadedSource, most: int | None) -> None:
        self.calibrated, self.judged = (min(n, most or n) for n in (case.calibrated, case.judged))
        self.folder = folder_of(case)
        self._source = source
        self._split = None
        if self.folder is not None:
            preprocess = read_preprocess(case.preprocess) if case.preprocess else source.preprocess
            specs = named_specs(source.inputs, {})
            opened_data = open_data(self.folder, inputs=specs, preprocess=preprocess, labels=source.labels)
            self._split = opened_data.split(self.calibrated, self.judged, 0)

    def calibration(self, path: Path) -> Path:
        """An .npz of what calibrates: one array [samples, ...] for each input."""
        if self._split is not None:
            feeds = [batch.feeds for batch in self._split.calibration.batches(1)]
        else:
            feeds = [make_feeds(self._source.inputs, batch=1, seed=1000 + i) for i in range(self.calibrated)]
        np.savez(path, **{name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]})
        return path

    def judgement(self) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None]]:
        """One sample after the other, since peers are made for batch 1."""
        if self._split is None:
            for seed in range(self.judged):
                yield make_feeds(self._source.inputs, batch=1, seed=500_000 + seed), None
            return
        for batch in self._split.judgement.batches(1):
            yield batch.feeds, batch.labels


def folder_of(case: Case) -> Path | None:
    """What `--data` is given; None: made inputs."""
    data = data_folder()
    if data is None or case.samples is Samples.MADE:
        return None
    if case.samples is Samples.PHOTOGRAPHS:
        return data / "imagenet_compatible_500"
    folder = BUILD / "cifar10_test"
    if not folder.is_dir():
        images.unpack(data, "test", folder.with_name("cifar10_test.part")).rename(folder)
    return folder


def measured(name: str, case: Case, state: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: bundles and peers are made, judged on the same samples, then measured in turns."""
    source, captured = captured_of(case, arguments.threads)
    data = Data(case, source, arguments.samples)
    precisions = {OURS: arguments.precision, FP32: Precision.FP32}
    bundles = {
        system: bundle_of(f"{name}-{precision}", state, export_arguments(case, data, precision, arguments.threads))
        for system, precision in precisions.items()
    }
    intent = open_bundle(bundles[OURS]).receipt().intent
    assert intent is not None
    runs: dict[str, Any] = {}
    variants: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for system, bundle in bundles.items():
            variants[system] = variant_of(bundle, precisions[system])
            session = attn_deploy.load(bundle, threads=arguments.threads, variant=variants[system])
            runs[system] = stack.enter_context(session).run
        absent = open_peers(runs, name, case, data, captured, arguments.threads)
        feeds = next(data.judgement())[0]
        shapes = {output: value.shape for output, value in captured.reference(feeds).items()}
        scores = scores_output(shapes) if case.trained else None
        judged = judge(data.judgement(), captured.reference, runs, scores)
        systems, ceilings = in_turns(
            runs, feeds, threads=arguments.threads, seconds=arguments.seconds, ceiling=ceiling_int8_gops
        )
    print(name)
    for system, row in systems.items():
        row |= fidelity(judged[system])
        print(f"  {system}: {row['p50_ms']:.2f} ms, {row['sqnr_db']:.1f} dB", flush=True)
    return {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "batch": 1, "flops": intent.flops,
        "variants": variants, "weights": case.origin, "samples": case.samples if data.folder else Samples.MADE,
        "judged": data.judged, "calibrated": data.calibrated, "absent": absent, "systems": systems,
        "ceiling_gops": ceilings, "load_average": load_average(),
    }  # fmt: skip


def export_arguments(case: Case, data: Data, precision: str, threads: int) -> list[str]:
    """Of `attn-deploy export`. What misses a goal is measured all the same."""
    made = [case.source, "--precision", precision, "--threads", str(threads), "--keep-best"]
    weights = weights_of(case)
    made += ["--weights", weights] if weights is not None else []
    if precision == Precision.FP32:
        return made
    made += ["--preprocess", str(case.preprocess)] if case.preprocess else []
    made += ["--calibration-samples", str(data.calibrated), "--eval-samples", str(data.judged)]
    made += ["--data", str(data.folder)] if data.folder is not None else []
    if precision == Precision.AUTO:
        goals = {"--min-sqnr": case.goals.sqnr_db, "--min-agreement": case.goals.agreement,
                 "--max-drop": case.goals.max_drop}  # fmt: skip
        made += [text for flag, goal in goals.items() if goal is not None for text in (flag, str(goal))]
    return made


def weights_of(case: Case) -> str | None:
    if case.weights is None or case.weights.startswith("init"):
        return case.weights
    data = data_folder()
    assert data is not None  # models with trained weights are left out without it
    return str(data / case.weights)


def variant_of(bundle: Path, precision: str) -> str:
    """The chosen variant; the one that `--keep-best` kept where none held its budget, which the table shows.

    Raises AttnDeployError when it is not of the precision that was asked for.
    """
    manifest = open_bundle(bundle).manifest
    variants = manifest.graphs[MAIN].variants
    found = manifest.chosen.get(TARGET) or next(iter(variants))
    if variants[found].precision != precision:
        raise AttnDeployError("the bundle runs another precision", got=variants[found].precision, expected=precision)
    return found


def open_peers(
    runs: dict[str, Any], name: str, case: Case, data: Data, captured: CapturedModel, threads: int
) -> dict[str, str]:
    """Adds the peers to `runs`; the reasons of those that cannot be had."""
    from attn_deploy.export.build import plain_model

    kept_in = BUILD / "int8_peers" / name
    kept_in.mkdir(parents=True, exist_ok=True)
    absent = {}
    with plain_model(captured, OPSET) as plain:
        calibration = data.calibration(plain.with_name("calibration.npz"))
        for system, tool in zip(PEERS, TOOLS, strict=True):
            try:
                runs[system] = opened(tool, quantized(tool, plain, calibration, case.kind, kept_in), threads)
            except Exception as error:  # their tool on this model: a cell that says so
                absent[system] = str(error).splitlines()[0]
                print(f"{name}: {system}: {absent[system]}", flush=True)
    return absent


def captured_of(case: Case, threads: int) -> tuple[LoadedSource, CapturedModel]:
    """The model in PyTorch, captured for batch 1: what peers are made from has no dynamic size."""
    import torch

    from attn_deploy.export.capture import capture
    from attn_deploy.export.sources import SourceRequest, load_source

    torch.set_num_threads(threads)
    source = load_source(case.source, SourceRequest("", weights_of(case), {}, ()))
    return source, capture(source, {})


def fidelity(judgement: Judgement) -> dict[str, Any]:
    """The worst output's SQNR; agreement and accuracy where the weights are trained."""
    sqnr_db = min(found.sqnr_db for found in judgement.fidelity.values())
    row: dict[str, Any] = {"sqnr_db": sqnr_db, "judged": judgement.samples}
    if judgement.agreement is not None:
        row["agreement"] = judgement.agreement
    if judgement.accuracy is not None:
        row |= {"top1": judgement.accuracy.value, "drop": judgement.accuracy.reference - judgement.accuracy.value}
    return row


if __name__ == "__main__":
    sys.exit(main())
