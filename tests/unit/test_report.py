"""The receipt on a terminal and on a page: what is said, what is escaped, and that nothing missing breaks it."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console, RenderableType

from attn_deploy.receipt import (
    Accuracy,
    BlockLoss,
    CandidateEntry,
    CaseParity,
    DataEntry,
    FrontierPoint,
    Latency,
    Memory,
    Parity,
    Peer,
    PlanPart,
    Receipt,
    Search,
    SiteEntry,
    SiteParity,
    SiteRun,
    Tuning,
    UnitTuning,
)
from attn_deploy.report import html, words, write_html
from attn_deploy.report.chart import latency_chart, nice_ticks
from attn_deploy.report.frontier import frontier_chart, search_sentence
from attn_deploy.report.html import render_html
from attn_deploy.report.levels import level_headings
from attn_deploy.report.sites import MANY_SITES, name_ranges, paired, site_rows
from attn_deploy.report.terminal import receipt_tables, sites_table

ESCAPE = "\x1b"


def site(module: str, *, operator: str | None = "PackedAttention", flops: int = 29_805_312) -> SiteEntry:
    skipped = operator is None
    return SiteEntry(
        kind="self-attention", module=module, source_line="timm/layers/attention.py:124", operator=operator,
        status="skipped" if skipped else "recognized", reason="several run-time values are added" if skipped else None,
        flops=0 if skipped else flops, bytes=0,
    )  # fmt: skip


def run_of(module: str, implementation: str = "native:PackedAttention") -> SiteRun:
    return SiteRun(module, implementation, "CPUExecutionProvider", ("PackedAttention",))


def latency(p50_ms: float, ci95_ms: tuple[float, float] | None = None) -> Latency:
    interval = ci95_ms or (0.9 * p50_ms, 1.1 * p50_ms)
    return Latency(1, 2, 24, p50_ms, 1.2 * p50_ms, 1.3 * p50_ms, p50_ms, interval)


def parity(sqnr_db: float, modules: tuple[str, ...] = ()) -> Parity:
    case = CaseParity("normal", 2, "logits", 1e-5, 1e-6, 0.999999, sqnr_db, judged=True, passed=True)
    sites = tuple(SiteParity(m, 1e-6, 1e-7, 0.999999, 131.5, passed=True) for m in modules)
    return Parity(2, 1e-5, 1e-6, 0.999999, sqnr_db, 0.995, (case,), sites)


def proven(id: str, precision: str, p50_ms: float, modules: tuple[str, ...]) -> CandidateEntry:
    return CandidateEntry(
        id=id, target="onnxruntime-cpu", precision=precision, status="passed", reason=None,
        sites=tuple(run_of(m) for m in modules),
        dtype_share={"int8": 0.834, "float32": 0.166}, weighted_dtype_share={"int8": 0.973, "float32": 0.027},
        exempt=("head/Gemm: the head",), storage={"int8": 5.3}, storage_mb=7.75, parity=parity(28.9, modules),
        accuracy=Accuracy("top1", 94.5, 95.0, 200), latency=latency(p50_ms), memory=Memory(94.2),
    )  # fmt: skip


FAILED = CandidateEntry(
    id="onnxruntime-cpu-int8", target="onnxruntime-cpu", precision="int8", status="failed",
    reason="output 'logits' on data: 17.3 dB, expected 20 dB or more",
)  # fmt: skip
NOT_RUN = CandidateEntry(
    id="tensorrt-fp16", target="tensorrt", precision="fp16", status="not_run", reason="no NVIDIA device"
)
EMPTY = Receipt(
    schema_version=1, source="demo", weights="", created="", command="", host={"cpu": None}, versions={},
    data=DataEntry(), sites=(), candidates=(), peers=(), chosen={},
)  # fmt: skip
MODULES = tuple(f"blocks.{index}.attn" for index in range(3))
FULL = replace(
    EMPTY,
    source="timm:vit_tiny",
    weights="vit_tiny.safetensors",
    created="2026-11-22T15:16:00+00:00",
    command="attn-deploy export timm:vit_tiny -o vit.attn",
    host={"cpu": "AMD EPYC", "logical_cores": 2, "machine_cores": 4, "cpu_quota": None},
    versions={"onnxruntime": "1.32.0"},
    data=DataEntry("/data/pets", 7, "by hash", calibration=64, judgement=200, labelled=True, unreadable=("a.png",)),
    sites=tuple(site(m) for m in MODULES),
    candidates=(proven("onnxruntime-cpu-fp32", "fp32", 60.0, MODULES), FAILED, NOT_RUN),
    peers=(
        Peer("plain ONNX Runtime", latency(90.0), 1.51, (1.24, 1.61), "faster"),
        Peer("eager PyTorch", latency(48.0), 0.8, (0.5, 0.9), "slower"),
        Peer("OpenVINO", latency(60.0), 1.01, (0.97, 1.05), "no difference"),
    ),
    chosen={"onnxruntime-cpu": "onnxruntime-cpu-fp32"},
    warnings=("the machine is loaded",),
)
PARTIAL = {
    "nothing": EMPTY,
    "no sites": replace(FULL, sites=(), candidates=(proven("c", "fp32", 60.0, ()),), chosen={"onnxruntime-cpu": "c"}),
    "all failed": replace(FULL, candidates=(FAILED,), chosen={}, peers=()),
    "all not run": replace(FULL, candidates=(NOT_RUN,), chosen={}, peers=()),
    "no data": replace(FULL, data=DataEntry()),
    "no peers": replace(FULL, peers=()),
    "no latency": replace(FULL, peers=(), candidates=(replace(FULL.candidates[0], latency=None, memory=None),)),
    "no figures": replace(
        FULL,
        candidates=(replace(FULL.candidates[0], parity=None, accuracy=None, latency=None, weighted_dtype_share={}),),
    ),
    "chosen is unknown": replace(FULL, chosen={"onnxruntime-cpu": "gone"}),
    "no module": replace(FULL, sites=(site(""), site("", operator=None))),
}


def shown(renderable: RenderableType, width: int = 140, *, colour: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=colour, color_system="standard" if colour else None).print(
        renderable
    )
    return stream.getvalue()


def flat(text: str) -> str:
    """One space for any white space: where a line is broken does not matter."""
    return " ".join(text.split())


class _Page(HTMLParser):
    """Checks that tags are closed in order, and keeps their names, attributes and text."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return flat(" ".join(self.words))


