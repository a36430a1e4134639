"""Tuning: which nodes are whose, which level is kept, and a whole run on models whose fastest levels are known."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from attn_deploy import environment, latency, tuning
from attn_deploy.built import Built
from attn_deploy.errors import UnavailableError
from attn_deploy.latency import Comparison, Measurement
from attn_deploy.progress import Silent
from attn_deploy.report.levels import tuning_sentence
from attn_deploy.runtimes.onnxruntime_profile import nodes_by_call
from attn_deploy.session import TensorSpec
from attn_deploy.target import Precision, Target
from attn_deploy.tuning import CHOSEN, STOCK, Tuned, is_tuned, kept_system, tune, tuned_levels
from attn_deploy.unit_times import GroupTimes, group_times, unit_of_each


@dataclass(frozen=True)
class Part:
    name: str
    levels: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Ran:
    """A node of a profiled call."""

    name: str
    time_us: float = 1.0
    op_type: str = "MatMul"


def part(name: str, *nodes: str, levels: tuple[str, ...] = ("stock", "site", "block")) -> Part:
    return Part(name, levels, nodes or (f"{name}/MatMul",))


def samples(median_ms: float, rounds: int = 12) -> np.ndarray:
    """[rounds, calls] with noise of a thousandth."""
    return median_ms * (1 + np.random.default_rng(0).normal(0, 1e-3, (rounds, 3)))


def group(**median_ms: float) -> GroupTimes:
    """Two units of these times together."""
    return GroupTimes(("a", "b"), {k: np.stack([samples(500 * v)] * 2, axis=-1) for k, v in median_ms.items()})


# -- whose node it is ------------------------------------------------------------------------------------------------


def test_a_node_belongs_to_the_unit_from_whose_node_it_was_made() -> None:
    units = [part("a", "a.qkv/MatMul", "a/Gate"), part("b", "b/MatMul")]
    names = ["a.qkv/MatMul/MatMulAddFusion", "a/Gate", "a/Gate/Mul_0", "b/MatMul_nchwc", "c/MatMul", "b/MatMulNBits"]
    assert unit_of_each(units, [Ran(n) for n in names]) == [0, 0, 0, 1, None, None]


def test_a_second_operator_of_its_kind_in_a_module_is_not_the_first_ones() -> None:
    units = [part("a", "m/Gate"), part("b", "m/Gate_2")]
    names = ["m/Gate/Mul", "m/Gate_2/Mul", "m/Gate_3/Mul"]
    assert unit_of_each(units, [Ran(n) for n in names]) == [0, 1, None]


def test_a_change_of_layout_is_charged_to_what_needs_the_plain_one() -> None:
    def reorder(op_type: str) -> Ran:
        return Ran("token_7", op_type=op_type)

    nodes = [Ran("conv"), reorder("ReorderOutput"), reorder("ReorderOutput"), Ran("m/Gate"), reorder("ReorderInput")]
    assert unit_of_each([part("a", "m/Gate")], [*nodes, Ran("conv_2")]) == [None, 0, 0, 0, 0, None]
    assert unit_of_each([part("a", "m/Gate")], [reorder("ReorderInput"), Ran("conv")]) == [None, None]


# -- times of groups -------------------------------------------------------------------------------------------------


def test_the_times_of_alike_units_are_summed_and_what_recording_costs_is_taken_off() -> None:
    units = [[part("a"), part("b")], [part("c")]]
    recording_us = 4.0

    def call(a: float, b: float, c: float) -> list[Ran]:
        times = {"a/MatMul": a, "b/MatMul/Gemm": b, "c/MatMul": c, "reshape": 0.0}
        return [Ran(name, time_us + recording_us) for name, time_us in times.items()]

    stock, block = [call(100, 300, 50)] * 12, [call(100, 100, 75)] * 12
    first, second = group_times(units, {"stock": stock, "block": block}, rounds=6)
    assert first.units == ("a", "b")
    assert first.samples_us["stock"].shape == (6, 2, 2)
    assert first.time_us("stock") == pytest.approx(200, abs=1)
    assert first.gain("block", "stock") == (pytest.approx(2, abs=0.02), (pytest.approx(2, abs=0.02),) * 2)
    assert second.time_us("block") == pytest.approx(75, abs=1)


def test_a_level_that_a_group_has_not_is_not_measured_for_it() -> None:
    units = [[part("a", levels=("stock", "block"))]]
    calls = {level: [[Ran("a/MatMul", 10.0)]] * 6 for level in ("stock", "site", "block")}
    assert group_times(units, calls, rounds=6)[0].levels == ("stock", "block")


def test_a_unit_of_which_nothing_is_left_still_has_a_ratio() -> None:
    calls = {"stock": [[Ran("x", 1.0)]] * 6, "site": [[Ran("x", 1.0)]] * 6}
    (found,) = group_times([[part("a", levels=("stock", "site"))]], calls, rounds=6)
    assert found.fastest() == "stock"


def test_a_profile_is_split_at_the_end_of_each_call() -> None:
    def node(name: str) -> dict[str, object]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": 5, "args": {"op_name": "Add"}}

    end = {"cat": "Session", "name": "model_run"}
    events = [{"cat": "Session", "name": "session_initialization"}, node("a"), node("b"), end, node("a"), end]
    assert [[n.name for n in call] for call in nodes_by_call(events)] == [["a", "b"], ["a"]]


def test_calls_that_another_process_disturbed_do_not_change_what_is_chosen() -> None:
    """Half of the calls of the faster level take up to thirty times as long."""
    random = np.random.default_rng(1)
    disturbed = np.where(random.random((12, 3, 2)) < 0.5, random.uniform(1, 30, (12, 3, 2)), 1.0)
    found = GroupTimes(("a", "b"), {"stock": np.full((12, 3, 2), 100.0), "site": 50.0 * disturbed})
    assert found.time_us("site") == 50
    assert found.fastest() == "site"


# -- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times_ms", "level"),
    [
        ({"stock": 1.0, "site": 0.8, "block": 0.5}, "block"),
        ({"stock": 1.0, "site": 0.5, "block": 0.8}, "site"),
        ({"stock": 1.0, "site": 1.2, "block": 1.4}, "stock"),
        ({"stock": 1.0, "site": 0.995, "block": 0.99}, "stock"),
        ({"stock": 1.0, "site": 0.5, "block": 0.495}, "site"),
        ({"stock": 1.0, "site": 0.97, "block": 0.94}, "block"),
    ],
    ids=["coarsest", "finer is faster", "stock is faster", "a tie", "a tie with a finer one", "small gains"],
)
def test_the_plainest_of_the_fastest_levels_is_chosen(times_ms: dict[str, float], level: str) -> None:
    assert group(**times_ms).fastest() == level


def test_only_allowed_levels_are_chosen_from() -> None:
    found = group(stock=1.0, site=0.8, block=0.5)
    assert found.fastest(("stock", "site")) == "site"
    assert group(stock=1.0, block=0.5).fastest(("stock", "site")) == "stock"


@pytest.mark.parametrize(
    ("times_ms", "kept"),
    [
        ({STOCK: 10.0, "block": 9.0, CHOSEN: 8.0}, CHOSEN),
        ({STOCK: 10.0, "site": 8.5, "block": 8.0, CHOSEN: 9.0}, "block"),
        ({STOCK: 10.0, "block": 8.95, CHOSEN: 9.0}, CHOSEN),
        ({STOCK: 10.0, "block": 12.0, CHOSEN: 11.0}, STOCK),
    ],
    ids=[
        "the chosen",
        "the fastest of those clearly faster",
        "not what is hardly faster",
        "stock where ours is slower",
    ],
)
def test_whole_models_decide_what_is_kept(times_ms: dict[str, float], kept: str) -> None:
    assert kept_system(Measurement({name: samples(ms) for name, ms in times_ms.items()}), CHOSEN) == kept


def tuned(uniform: str | None, *groups: GroupTimes) -> Tuned:
    levels = {unit: of.fastest() for of in groups for unit in of.units}
    against = Comparison(CHOSEN, STOCK, 1.5, (1.4, 1.6), "faster")
    return Tuned(levels, uniform, "block", groups, None if uniform == STOCK else against, threads=2, batch=1)


def candidate(suffix: str, precision: Precision = Precision.FP32) -> Built:
    target = Target.ONNXRUNTIME_CPU
    return Built(f"{target}-{precision}{suffix}", target, precision, (), True, ())


@pytest.mark.parametrize(
    ("uniform", "suffix"), [("stock", ""), ("block", "-native"), ("site", "-tuned"), (None, "-tuned")]
)
def test_the_candidate_at_the_kept_levels_is_told_by_its_id(uniform: str | None, suffix: str) -> None:
    found = tuned(uniform, group(stock=1.0, site=0.5, block=0.8))
    suffixes = ("", "-native", "-tuned", "-blocked")
    assert [s for s in suffixes if is_tuned(candidate(s), found)] == [suffix]
    assert not is_tuned(candidate(suffix, Precision.INT8), found)


def in_both(**median_ms: float) -> GroupTimes:
    """Of units with levels in INT8, called c and d; `linear_int8` is the level linear-int8."""
    return GroupTimes(("c", "d"), group(**{k.replace("_", "-"): v for k, v in median_ms.items()}).samples_us)


def test_each_precision_gets_the_faster_of_its_own_levels() -> None:
    """In INT8 a unit without a level in INT8 is what is fastest in floating point."""
    gate = group(stock=1.0, site=0.8)
    for times, floating, int8 in (
        ({"stock": 1.0, "block": 0.5, "linear_int8": 0.3, "block_int8": 0.2}, "block", "block"),
        ({"stock": 1.0, "block": 0.5, "linear_int8": 0.3, "block_int8": 0.35}, "block", "linear"),
        ({"stock": 1.0, "block": 1.5, "linear_int8": 1.3, "block_int8": 1.2}, "stock", "block"),
    ):
        both = in_both(**times)
        levels = {unit: level for unit, level in (("c", floating), ("d", floating), ("a", "site"), ("b", "site"))}
        found = Tuned(levels, None, "block", (gate, both), None, threads=2, batch=1)
        assert tuned_levels(found) == {
            Precision.FP32: levels,
            Precision.INT8: {"a": "site", "b": "site", "c": int8, "d": int8},
        }


@pytest.mark.parametrize(
    ("block_int8", "suffix"), [(0.2, "-native"), (0.4, "-tuned")], ids=["the coarsest", "a finer level"]
)
def test_the_candidate_in_int8_at_the_kept_levels_is_told_by_its_id(block_int8: float, suffix: str) -> None:
    gate = group(stock=1.0, site=0.8)
    both = in_both(stock=1.0, block=0.5, linear_int8=0.3, block_int8=block_int8)
    found = Tuned({}, None, "block", (gate, both), None, threads=2, batch=1)
    suffixes = ("", "-native", "-tuned", "-blocked")
    assert [s for s in suffixes if is_tuned(candidate(s, Precision.INT8), found)] == [suffix]
    only_floating = Tuned({}, None, "block", (gate,), None, threads=2, batch=1)
    assert not any(is_tuned(candidate(s, Precision.INT8), only_floating) for s in suffixes)


def test_the_entry_of_each_precision_has_its_own_levels() -> None:
    both = in_both(stock=1.0, block=0.5, linear_int8=0.3, block_int8=0.2)
    found = Tuned({"c": "block", "d": "block"}, "block", "block", (both,), None, threads=2, batch=1)
    (floating,), (int8,) = (found.entry(p).units for p in (Precision.FP32, Precision.INT8))
    assert (floating.level, list(floating.times_us)) == ("block", ["stock", "block"])
    assert (int8.level, list(int8.times_us)) == ("block-int8", ["stock", "block", "linear-int8", "block-int8"])
    assert int8.gain == pytest.approx(5, rel=0.01)
    sentence = tuning_sentence(found.entry(Precision.INT8))
    assert "INT8" in sentence
    assert "stock is kept" not in sentence


def test_the_entry_has_a_row_for_alike_units_with_level_gain_and_every_time() -> None:
    (row,) = tuned("site", group(stock=1.0, site=0.5, block=0.8)).entry().units
    assert (row.units, row.level) == (("a", "b"), "site")
    assert row.times_us == {"stock": pytest.approx(500, rel=0.01), "site": pytest.approx(250, rel=0.01),
                            "block": pytest.approx(400, rel=0.01)}  # fmt: skip
    assert row.gain == pytest.approx(2, rel=0.01)
    assert row.gain_ci95[0] <= row.gain <= row.gain_ci95[1]


# -- whole runs on models whose fastest levels are known ---------------------------------------------------------------


SIDE = 128


@dataclass(frozen=True)
class Chains:
    """Units that are chains of products [1, SIDE, SIDE]; `lengths`: unit -> level -> how many."""

    lengths: Mapping[str, Mapping[str, int]]

    @property
    def groups(self) -> Sequence[Sequence[Part]]:
        return [[Part(name, tuple(of), (f"{name}/MatMul",))] for name, of in self.lengths.items()]

    levels = ("stock", "site")
    inputs = (TensorSpec("x", "float32", (1, SIDE, SIDE)),)
    outputs = (TensorSpec("y", "float32", (1, SIDE, SIDE)),)

    def uniform(self, level: str) -> dict[str, str]:
        return dict.fromkeys(self.lengths, level)

    def save(self, levels: Mapping[str, str], path: Path) -> tuple[Path, ...]:
        chain = [(name, n) for name, of in self.lengths.items() for n in range(of[levels[name]])]
        values = ["x", *(f"v{n}" for n in range(1, len(chain)))]
        lines = [
            f"[{name}_{n}] {after} = MatMul ({before}, x)"
            for (name, n), before, after in zip(chain, values, [*values[1:], "y"], strict=True)
        ]
        shape = f"float[1, {SIDE}, {SIDE}]"
        body = "\n".join(lines)
        model = onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["": 20]> g ({shape} x) => ({shape} y) {{ {body} }}'
        )
        for node, (name, n) in zip(model.graph.node, chain, strict=True):
            node.name = f"{name}/MatMul/part{n}"
        path.write_bytes(model.SerializeToString())
        return (path,)


@pytest.fixture(autouse=True)
def short_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of calls and not by time, of which a loaded machine gives too little."""
    measured = functools.partial(latency.measure, warmup_s=0.01, pause_s=0.0, rounds=15, calls_per_round=7)
    monkeypatch.setattr(tuning, "measure", measured)


