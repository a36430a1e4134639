"""Statistics of activations: against NumPy, streamed, resumed, refused."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from attn_deploy.errors import UsageError
from attn_deploy.export.precision.histogram import histogram_of
from attn_deploy.export.precision.observation import COUNTED
from attn_deploy.export.precision.ranges import RangeMethod
from attn_deploy.export.precision.statistics import (
    Statistics,
    Wanted,
    collect_statistics,
    load_statistics,
    save_statistics,
)
from attn_deploy.export.precision.statistics_file import model_hash

sys.path.insert(0, str(Path(__file__).parent))  # for half_models

from half_models import Array, network, normal, open_model

RELU_NET = """net (float[batch, 4, 3, 3] x) => (float[batch, 4] y)
<float[batch, 4, 3, 3] h, float[batch, 4, 3, 3] g, float[batch, 4] m>
{
    [a__Relu] h = Relu (x)
    [b__Neg] g = Neg (h)
    [c__ReduceMax] m = ReduceMax <keepdims: int = 0> (g, axes)
    [d__Identity] y = Identity (m)
}"""
ALL = [
    Wanted("x", histogram=True, channel_axis=1),
    Wanted("h", histogram=True),
    Wanted("g"),
    Wanted("y", channel_axis=-1),
]


def relu_net() -> ir.Model:
    return network(RELU_NET, axes=np.array([2, 3], np.int64))


def in_batches(x: Array, *sizes: int) -> Iterator[dict[str, Array]]:
    start = 0
    for size in sizes:
        yield {"x": x[start : start + size]}
        start += size


def samples(count: int, seed: int = 0) -> Array:
    """The later, the larger: what is seen first does not say how far the rest reaches."""
    return normal(count, 4, 3, 3, seed=seed) * np.arange(1, count + 1, dtype=np.float32)[:, None, None, None]


def collected(x: Array, *sizes: int) -> Statistics:
    return collect_statistics(relu_net(), ALL, in_batches(x, *sizes), open_model)


def require_equal(one: Statistics, other: Statistics) -> None:
    assert (one.model, one.seed, one.samples) == (other.model, other.seed, other.samples)
    assert one.values.keys() == other.values.keys()
    for name, value in one.values.items():
        same = other.values[name]
        assert (value.low, value.high) == (same.low, same.high)
        for kind in ("channel_low", "channel_high"):
            np.testing.assert_array_equal(getattr(value, kind), getattr(same, kind))
        assert (value.histogram is None) == (same.histogram is None)
        if value.histogram is not None and same.histogram is not None:
            assert value.histogram.exponent == same.histogram.exponent
            np.testing.assert_array_equal(value.histogram.counts, same.histogram.counts)


# -- what is collected -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 4, 3)], ids=str)
def test_extrema_span_all_samples_and_each_channel_has_its_own(sizes: tuple[int, ...]) -> None:
    x = samples(12)
    found = collected(x, *sizes)
    h = np.maximum(x, 0)
    assert found.samples == 12
    for name, value in {"x": x, "h": h, "g": -h, "y": (-h).max((2, 3))}.items():
        assert (found.values[name].low, found.values[name].high) == (value.min(), value.max())
    np.testing.assert_array_equal(found.values["x"].channel_low, x.min((0, 2, 3)))
    np.testing.assert_array_equal(found.values["x"].channel_high, x.max((0, 2, 3)))
    np.testing.assert_array_equal(found.values["y"].channel_largest(), np.abs((-h).max((2, 3))).max(0))
    assert found.values["h"].channel_low is None


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 4, 3)], ids=str)
def test_the_histogram_is_that_of_all_samples_in_one_pass(sizes: tuple[int, ...]) -> None:
    x = samples(12)
    found = collected(x, *sizes).values["x"].histogram
    expected = histogram_of(x)
    assert found is not None
    assert found.exponent == expected.exponent
    assert found.total == x.size
    assert np.abs(np.cumsum(found.counts) - np.cumsum(expected.counts)).max() <= 2  # float32 at the edges of bins


def test_of_a_large_map_some_elements_are_counted_of_every_row_column_and_channel() -> None:
    text = "net (float[batch, 8, 96, 96] x) => (float[batch, 8, 96, 96] y) { [a__Neg] y = Neg (x) }"
    plane = np.arange(96 * 96).reshape(96, 96) + 10_000 * np.arange(8)[:, None, None]
    x = np.stack([plane, -plane]).astype(np.float32)
    found = collect_statistics(network(text), [Wanted("x", histogram=True)], [{"x": x}], open_model).values["x"]
    assert (found.low, found.high) == (x.min(), x.max())
    assert found.histogram is not None
    assert 0.4 * COUNTED < found.histogram.total / len(x) <= COUNTED
    shares = np.cumsum(found.histogram.counts) / found.histogram.total
    assert np.abs(shares - np.cumsum(histogram_of(x).counts) / x.size).max() < 0.002


def test_a_norm_of_tokens_has_channels_along_its_last_axis() -> None:
    text = "net (float[batch, 3, 5, 6] x) => (float[batch, 3, 5, 6] y) { [a__Neg] y = Neg (x) }"
    x = normal(4, 3, 5, 6)
    found = collect_statistics(network(text), [Wanted("y", channel_axis=-1)], [{"x": x}], open_model)
    np.testing.assert_array_equal(found.values["y"].channel_high, (-x).max((0, 1, 2)))


def test_a_value_without_dimensions_has_a_range() -> None:
    text = "net (float[batch, 3] x) => (float y) <float s> { [a__ReduceMax] s = ReduceMax <keepdims: int = 0> (x) "
    model = network(text + "[b__Neg] y = Neg (s) }")
    found = collect_statistics(model, [Wanted("s", histogram=True)], [{"x": normal(2, 3)}], open_model)
    assert found.values["s"].high == normal(2, 3).max()


def test_a_batch_comes_back_as_numbers_and_not_as_activations() -> None:
    sizes = []

    def watched(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        opened = open_model(model)

        def call(feeds: Mapping[str, Array]) -> dict[str, Array]:
            outputs = opened(feeds)
            sizes.append(sum(o.size for name, o in outputs.items() if not name.endswith("/histogram")))
            return outputs

        return call

    collect_statistics(relu_net(), ALL, in_batches(samples(12), 5, 7), watched)
    assert sizes == [batch * 2 * (4 + 1 + 1 + 4) + 2 for batch in (5, 7)]


def test_one_batch_at_a_time_is_held() -> None:
    def batches() -> Iterator[dict[str, Array]]:
        before: list[weakref.ref[Array]] = []
        for seed in range(6):
            most.append(sum(r() is not None for r in before))
            x = normal(2, 4, 3, 3, seed=seed)
            before.append(weakref.ref(x))
            yield {"x": x}

    most: list[int] = []
    collect_statistics(relu_net(), ALL, batches(), open_model)
    assert max(most) <= 1


def test_the_model_stays_as_it_was() -> None:
    model = relu_net()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    collect_statistics(model, ALL, in_batches(normal(2, 4, 3, 3), 2), open_model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


# -- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=repr)
@pytest.mark.parametrize("wanted", [Wanted("x"), Wanted("x", histogram=True, channel_axis=1)], ids=["range", "all"])
def test_a_sample_that_makes_an_activation_infinite_is_named(bad: float, wanted: Wanted) -> None:
    x = normal(6, 4, 3, 3)
    x[4, 1, 1, 1] = bad
    with pytest.raises(UsageError, match="not finite") as caught:
        collect_statistics(relu_net(), [wanted], in_batches(x, 3, 3), open_model)
    assert caught.value.where == "x"
    assert "sample 4 " in str(caught.value.got)
    assert caught.value.exit_code == 2


def test_the_sample_is_named_where_a_value_holds_several_windows_of_each() -> None:
    text = "net (float[batch, 4, 6] x) => (float[rows, 6] y) <float[rows, 6] w> { [a__Reshape] w = Reshape (x, shape) "
    model = network(text + "[b__Neg] y = Neg (w) }", shape=np.array([-1, 6], np.int64))
    x = normal(5, 4, 6)
    x[3, 2, 1] = np.nan
    with pytest.raises(UsageError) as caught:
        collect_statistics(model, [Wanted("w")], [{"x": x}], open_model)
    assert "sample 3 " in str(caught.value.got)


def test_a_mask_of_the_lowest_numbers_is_finite() -> None:
    x = np.full((2, 4, 3, 3), np.finfo(np.float32).min)
    found = collect_statistics(relu_net(), [Wanted("x")], [{"x": x}], open_model)
    assert found.values["x"].low == np.finfo(np.float32).min


def test_calibration_without_a_sample_is_an_error() -> None:
    with pytest.raises(UsageError, match="no sample"):
        collected(samples(0))


def test_too_few_samples_are_counted() -> None:
    with pytest.raises(UsageError, match="too few") as caught:
        collect_statistics(relu_net(), ALL, in_batches(samples(5), 5), open_model, asked=64)
    assert caught.value.got == "5 samples were seen"
    assert str(caught.value.expected).startswith("64, which were asked for")
    assert caught.value.exit_code == 2
    assert collect_statistics(relu_net(), ALL, in_batches(samples(16), 8, 8), open_model, asked=64).samples == 16


def test_a_channel_that_is_always_zero_is_said() -> None:
    x = samples(4)
    x[:, 2] = 0
    (note,) = collected(x, 4).dead_channels()
    assert note.startswith("5 channels are always zero on the calibration data: x (2); y (0, 1, 2, ...)")


# -- the file --------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_collected(tmp_path: Path) -> None:
    found = collected(samples(6), 4, 2)
    save_statistics(found, tmp_path / "s.safetensors")
    require_equal(load_statistics(tmp_path / "s.safetensors", relu_net()), found)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("sizes", [(4, 4, 4), (3, 5, 4), (1,) * 12], ids=str)
def test_a_run_that_was_stopped_goes_on_from_the_file(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    path = tmp_path / "s.safetensors"
    x = samples(12)

    def stopping() -> Iterator[dict[str, Array]]:
        yield {"x": x[:4]}
        yield {"x": x[4:6]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_statistics(relu_net(), ALL, stopping(), open_model, path=path)
    assert load_statistics(path, relu_net()).samples == 6
    seen: list[int] = []

    def counting(model: ir.Model) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        run = open_model(model)
        return lambda feeds: (seen.append(len(feeds["x"])), run(feeds))[1]

    found = collect_statistics(relu_net(), ALL, in_batches(x, *sizes), counting, path=path)
    require_equal(found, collected(x, 4, 2, 6))
    assert sum(seen) == 6
    require_equal(load_statistics(path, relu_net()), found)


def test_more_samples_can_be_added_later(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    collect_statistics(relu_net(), ALL, in_batches(samples(12), 4), open_model, path=path)
    found = collect_statistics(relu_net(), ALL, in_batches(samples(12), 4, 4, 4), open_model, path=path)
    require_equal(found, collected(samples(12), 4, 4, 4))


def test_a_file_that_lacks_something_wanted_is_collected_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    collect_statistics(relu_net(), [Wanted("x")], in_batches(samples(4), 4), open_model, path=path)
    found = collect_statistics(relu_net(), ALL, in_batches(samples(4), 4), open_model, path=path)
    require_equal(found, collected(samples(4), 4))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_statistics(collected(samples(2), 2), tmp_path / "s")
    other = network(RELU_NET, axes=np.array([2, 3], np.int64), unused=np.ones(2, np.float32))
    with pytest.raises(UsageError, match="another model") as caught:
        collect_statistics(other, ALL, in_batches(samples(2), 2), open_model, path=tmp_path / "s")
    assert (caught.value.got, caught.value.expected) == (model_hash(relu_net()), model_hash(other))


def test_a_file_of_another_seed_is_refused(tmp_path: Path) -> None:
    save_statistics(collected(samples(2), 2), tmp_path / "s")
    with pytest.raises(UsageError, match="another seed"):
        collect_statistics(relu_net(), ALL, in_batches(samples(2), 2), open_model, seed=1, path=tmp_path / "s")


@pytest.mark.parametrize("damage", [b"", b"nothing", None], ids=["empty", "text", "cut"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "s"
    save_statistics(collected(samples(2), 2), path)
    path.write_bytes(path.read_bytes()[:-100] if damage is None else damage)
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load_statistics(path, relu_net())
    assert caught.value.where == str(path)


def test_a_bundles_file_is_read_without_its_model(tmp_path: Path) -> None:
    found = collected(samples(2), 2)
    save_statistics(found, tmp_path / "s")
    require_equal(load_statistics(tmp_path / "s", None), found)


def test_a_method_without_its_histogram_is_an_error() -> None:
    found = collected(samples(2), 2).values["g"]
    assert found.range().low == found.low
    with pytest.raises(ValueError, match="MSE needs a histogram"):
        found.range(RangeMethod.MSE)