@pytest.mark.parametrize("width", [60, 80, 140])
@pytest.mark.parametrize("name", PARTIAL)
def test_a_terminal_shows_a_receipt_of_which_parts_are_missing(name: str, width: int) -> None:
    text = shown(receipt_tables(PARTIAL[name]), width)
    assert "None" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("name", PARTIAL)
def test_a_page_shows_a_receipt_of_which_parts_are_missing(name: str) -> None:
    assert "None" not in _Page(render_html(PARTIAL[name])).text


@pytest.mark.parametrize("width", [80, 140])
def test_a_terminal_says_what_was_chosen_and_what_it_costs(width: int) -> None:
    text = flat(shown(receipt_tables(FULL), width))
    for said in ("timm:vit_tiny", "warning: the machine is loaded", "AMD EPYC, 2 of 4 cores", "2026-11-22 15:16:00 UTC",
                 "* onnxruntime-cpu-fp32 passed 28.9 99.5 % 94.50 (95.00) 97.3 %", "7.8 60.0 72.0 94.2",
                 "native:PackedAttention"):  # fmt: skip
        assert said in text
    assert "64 samples calibrated, 200 judged 1 unreadable file passed over: a.png" in text


def test_a_page_says_the_same_and_more() -> None:
    text = _Page(render_html(FULL)).text
    for said in ("timm:vit_tiny", "Warning: the machine is loaded", "onnxruntime-cpu-fp32 chosen passed", "28.9 dB",
                 "94.50 (95.00)", "native:PackedAttention", "131.5", "head/Gemm : the head", "onnxruntime 1.32.0",
                 "attn-deploy export timm:vit_tiny -o vit.attn", "64 samples calibrated, 200 judged"):  # fmt: skip
        assert said in text


