"""What cannot be exported ends in an error that says where and what to do, or in a skip with a reason: never in a
wrong fusion."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from attn_deploy.cli import main
from attn_deploy.errors import CaptureError
from attn_deploy.export.capture import CapturedModel
from attn_deploy.export.interpret import run
from attn_deploy.export.recognize import recognize
from attn_deploy.export.rewrite import rewrite
from attn_deploy.inputs import make_feeds

sys.path.insert(0, str(Path(__file__).parent))  # for bad_models, as a source and in tests

import bad_models

Capture = Callable[..., CapturedModel]
X = f"x=1x{bad_models.TOKENS}x{bad_models.DIM}"


def inspect(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["inspect", *arguments])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("steer", [bad_models.Branch, bad_models.Loop])
def test_data_dependent_control_flow_is_an_error_with_module_and_line(
    steer: type[nn.Module], captured: Capture
) -> None:
    with pytest.raises(CaptureError) as caught:
        captured(bad_models.Steered(steer()), X)
    assert caught.value.where is not None
    assert caught.value.where.startswith("module inner.steer, ")
    assert "bad_models.py:" in caught.value.where
    assert "torch.where" in str(caught.value.next_step)


def test_torch_s_own_print_of_the_graph_is_not_shown(captured: Capture, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError):
        captured(bad_models.Steered(bad_models.Branch()), X)
    assert capsys.readouterr().err == ""


def test_a_size_that_follows_from_values_is_an_error_though_torch_export_takes_it(captured: Capture) -> None:
    with pytest.raises(CaptureError, match="size depends on the values") as caught:
        captured(bad_models.Steered(bad_models.Selection()), X)
    assert caught.value.where is not None
    assert caught.value.where.startswith("module inner.steer, ")
    assert "bad_models.py:" in caught.value.where


@pytest.mark.parametrize(
    "mix",
    [
        bad_models.functional_dropout,
        bad_models.dropout_put_in_training_mode,
        bad_models.fused_dropout,
        bad_models.noise,
    ],
)
def test_random_numbers_in_evaluation_mode_are_an_error_that_names_the_module(
    mix: bad_models.Mix, captured: Capture
) -> None:
    with pytest.raises(CaptureError, match="random numbers") as caught:
        captured(bad_models.Model(mix), X)
    assert caught.value.where is not None
    assert caught.value.where.startswith("module block, ")
    assert "bad_models.py:" in caught.value.where


def test_dropout_outside_training_is_none(captured: Capture) -> None:
    layer = nn.TransformerEncoderLayer(bad_models.DIM, 2, 32, dropout=0.3, batch_first=True)
    assert captured(layer, f"src=1x{bad_models.TOKENS}x{bad_models.DIM}").outputs == ("output",)


@pytest.mark.parametrize("mix", [bad_models.mask_added, bad_models.mask_fused])
@pytest.mark.parametrize("shape", ["6x6", "2x1x6x6", "1x4x6x6", "4x6x6"])
def test_a_mask_of_any_rank_that_broadcasts_is_computed_as_the_model_does(
    shape: str, mix: bad_models.Mix, captured: Capture
) -> None:
    """Ranks 2 and 3 are not [batch, heads, query, key]; PyTorch broadcasts them: a third axis are the heads."""
    model = captured(bad_models.Masked(mix), f"x=2x{bad_models.TOKENS}x{bad_models.DIM}", f"mask={shape}", dims={})
    rewritten = rewrite(model, recognize(model))
    assert len(rewritten.sites) + len(rewritten.skipped) == 1
    feeds = make_feeds(model.inputs, batch=None, seed=3)
    (expected,) = model.reference(feeds).values()
    (got,) = run(rewritten.program, {name: torch.from_numpy(value) for name, value in feeds.items()}).outputs
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_wrong_rank_is_an_error_of_the_model_with_its_line() -> None:
    code, _, error = inspect("bad_models:masked", "--weights", "init:0")
    assert code == 2
    assert "the model does not run on its example" in error
    assert "module block, " in error
    assert "mask=[2, 1, 1, 6, 6]" in error


def test_active_dropout_is_told_by_the_command_line() -> None:
    code, _, error = inspect("bad_models:with_dropout")
    assert code == 2
    assert "the model draws random numbers in evaluation mode" in error
    assert "training=self.training" in error


def test_control_flow_is_told_by_the_command_line() -> None:
    code, _, error = inspect("bad_models:branching")
    assert code == 2
    assert "module inner.steer, " in error


@pytest.mark.parametrize(
    ("source", "arguments", "says"),
    [
        ("timm:maxvit_tiny_tf_224", ("depths=(1,)", "embed_dim=(32,)", "stem_width=8"), "divisible by window"),
    ],
)
def test_a_resolution_that_the_windows_do_not_divide_is_an_error_with_the_module(
    source: str, arguments: tuple[str, ...], says: str
) -> None:
    options = [option for argument in arguments for option in ("--source-arg", argument)]
    code, _, error = inspect(source, *options, "--input", "x=1x3x200x200")
    assert code == 2
    assert "the model does not run on its example" in error
    assert says in error
    assert "check --input" in error


def test_windows_that_do_not_fit_are_an_error_and_windows_that_do_are_found() -> None:
    code, _, error = inspect("bad_models:image_model", "--input", "x=1x16x10x8")
    assert code == 2
    assert "module (root), " in error
    assert "bad_models.py:" in error
    code, out, _ = inspect("bad_models:image_model", "--weights", "init:0", "--json")
    assert code == 0
    assert [site["status"] for site in json.loads(out)["sites"]] == ["recognized"]