def run(model: Chains, **options: float) -> Tuned | None:
    feeds = {"x": np.eye(SIDE, dtype=np.float32)[None]}
    return tune(model, feeds, threads=1, seconds=1e6, progress=Silent(), **options)


def test_each_part_gets_the_level_that_is_fastest_in_the_whole_model() -> None:
    found = run(Chains({"a": {"stock": 12, "site": 2}, "b": {"stock": 2, "site": 12}}))
    assert found is not None
    assert found.levels == {"a": "site", "b": "stock"}
    assert found.uniform is None
    assert found.against_stock is not None
    assert found.against_stock.ratio > 1.5


def test_a_level_that_is_slower_is_not_kept() -> None:
    found = run(Chains({"a": {"stock": 2, "site": 12}}))
    assert found is not None
    assert (found.levels, found.uniform, found.against_stock) == ({"a": "stock"}, STOCK, None)


def test_a_level_that_is_faster_everywhere_is_kept_as_that_level() -> None:
    found = run(Chains({"a": {"stock": 12, "site": 2}, "b": {"stock": 12, "site": 3}}))
    assert found is not None
    assert found.uniform == "site"


def test_what_is_fast_in_parts_and_slow_as_a_whole_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run has the last word: here it sees another model at the levels that the first one chose."""
    model = Chains({"a": {"stock": 9, "site": 2}})
    monkeypatch.setattr(tuning, "_whole_models", lambda *_: Measurement({STOCK: samples(1.0), "site": samples(1.5)}))
    found = run(model)
    assert found is not None
    assert found.uniform == STOCK


def test_nothing_is_measured_where_there_is_nothing_to_win() -> None:
    assert run(Chains({})) is None
    assert run(Chains({"a": {"stock": 1, "site": 1}}), min_call_ms=1e6) is None


def test_a_model_of_which_a_session_of_every_level_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "host", lambda: {"memory_total_mb": 0})
    with pytest.raises(UnavailableError, match="not enough memory"):
        run(Chains({"a": {"stock": 1, "site": 1}}))