def test_a_candidate_without_proof_says_why_and_has_no_latency() -> None:
    for text in (shown(receipt_tables(FULL)), _Page(render_html(FULL)).text):
        assert f"onnxruntime-cpu-int8 failed: {FAILED.reason}" in flat(text)
        assert "tensorrt-fp16 not run: no NVIDIA device" in flat(text)
    chart = latency_chart(FULL)
    assert chart is not None
    assert [bar.name for bar in chart.bars] == [
        "onnxruntime-cpu-fp32", "plain ONNX Runtime", "eager PyTorch", "OpenVINO"
    ]  # fmt: skip


def test_nothing_chosen_says_which_way_it_came_to_that() -> None:
    assert words.chosen_line(EMPTY) == "nothing: no candidate was built"
    assert words.chosen_line(PARTIAL["all failed"]) == "nothing: no candidate passed"
    assert words.chosen_line(PARTIAL["all not run"]) == "nothing: no candidate could be run here"


def test_a_verdict_is_told_in_words_with_its_interval() -> None:
    faster, slower, same = FULL.peers
    assert words.verdict(faster) == "the chosen candidate is 1.51x faster [1.24, 1.61]"
    assert words.verdict(slower) == "the chosen candidate is 1.25x slower [1.11, 2.00]"
    assert words.verdict(same) == "the chosen candidate is neither faster nor slower: 1.01x [0.97, 1.05]"


def test_a_verdict_names_the_candidate_that_shared_the_peers_run() -> None:
    peer = replace(FULL.peers[0], against="tensorrt-fp16")
    assert words.verdict(peer) == "tensorrt-fp16 is 1.51x faster [1.24, 1.61]"


def test_a_peer_stands_beside_the_candidate_of_its_own_device_alone() -> None:
    on_gpu = replace(FULL.candidates[0], id="on-gpu", target="onnxruntime-cuda")
    receipt = replace(
        FULL, candidates=(*FULL.candidates, on_gpu), chosen={**FULL.chosen, "onnxruntime-cuda": "on-gpu"},
        peers=(replace(FULL.peers[0], name="plain CUDA", against="on-gpu"),),
    )  # fmt: skip
    pages = [html._tiles(receipt, c, index == 0) for index, (_, c) in enumerate(words.chosen_candidates(receipt))]
    assert [["plain CUDA" in tile.label for tile in tiles].count(True) for tiles in pages] == [0, 1]


def test_candidates_that_were_not_run_for_the_same_reason_share_a_line() -> None:
    others = tuple(replace(NOT_RUN, id=f"tensorrt-{p}") for p in ("fp32", "bf16"))
    text = flat(shown(receipt_tables(replace(FULL, candidates=(NOT_RUN, *others), chosen={}, peers=()))))
    assert "tensorrt-fp16, tensorrt-fp32, tensorrt-bf16 not run: no NVIDIA device" in text
    assert text.count("no NVIDIA device") == 1


def test_what_half_precision_costs_is_told_for_the_worst_block_and_those_put_back() -> None:
    blocks = (
        BlockLoss("layers.0", "a", 71.3),
        BlockLoss("layers.1", "b", 52.04),
        BlockLoss("layers.2", "c", 31.0, True, "why"),
    )
    told = "3 blocks by emulated rounding, the worst alone 52.0 dB (layers.1), 1 back in FP32"
    candidate = replace(NOT_RUN, blocks=blocks)
    assert words.half_blocks(candidate) == told
    assert (
        words.half_blocks(replace(candidate, blocks=blocks[2:]))
        == "1 blocks by emulated rounding, all of them back in FP32"
    )
    assert words.half_blocks(NOT_RUN) is None
    receipt = replace(FULL, candidates=(candidate,), chosen={}, peers=())
    for text in (shown(receipt_tables(receipt)), _Page(render_html(receipt)).text):
        assert told in flat(text)


TUNING = Tuning(
    cpu="AMD EPYC", threads=2, batch=1, ratio=1.31, ratio_ci95=(1.25, 1.36),
    units=(
        UnitTuning(tuple(f"blocks.{n}.attn/PackedAttention" for n in range(12)), "block",
                   {"stock": 661.2, "site": 377.0, "linear": 340.4, "block": 329.6}, 2.01, (1.92, 2.1)),
        UnitTuning(("head/Gemm",), "stock", {"stock": 20.0, "linear": 25.0}, 1.0, (1.0, 1.0)),
    ),
)  # fmt: skip


