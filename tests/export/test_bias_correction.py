"""Bias correction: means of the quantized model are the float model's, layer by layer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import AttnDeployError
from attn_deploy.export.precision.bias_correction import correct_biases
from attn_deploy.export.precision.int8_conv import quantize_convs, values_to_calibrate
from attn_deploy.export.precision.map_means import channel_means_of
from attn_deploy.export.precision.plan import weighted_nodes
from attn_deploy.export.precision.statistics import Wanted, collect_statistics
from attn_deploy.parity import sqnr_db

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import Array, network, normal, open_model, run

NET = """net (float[batch, 3, 8, 8] x) => (float[batch, 4, 8, 8] y)
<float[batch, 8, 8, 8] a, float[batch, 8, 8, 8] ra, float[batch, 8, 8, 8] b, float[batch, 8, 8, 8] rb,
 float[batch, 4, 8, 8] c>
{
    [one__Conv] a = Conv (x, w1, b1)
    [one__Relu] ra = Relu (a)
    [two__Conv] b = Conv <pads: ints = [1, 1, 1, 1]> (ra, w2)
    [two__Relu] rb = Relu (b)
    [three__Conv] c = Conv (rb, w3, b3)
    [three__HardSwish] y = HardSwish (c)
}"""
WEIGHTS = {
    "w1": normal(8, 3, 1, 1, seed=1), "b1": normal(8, seed=2), "w2": normal(8, 8, 3, 3, seed=3) / 6,
    "w3": normal(4, 8, 1, 1, seed=4) / 3, "b3": normal(4, seed=5),
}  # fmt: skip
LAYERS = ["one/Conv", "two/Conv", "three/Conv"]


def batches() -> list[dict[str, Array]]:
    return [{"x": normal(4, 3, 8, 8, seed=seed) + 1} for seed in (20, 21)]


def float_model() -> ir.Model:
    return network(NET, **WEIGHTS)


def coarse(kind: str) -> ir.Model:
    """Weights rounded to few levels, so that means shift; "int8" also puts Q/DQ pairs around the convolutions."""
    given = {k: (np.rint(v * 4) / 4).astype(np.float32) if k[0] == "w" else v for k, v in WEIGHTS.items()}
    model = network(NET, **given)
    if kind == "int8":
        convs = weighted_nodes(model)
        wanted = [Wanted(name) for name in values_to_calibrate(convs)]
        quantize_convs(model, convs, collect_statistics(float_model(), wanted, batches(), open_model).ranges())
    return model


def means_of(model: ir.Model) -> dict[str, Array]:
    values = {str(node.name): str(node.outputs[0].name) for node in model.graph if node.name in LAYERS}
    found = channel_means_of(model, list(values.values()), batches, open_model)
    return {layer: found[value] for layer, value in values.items()}


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_every_channel_has_the_mean_it_has_in_float(kind: str) -> None:
    model = coarse(kind)
    expected = means_of(float_model())
    before = means_of(model)
    correct_biases(model, float_model(), LAYERS, batches, open_model)
    after = means_of(model)
    for layer in LAYERS:
        was, now = (np.abs(means[layer] - expected[layer]).max() for means in (before, after))
        assert was > 0.05
        assert now < (1e-5 if kind == "float" else 0.02 * was)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_the_outputs_come_closer(kind: str) -> None:
    model, x = coarse(kind), normal(8, 3, 8, 8, seed=50) + 1
    expected = run(float_model(), x=x)
    before = sqnr_db(expected, run(model, x=x))
    correct_biases(model, float_model(), LAYERS, batches, open_model)
    assert sqnr_db(expected, run(model, x=x)) > before + 0.5


def test_layers_before_are_corrected_first() -> None:
    """What the last layer is given is what is left when those before it are right: all at once would correct twice."""
    model = coarse("float")
    expected = means_of(float_model())
    at_once = means_of(model)
    added = correct_biases(model, float_model(), LAYERS[::-1], batches, open_model)
    assert list(added) == LAYERS
    np.testing.assert_allclose(added["one/Conv"], expected["one/Conv"] - at_once["one/Conv"], atol=1e-6)
    assert np.abs(added["three/Conv"] - (expected["three/Conv"] - at_once["three/Conv"])).max() > 0.01


def test_a_model_that_lost_nothing_keeps_its_biases() -> None:
    model = float_model()
    added = correct_biases(model, float_model(), LAYERS, batches, open_model)
    assert max(np.abs(a).max() for a in added.values()) < 1e-6


def test_without_layers_nothing_is_run() -> None:
    assert correct_biases(float_model(), float_model(), [], lambda: [], open_model) == {}


def test_without_data_it_is_an_error() -> None:
    with pytest.raises(AttnDeployError, match="no sample"):
        correct_biases(coarse("float"), float_model(), LAYERS, lambda: [], open_model)


def test_no_node_is_run_twice_for_the_next_layer() -> None:
    ran: list[list[str]] = []

    def watched(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        ran.append([str(node.name) for node in model.graph])
        return open_model(model)

    correct_biases(coarse("int8"), float_model(), LAYERS, batches, watched)
    in_stretches = [name for names in ran[1:] for name in names]
    assert len(ran) == 1 + len(LAYERS)
    assert len(set(in_stretches)) == len(in_stretches)


def test_a_residual_that_later_layers_read_is_held() -> None:
    text = NET.replace("Conv (rb, w3, b3)", "Conv (sum, w3, b3)").replace(
        "    [three__Conv]", "    [sum__Add] sum = Add (rb, ra)\n    [three__Conv]"
    )
    given = {k: (np.rint(v * 4) / 4).astype(np.float32) if k[0] == "w" else v for k, v in WEIGHTS.items()}
    model, reference = network(text, **given), network(text, **WEIGHTS)
    correct_biases(model, reference, LAYERS, batches, open_model)
    for layer, mean in means_of(reference).items():
        np.testing.assert_allclose(means_of(model)[layer], mean, atol=1e-5)
