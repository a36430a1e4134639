"""What is tried, what is kept, and what is said when a fault is looked for."""

from __future__ import annotations

import numpy as np
import pytest

from attn_deploy.localizing import SHOWN, BlockParity, Localization, _Kept, _Ranking, telling_case
from attn_deploy.parity import Case
from attn_deploy.receipt import CaseParity

CASES = [Case("normal", {"x": np.zeros(1)}, typical=True), Case("masked rows", {"x": np.ones(1)}, typical=False)]


def row(name: str, *, passed: bool, judged: bool = True) -> CaseParity:
    return CaseParity(name, 1, "y", 0.0, 0.0, 1.0, 50.0, judged=judged, passed=passed)


def block(module: str, sqnr_db: float, floor_db: float = 80.0) -> BlockParity:
    return BlockParity(module, ("Conv",), (), "fp32", 0.1, 0.1, 1.0, sqnr_db, floor_db, passed=sqnr_db >= floor_db)


def found(
    first: BlockParity | None, worst: tuple[BlockParity, ...] = (), pytorch_db: float | None = None
) -> Localization:
    return Localization("fp32", "a reference", "normal", 7, int(first is not None), first, worst, pytorch_db)


@pytest.mark.parametrize(
    ("rows", "data", "expected"),
    [
        ([row("normal", passed=True), row("masked rows", passed=False)], True, "masked rows"),
        ([row("normal", passed=True), row("masked rows", passed=False, judged=False)], False, "normal"),
        ([row("normal", passed=True), row("data", passed=False)], True, "data"),
        ([row("normal", passed=True)], True, "data"),
        ([], False, "normal"),
    ],
)
def test_a_fault_is_looked_for_where_it_showed(rows: list[CaseParity], data: bool, expected: str) -> None:
    assert telling_case(rows, CASES, (lambda: {"x": np.full(1, 2.0)}) if data else None).name == expected


def test_the_first_is_first_in_the_graph_whatever_the_order_of_the_runs() -> None:
    ranking = _Ranking()
    decibels = {0: 200.0, 1: 90.0, 2: 30.0, 3: 10.0, 4: 120.0, 5: 95.0, 6: 85.0, 7: 150.0, 8: 160.0}
    for order in (3, 8, 2, 0, 1, 4, 7, 6, 5):
        ranking.add(_Kept(order, block(f"m{order}", decibels[order]), b"", {}))
    assert ranking.first is not None
    assert ranking.first.row.module == "m2"
    assert ranking.failed == 2
    kept = sorted(ranking.worst, key=lambda k: k.row.margin_db)
    assert [k.row.module for k in kept] == ["m3", "m6", "m1", "m5", "m4"]
    assert len(kept) == SHOWN - 1


def test_the_margin_and_not_the_figure_ranks_blocks_of_different_arithmetic() -> None:
    ranking = _Ranking()
    for order, (sqnr_db, floor_db) in enumerate([(82.0, 80.0), (25.0, 20.0)]):
        ranking.add(_Kept(order, block(f"m{order}", sqnr_db, floor_db), b"", {}))
    assert [k.row.module for k in sorted(ranking.worst, key=lambda k: k.row.margin_db)] == ["m0", "m1"]


def test_the_sentence_names_the_module_with_its_numbers() -> None:
    assert found(block("blocks.1.attn", 12.34)).verdict() == (
        "module blocks.1.attn (Conv): 12.3 dB, max error 0.1, expected 80 dB or more"
    )
    assert found(block("", 1.0)).verdict().startswith("module (top level)")


def test_when_every_block_holds_it_says_so_and_what_is_nearest_to_failing() -> None:
    assert found(None).verdict() == "each of the 7 blocks alone is within its tolerance"
    assert found(None, (block("a", 200.0),)).verdict() == "each of the 7 blocks alone is within its tolerance"
    assert "least margin is module a (Conv): 90.0 dB" in found(None, (block("a", 90.0),)).verdict()


def test_a_reference_that_is_not_its_source_is_told_from_lowering() -> None:
    assert "the fault is in capture, rewriting or conversion" in found(None, pytorch_db=12.0).verdict()
    assert "capture" not in found(None, pytorch_db=120.0).verdict()