def test_levels_stand_with_their_times_and_gain_on_a_terminal_and_on_a_page() -> None:
    receipt = replace(FULL, candidates=(replace(FULL.candidates[0], tuning=TUNING), FAILED))
    page = render_html(receipt)
    for text in (flat(shown(receipt_tables(receipt))), flat(re.sub(r"<[^>]+>", " ", page))):
        assert "blocks.0-11.attn/PackedAttention (12) block 2.01x [1.92, 2.10] 661 377 340 330" in text
        assert "head/Gemm stock - 20 - 25 -" in text
        assert "measured on AMD EPYC with 2 threads, batch 1: 1.31x [1.25, 1.36] over stock" in text
    assert "Levels of onnxruntime-cpu-fp32" in page


def test_where_stock_was_kept_the_levels_say_so() -> None:
    kept = replace(TUNING, ratio=None, ratio_ci95=None)
    text = flat(shown(receipt_tables(replace(FULL, candidates=(replace(FULL.candidates[0], tuning=kept),)))))
    assert "stock is kept, than which nothing is clearly faster" in text


def test_headings_of_levels_keep_their_order_whichever_parts_have_them() -> None:
    rows = (UnitTuning(("a",), "stock", {"stock": 1.0, "block": 2.0}, 1.0, (1.0, 1.0)), *TUNING.units)
    assert level_headings(replace(TUNING, units=rows)) == ["stock", "site", "linear", "block"]
    assert level_headings(replace(TUNING, units=rows[::-1])) == ["stock", "site", "linear", "block"]


SEARCH = Search(
    cpu="AMD EPYC", threads=2, budget="28 dB or more, agreement 0.98 or more", ranked_by="noise", scored=32,
    verified=200,
    parts=(
        PlanPart("blocks.0.attn/PackedAttention", 2, 31.04, 2e-4, 210.4, quantized=False),
        PlanPart("blocks.1.attn/PackedAttention", 2, 38.0, 1e-5, 205.0, quantized=True),
        PlanPart("blocks.10.attn/PackedAttention", 2, 41.0, 1e-6, 198.0, quantized=True),
        PlanPart("patch_embed", 1, 44.0, None, -3.0, quantized=False),
    ),
    frontier=(
        FrontierPoint(3, 6, 29.9, 27.1, 0.97, 86.5, 4.1, 4.3, "output: 27.1 dB, budget 28 dB or more"),
        FrontierPoint(2, 4, 36.2, 35.9, 0.99, 87.0, 4.6, 4.7, None, chosen=True),
        FrontierPoint(0, 0, 200.0, 120.0, 1.0, 87.0, 5.0, 5.0, None),
    ),
    reverted=("blocks.0.attn/PackedAttention",),
)  # fmt: skip
SEARCHED = replace(FULL.candidates[0], search=SEARCH, schemes={"int8-per-token": 4, "float": 3})


def test_a_search_shows_its_plans_and_parts_on_a_terminal_and_on_a_page() -> None:
    receipt = replace(FULL, candidates=(SEARCHED, FAILED))
    page = render_html(receipt)
    for text in (flat(shown(receipt_tables(receipt), 200)), flat(re.sub(r"<[^>]+>", " ", page))):
        assert "budget 28 dB or more, agreement 0.98 or more. 4 parts scored on 32 samples, ranked by noise" in text
        assert "3 plans verified on 200: chosen has 4 of 7 layers in INT8" in text
        assert "after blocks.0.attn/PackedAttention went back to FP32" in text
        assert "4 35.9 36.2 99.0 % 87.00 4.70 4.60 chosen, keeps it" in text
        assert "6 27.1 29.9 97.0 % 86.50 4.30 4.10 misses: output: 27.1 dB, budget 28 dB or more" in text
        assert "blocks.1,10.attn/PackedAttention (2) 4 38.0 to 41.0 1e-06 to 1e-05 198 to 205 INT8" in text
        assert "4 int8-per-token, 3 float" in text


