"""The command line: arguments, printing, exit codes; nothing else."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attn_deploy.choice import Budget
from attn_deploy.cli_arguments import (
    batch_sizes,
    dynamic_dims,
    fused_sites,
    precisions_of,
    runtime_options,
    source_arguments,
    split_values,
    tensorrt_version_of,
)
from attn_deploy.cli_cache import cache
from attn_deploy.cli_options import (
    DataOption,
    GraphName,
    Inputs,
    Json,
    MaxDrop,
    MinAgreement,
    MinSqnr,
    Plan,
    Precisions,
    Resolutions,
    SourceArgs,
    Threads,
    Weights,
)
from attn_deploy.cli_output import print_json, print_receipt, show_error, unexpected
from attn_deploy.cli_progress import progress_on
from attn_deploy.errors import AttnDeployError
from attn_deploy.inputs import parse_input
from attn_deploy.plan_file import read_plan
from attn_deploy.target import parse_target

app = typer.Typer(
    name="attn-deploy",
    help="Take a PyTorch model with attention in it; hand back the fastest artifact that is still the same model, "
    "with the proof beside it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(cache, name="cache")


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="timm:NAME, torchvision:NAME, hf:PATH_OR_ID, package.module:factory or file.pt2.")
    ] = "demo",
    out: Annotated[Path, typer.Option("-o", "--out", help="The bundle to write.")] = Path("model.attn"),
    weights: Weights = None,
    source_arg: SourceArgs = None,
    input_: Resolutions = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(help="batch or sequence, each perhaps with =MIN:MAX; or none [default: batch]."),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Where it shall run [default: what this host has].")] = None,
    precision: Precisions = None,
    plan: Plan = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Module whose layers stay FP32.")] = None,
    tensorrt_version: Annotated[
        str | None, typer.Option(help="TensorRT that will build the engine, for example 10.3 [default: the newest].")
    ] = None,
    runtime_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for sessions on a GPU, for example version_compatible=1.")
    ] = None,
    data: DataOption = None,
    preprocess: Annotated[str | None, typer.Option(help="JSON file that says how images are prepared.")] = None,
    calibration_samples: Annotated[int, typer.Option(min=1)] = 64,
    eval_samples: Annotated[int, typer.Option(min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the split of the data.")] = 0,
    min_agreement: MinAgreement = None,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="Write the bundle though a budget is missed.")] = False,
    require_fused: Annotated[
        str | None, typer.Option(metavar="N|all", help="Least number of attention sites that run as one kernel.")
    ] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0.0)] = None,
    tune: Annotated[
        bool | None,
        typer.Option("--tune/--no-tune", help="Measure each part of the model on this CPU; else where it can pay."),
    ] = None,
    allow_unproven: Annotated[
        bool, typer.Option("--allow-unproven", help="Write targets that cannot run here, as not run.")
    ] = False,
    opset: Annotated[int, typer.Option(min=20, max=25)] = 20,
    threads: Threads = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle, in one step.")] = False,
    json: Json = False,
) -> None:
    """Export a model to a proven bundle."""
    from attn_deploy.pipeline import ExportOptions, export_model

    options = ExportOptions(
        source=source,
        weights=weights,
        source_args=source_arguments(source_arg),
        inputs=tuple(parse_input(text) for text in input_ or ()),
        dims=dynamic_dims(dynamic),
        targets=tuple(parse_target(t) for t in split_values(target)),
        tensorrt_version=tensorrt_version_of(tensorrt_version),
        runtime_options=runtime_options(runtime_option),
        precisions=precisions_of(precision, plan),
        precisions_asked=bool(precision or plan),
        plan=None if plan is None else read_plan(plan),
        exclude=tuple(exclude or ()),
        data=data,
        preprocess=preprocess,
        calibration_samples=calibration_samples,
        eval_samples=eval_samples,
        seed=seed,
        budget=Budget(min_agreement, max_drop, min_sqnr),
        keep_best=keep_best,
        tune=tune,
        require_fused=fused_sites(require_fused),
        max_latency_ms=max_latency_ms,
        allow_unproven=allow_unproven,
        opset=opset,
        threads=threads,
        force=force,
        command=shlex.join(["attn-deploy", *sys.argv[1:]]),
    )
    with progress_on(_err()) as progress:
        try:
            result = export_model(out, options, progress)
        except AttnDeployError as error:
            receipt = getattr(error, "receipt", None)
            if receipt is not None and not json:
                progress.stop()
                print_receipt(receipt, Console(stderr=True))
            raise
    if json:
        print_json({"bundle": str(result.path), "receipt": result.receipt})
        return
    console = Console()
    print_receipt(result.receipt, console)
    console.print(f"\nWrote [bold]{result.path}[/bold]. Next: attn-deploy run {result.path} INPUT", highlight=False)


@app.command()
def inspect(
    item: Annotated[str, typer.Argument(metavar="SOURCE|BUNDLE")],
    weights: Weights = None,
    source_arg: SourceArgs = None,
    input_: Inputs = None,
    all_sites: Annotated[bool, typer.Option("--all-sites", help="A row for every site.")] = False,
    heatmap: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Draw the attention weights on this image, a PNG per site.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the PNG files.")] = Path("heatmaps"),
    graph: GraphName = None,
    json: Json = False,
) -> None:
    """Show the attention of a source or bundle, and what runs each of it."""
    from attn_deploy.inspection import Drawing
    from attn_deploy.inspection import inspect as inspect_item

    with progress_on(_err()) as progress:
        progress.stage("inspecting")
        found = inspect_item(
            item, weights=weights, arguments=source_arguments(source_arg),
            inputs=[parse_input(t) for t in input_ or ()],
            drawing=None if heatmap is None else Drawing(heatmap, out), graph=graph,
        )  # fmt: skip
    if json:
        print_json(found)
        return
    from attn_deploy.report.listings import inspection_tables

    Console().print(inspection_tables(found, all_sites=all_sites))


@app.command()
def validate(
    bundle: Annotated[Path, typer.Argument()],
    reference: Annotated[
        str | None, typer.Option(help="A source or another bundle [default: the bundle's portable FP32 model].")
    ] = None,
    weights: Weights = None,
    source_arg: SourceArgs = None,
    data: DataOption = None,
    localize: Annotated[
        bool, typer.Option("--localize", help="Compare block by block, and name the first module that is wrong.")
    ] = False,
    eval_samples: Annotated[int, typer.Option(min=1)] = 200,
    min_agreement: MinAgreement = None,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    graph: GraphName = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Check every file of a bundle, and that it is still the same model on this host."""
    from attn_deploy.validation import require_passed
    from attn_deploy.validation import validate as validate_bundle

    with progress_on(_err()) as progress:
        validation = validate_bundle(
            bundle, reference=reference, weights=weights, arguments=source_arguments(source_arg), data=data,
            localize=localize, eval_samples=eval_samples, threads=threads,
            budget=Budget(min_agreement, max_drop, min_sqnr), graph=graph, progress=progress,
        )  # fmt: skip
    if json and validation.passed:
        print_json(validation)
    elif not json:
        from attn_deploy.report.listings import validation_tables

        Console().print(validation_tables(validation))
    require_passed(validation)


