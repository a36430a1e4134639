"""Options of the command line that several commands have, or that need more than a line to say."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of every session and peer [default: all cores].")]
Weights = Annotated[
    str | None, typer.Option(help="safetensors or torch file (weights_only), or init:SEED for the test initializer.")
]
SourceArgs = Annotated[list[str] | None, typer.Option("--source-arg", help="Argument of the model's factory, k=v.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="NAME=1x3x224x224[:DTYPE[:BELOW]], when the source does not say.")
]
Resolutions = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="NAME=1x3x224x224[:DTYPE[:BELOW]], when the source does not say. The same name again: one more resolution "
        "in the bundle.",
    ),
]
GraphName = Annotated[
    str | None, typer.Option("--graph", help="The only graph to take, of a bundle with several resolutions.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Folder of images (class subfolders or flat), .npz, or package.module:function."),
]
MinAgreement = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Least share of inputs whose top-1 equals FP32's.")
]
MaxDrop = Annotated[float | None, typer.Option(min=0.0, help="Most points of accuracy to lose; needs labelled data.")]
MinSqnr = Annotated[float | None, typer.Option(help="Least SQNR of the outputs in dB.")]
Plan = Annotated[
    str | None,
    typer.Option(help="JSON file: the scheme of each layer or module, for int8 and auto. Alone it means fp32,auto."),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option(
        help="fp32, fp16 (on a CPU storage only), bf16 (GPU), int8, fp8 (TensorRT) or auto (INT8 where it is worth its "
        "loss, searched under the budget) [default: CPU fp32, int8; GPU fp32, fp16]."
    ),
]