def test_dots_of_plans_stand_by_their_time_and_noise() -> None:
    chart = frontier_chart(SEARCH)
    assert chart is not None
    fast, chosen, float_ = chart.dots
    assert [dot.role for dot in chart.dots] == ["missed", "chosen", "kept"]
    assert chart.left < fast.x < chosen.x < float_.x <= chart.right
    assert chart.bottom > fast.y > chosen.y > float_.y >= chart.top
    assert (float_.x - chart.left) / (fast.x - chart.left) == pytest.approx(5.0 / 4.3, abs=0.01)
    untimed = tuple(replace(point, measured_ms=None) for point in SEARCH.frontier)
    assert frontier_chart(replace(SEARCH, frontier=untimed)) is None


def test_a_search_that_met_nothing_says_which_plan_is_nearest() -> None:
    text = search_sentence(replace(SEARCH, met=False, reverted=()))
    assert "none keeps the budget; the nearest has 4 of 7 layers in INT8" in text


def test_figures_keep_three_digits_and_never_round_up_to_all() -> None:
    assert [words.milliseconds(ms) for ms in (1234.5, 60.357, 6.0357, 0.12345)] == ["1234", "60.4", "6.04", "0.123"]
    assert [words.share(part) for part in (0.0, 1e-6, 0.973, 0.99999, 1.0)] == [
        "0 %", "0.1 %", "97.3 %", "99.9 %", "100 %"
    ]  # fmt: skip
    assert words.decibel(200.0) == "exact"
    assert words.megaflops(1234) == "0.0012"


def test_output_that_is_no_terminal_has_no_escape_codes_and_a_terminal_has_colours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    plain = io.StringIO()
    Console(file=plain, width=80).print(receipt_tables(FULL))
    assert ESCAPE not in plain.getvalue()
    assert "passed" in plain.getvalue()
    assert ESCAPE in shown(receipt_tables(FULL), colour=True)


HOSTILE = '<script>alert("x")</script>'
CURSOR = f"{ESCAPE}[2J"


def test_names_from_a_receipt_are_text_on_the_page_and_never_tags() -> None:
    candidate = replace(FULL.candidates[0], id=HOSTILE, reason=HOSTILE, exempt=(HOSTILE,), storage={HOSTILE: 1.0})
    hostile = replace(
        FULL, source=HOSTILE, weights=HOSTILE, command=HOSTILE, host={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE},
        sites=(site(HOSTILE), site(HOSTILE, operator=None)), warnings=(HOSTILE,), chosen={HOSTILE: HOSTILE},
        candidates=(candidate, replace(FAILED, reason=HOSTILE)), peers=(replace(FULL.peers[0], name=HOSTILE),),
        data=replace(FULL.data, path=HOSTILE, unreadable=(HOSTILE,), split=HOSTILE),
    )  # fmt: skip
    page = render_html(hostile)
    assert "script" not in _Page(page).tags
    assert page.count(HOSTILE) == 0
    assert "&lt;script&gt;" in page


def test_names_from_a_receipt_neither_style_nor_steer_the_terminal() -> None:
    receipt = replace(FULL, source=f"a[bold]b[/bold]{CURSOR}", sites=(site(f"m{CURSOR}[red]"),), warnings=(CURSOR,))
    text = shown(receipt_tables(receipt))
    assert "a[bold]b[/bold]?[2J" in text
    assert "m?[2J[red]" in text
    assert ESCAPE not in text
    assert ESCAPE not in render_html(receipt)


def test_the_page_is_whole_in_itself() -> None:
    page = _Page(render_html(FULL))
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import|https?://", render_html(FULL))
    assert "svg" in page.tags


def test_a_label_for_screen_readers_points_at_something() -> None:
    attributes = _Page(render_html(FULL)).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for value in (value for name, value in attributes if name == "aria-labelledby"):
        assert set((value or "").split()) <= set(ids)


def test_bars_stand_in_proportion_and_an_interval_beyond_the_axis_is_marked() -> None:
    wide = Peer("eager", latency(120.0, (80.0, 2000.0)), 2.0, (1.5, 30.0), "faster")
    chart = latency_chart(replace(FULL, peers=(wide,)))
    assert chart is not None
    chosen, peer = chart.bars
    assert (chosen.role, peer.role) == ("chosen", "peer")
    assert peer.width == pytest.approx(2 * chosen.width, rel=0.01)
    assert (chosen.clipped, peer.clipped) == (False, True)
    assert peer.high_x > peer.x + peer.width


