"""Which numbers a picture shows, for every operator and layout of tokens; and what is drawn from them."""

from __future__ import annotations

import numpy as np
import pytest

from attn_deploy.picture import bars, colours, heat_over_image, heat_table, normalized
from attn_deploy.weight_map import Layout, token_grid, weight_map


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (196, (224, 224), (0, 14, 14)),
        (197, (224, 224), (1, 14, 14)),
        (198, (224, 224), (2, 14, 14)),
        (201, (224, 224), (5, 14, 14)),
        (5, (32, 32), (1, 2, 2)),
        (32, (64, 128), (0, 4, 8)),
        (33, (64, 128), (1, 4, 8)),
        (50, (64, 128), (0, 5, 10)),
        (1, (32, 32), (0, 1, 1)),
        (30, (32, 32), (5, 5, 5)),
        (213, (224, 224), None),
        (65, (4, 4), None),
    ],
)
def test_tokens_lie_on_the_grid_with_the_fewest_before_it(
    tokens: int, size: tuple[int, int], grid: tuple[int, int, int] | None
) -> None:
    assert token_grid(tokens, *size) == grid


def softmax(*shape: int) -> np.ndarray:
    raw = np.exp(np.random.default_rng(0).standard_normal(shape))
    return raw / raw.sum(-1, keepdims=True)


def test_without_a_class_token_it_is_what_a_key_receives_from_all_queries() -> None:
    p = softmax(1, 2, 4, 4)
    found = weight_map("PackedAttention", p, None, (8, 8), 1)
    np.testing.assert_allclose(found.values, p[0].mean((0, 1)).reshape(2, 2))
    assert found.layout is Layout.IMAGE


def test_with_a_class_token_it_is_what_the_image_s_tokens_receive_from_it() -> None:
    p = softmax(1, 2, 5, 5)
    found = weight_map("Attention", p, None, (8, 8), 1)
    np.testing.assert_allclose(found.values, p[0, :, 0, 1:].mean(0).reshape(2, 2))
    assert "class token" in found.shows


def test_tokens_that_are_no_grid_are_bars() -> None:
    found = weight_map("Attention", softmax(1, 2, 3, 7), None, (9, 7), 1)
    assert (found.layout, found.values.shape) == (Layout.BARS, (7,))


def test_tokens_that_were_chosen_before_are_bars_although_they_would_fill_a_grid() -> None:
    found = weight_map("ContextPool", softmax(1, 1, 16), None, None, 1)
    assert (found.layout, found.values.shape) == (Layout.BARS, (16,))
    assert weight_map("HardAttention", np.eye(16)[:1], None, (8, 8), 1).layout is Layout.IMAGE


def test_windows_are_put_together_by_their_index_map() -> None:
    """Two overlapping windows of two tokens, and one with padding, over four tokens."""
    index = np.array([[0, 1], [1, 3], [2, -1]])
    p = np.zeros((1, 3, 1, 2, 2))
    p[0, :, 0] = [[[0.9, 0.1]] * 2, [[0.3, 0.7]] * 2, [[0.6, 0.4]] * 2]
    found = weight_map("PackedAttention", p, index, (2, 2), 1)
    np.testing.assert_allclose(found.values, [[0.9, 0.2], [0.6, 0.7]])
    assert found.layout is Layout.IMAGE


def test_windows_without_a_map_lie_side_by_side_as_a_table() -> None:
    p = softmax(2 * 4, 3, 4, 4)
    found = weight_map("PackedAttention", p, None, (8, 8), 2)
    assert (found.layout, found.values.shape) == (Layout.TABLE, (4, 4))
    np.testing.assert_allclose(found.values[:2, 2:], p[1].mean((0, 1)).reshape(2, 2))


@pytest.mark.parametrize(
    ("shape", "layout", "values"),
    [((1, 6, 1, 1), Layout.BARS, (6,)), ((1, 1, 3, 3), Layout.IMAGE, (3, 3)), ((1, 6, 3, 3), Layout.IMAGE, (3, 3)),
     ((1, 6, 3, 1), Layout.IMAGE, (3, 1)), ((1, 1, 6), Layout.BARS, (6,)), ((1, 4, 6), Layout.IMAGE, (2, 2))],
)  # fmt: skip
def test_a_gate_is_bars_per_channel_and_a_map_per_pixel(
    shape: tuple[int, ...], layout: Layout, values: tuple[int, ...]
) -> None:
    found = weight_map("Gate", softmax(*shape), None, (8, 8), 1)
    assert (found.layout, found.values.shape) == (layout, values)


def test_channels_and_branches_are_tables_and_pools_are_maps() -> None:
    assert weight_map("ChannelAttention", softmax(1, 2, 5, 5), None, (8, 8), 1).values.shape == (5, 5)
    branches = softmax(1, 6, 1, 1, 2)
    found = weight_map("BranchPool", branches, None, (8, 8), 1)
    np.testing.assert_array_equal(found.values, branches[0, :, 0, 0].T)
    assert weight_map("ContextPool", softmax(1, 3, 16), None, (8, 8), 1).values.shape == (4, 4)


def test_colours_rise_from_black_over_red_and_yellow_to_white() -> None:
    found = colours(np.array([0.0, 1 / 3, 2 / 3, 1.0, np.nan]))
    assert found.tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 255], [0, 0, 0]]
    assert normalized(np.full(3, 7.0)).tolist() == [0, 0, 0]
    assert normalized(np.array([1.0, 2.0, 3.0])).tolist() == [0, 0.5, 1]


def test_a_map_covers_the_whole_image_cell_by_cell() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    drawn = np.asarray(heat_over_image(image, np.array([[0.0, 0.0], [0.0, 1.0]]), ["x"]))
    heat = drawn[8:232, 240:464]
    assert heat[:112].max() == heat[112:, :112].max() == 0
    assert heat[112:, 112:].min() > 150
    assert drawn[8:232, 8:232].max() == 0


def test_tables_and_bars_are_as_large_as_their_numbers_need() -> None:
    assert heat_table(np.eye(3), ["x"]).size[0] >= 3 * 16
    assert bars(np.array([-1.0, 0.5]), ["a caption that is wider than two bars"]).size[0] > 100
    assert bars(np.linspace(0, 1, 500), ["x"]).size[0] >= 1000
