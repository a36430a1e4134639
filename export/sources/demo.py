"""`demo`: the embedded attention CNN with its trained weights; the source when none is given."""

from __future__ import annotations

from attn_deploy.demo import LABELS, preprocess
from attn_deploy.export.sources.base import LoadedSource, SourceRequest, accepted_inputs, load_weights
from attn_deploy.inputs import ExampleInput


def load(request: SourceRequest) -> LoadedSource:
    from attn_deploy.demo.model import build

    module = build()
    config = preprocess()
    inputs = accepted_inputs(module, [ExampleInput(config.input, (1, len(config.mean), *config.crop))], request.inputs)
    weights = "shipped with the package"
    if request.weights is not None:
        weights = load_weights(module, inputs, request.weights, "demo")
    return LoadedSource(
        name="demo",
        description="demo",
        module=module,
        inputs=inputs,
        weights=weights,
        preprocess=config,
        labels=tuple(LABELS),
    )