def test_no_chart_is_drawn_where_nothing_was_measured() -> None:
    assert latency_chart(PARTIAL["all failed"]) is None
    assert "svg" not in _Page(render_html(PARTIAL["all failed"])).tags


@pytest.mark.parametrize("end", [0.0004, 0.7, 1.0, 83.0, 501.9, 12345.0])
def test_an_axis_has_a_handful_of_round_ticks(end: float) -> None:
    ticks = nice_ticks(end)
    assert 3 <= len(ticks) <= 7
    assert ticks[0] == 0
    assert ticks[-1] <= end


def test_many_equal_sites_are_drawn_together_unless_all_are_wanted() -> None:
    modules = [f"blocks.{index}.attn" for index in range(MANY_SITES + 1)]
    sites, runs = [site(m) for m in modules], [run_of(m) for m in modules]
    assert "blocks.0-16.attn (17)" in shown(sites_table(sites, runs))
    everything = shown(sites_table(sites, runs, all_sites=True))
    assert all(f"{module} " in everything for module in modules)
    assert "blocks.0-15" not in shown(sites_table(sites[:-1], runs))


def test_a_site_that_runs_otherwise_keeps_a_row_of_its_own() -> None:
    modules = [f"blocks.{index}.attn" for index in range(MANY_SITES + 2)]
    runs = [run_of(m, "inlined" if m == "blocks.4.attn" else "native:PackedAttention") for m in modules]
    rows = site_rows([site(m) for m in modules], runs)
    assert {(row.label, row.implementation) for row in rows} == {
        ("blocks.0-3,5-17.attn (17)", "native:PackedAttention"),
        ("blocks.4.attn", "inlined"),
    }


def test_a_range_stands_for_exactly_the_names_in_it() -> None:
    names = [f"layers.{layer}.blocks.{block}" for layer, depth in enumerate((2, 2, 6)) for block in range(depth)]
    assert name_ranges(names) == [("layers.0-1.blocks.0-1", 4), ("layers.2.blocks.0-5", 6)]
    assert name_ranges(["conv2.a", "conv2.b"]) == [("conv2.a", 1), ("conv2.b", 1)]
    assert name_ranges(["block01", "block02"]) == [("block01", 1), ("block02", 1)]


def test_several_sites_of_one_module_get_their_runs_in_order() -> None:
    sites = [site("se", operator="Gate"), site("se", operator=None), site("se", operator="Gate"), site("other")]
    first, second = run_of("se", "native:Gate"), run_of("se", "inlined")
    assert paired(sites, [first, second]) == [first, None, second, None]


@pytest.mark.parametrize("width", [80, 160])
def test_a_long_module_name_is_not_torn_while_a_line_has_room_for_it(width: int) -> None:
    module = "encoder.layers.encoder_layer_0.a_block_with_a_long_name.self_attention"
    text = shown(sites_table([site(module)], [run_of(module)]), width)
    assert module in text
    assert "attention.py:124" in text
    assert "29.8" in text


def test_a_skipped_site_shows_its_reason_and_no_sites_are_said_so() -> None:
    text = flat(shown(sites_table([site("blocks.0.attn", operator=None)], []), 200))
    assert "several run-time values are added skipped" in text
    assert "no attention was found" in shown(sites_table([], []))


def test_the_page_is_written_where_jinja2_is_installed(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert write_html(FULL, path)
    assert path.read_text(encoding="utf-8") == render_html(FULL)


def test_without_jinja2_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "attn_deploy.report.html")
    assert not write_html(FULL, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_another_missing_module_is_not_taken_for_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "attn_deploy.report.chart", None)
    monkeypatch.delitem(sys.modules, "attn_deploy.report.html")
    with pytest.raises(ModuleNotFoundError, match=re.escape("attn_deploy.report.chart")):
        write_html(FULL, tmp_path / "report.html")


def test_importing_the_report_loads_neither_rich_nor_jinja2() -> None:
    code = "import sys, attn_deploy.report; sys.exit(sorted({'rich', 'jinja2'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