@app.command()
def bench(
    items: Annotated[list[str], typer.Argument(metavar="BUNDLE|SOURCE...")],
    against: Annotated[
        str,
        typer.Option(
            help="Of eager,compile,onnxruntime; on a CPU openvino and onnxruntime- with no-spinning, flushed, "
            "transformers or onnxscript; on a GPU tensorrt; none."
        ),
    ] = "eager,onnxruntime",
    target: Annotated[str | None, typer.Option(help="Which variant, and where a source's peers run.")] = None,
    precision: Annotated[str, typer.Option(help="Of a source's peers on a GPU.")] = "fp32",
    copies: Annotated[
        bool, typer.Option("--copies/--no-copies", help="Whether copies to and from a GPU count, for everyone alike.")
    ] = True,
    batch: Annotated[str, typer.Option(help="Batch sizes, for example 1,8.")] = "1",
    input_: Inputs = None,
    graph: GraphName = None,
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="Time budget for each batch size.")] = 30.0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows as CSV.")] = None,
    json: Json = False,
) -> None:
    """Time bundles and sources against their peers, interleaved."""
    from attn_deploy.benchmarking import benchmark
    from attn_deploy.report.listings import benchmark_csv, benchmark_tables

    with progress_on(_err()) as progress:
        result = benchmark(
            items, against=[] if against == "none" else split_values([against]), batches=batch_sizes(batch),
            threads=threads, seconds=seconds, inputs=[parse_input(t) for t in input_ or ()],
            target=target, precision=precision, copies=copies, graph=graph,
            progress=progress,
        )  # fmt: skip
    if csv is not None:
        csv.write_text(benchmark_csv(result))
    if json:
        print_json(result)
        return
    Console().print(benchmark_tables(result))


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument()],
    target: Annotated[str | None, typer.Option(help="onnxruntime-cpu: no other has levels to choose.")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="For all measuring of a graph.")] = 40.0,
    graph: GraphName = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure the parts of a bundle's model at every level of fusion on this host, and keep the fastest in it."""
    from attn_deploy.retuning import retune

    with progress_on(_err()) as progress:
        result = retune(bundle, target=target, threads=threads, seconds=seconds, graph=graph, progress=progress)
    if json:
        print_json(result)
        return
    from attn_deploy.report.listings import retuning_tables

    Console().print(retuning_tables(result))


@app.command()
def run(
    bundle: Annotated[Path, typer.Argument()],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Images, .npy or .npz.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write the outputs to an .npz.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    graph: GraphName = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Run a bundle on images or arrays."""
    from attn_deploy.cli_run import run_inputs

    results = run_inputs(bundle, inputs, out=out, top=top, threads=threads, graph=graph)
    if json:
        print_json(results)
        return
    from attn_deploy.report.listings import run_tables

    Console().print(run_tables(results))


@app.command()
def report(
    bundle: Annotated[Path, typer.Argument()],
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML page to write.")],
) -> None:
    """Write a bundle's receipt as one HTML page."""
    from attn_deploy.bundle import open_bundle, storage_errors
    from attn_deploy.errors import UnavailableError
    from attn_deploy.report import write_html

    with storage_errors(out):
        written = write_html(open_bundle(bundle).receipt(), out)
    if not written:
        raise UnavailableError("jinja2 is not installed", next_step="pip install '.[report]'")
    Console().print(f"Wrote {out}")


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this host can run, and the command that adds the rest."""
    from attn_deploy.doctor import diagnose

    diagnosis = diagnose()
    if json:
        print_json(diagnosis)
    else:
        from attn_deploy.report.listings import doctor_tables

        Console().print(doctor_tables(diagnosis))
    if not diagnosis.healthy:
        raise typer.Exit(6)


def _err() -> Console:
    return Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; the console script exits with it."""
    given = sys.argv[1:] if arguments is None else arguments
    normalized = [_dashes(a) for a in given]
    as_json = "--json" in normalized
    try:
        result = app(normalized, standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
        return code
    except AttnDeployError as error:
        show_error(error, as_json)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return unexpected(error, as_json)


def _dashes(argument: str) -> str:
    """Dashes and underscores in flags are the same."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


if __name__ == "__main__":
    sys.exit(main())
