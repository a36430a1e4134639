"""The demo, exported once; and a command line that runs in this process with a short latency budget."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import attn_deploy.demo as demo
from attn_deploy import cli, latency, measuring, proving, searching, tuning

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models, as a source and in tests


@dataclass(frozen=True)
class Ran:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout; fails when there is anything else."""
        return json.loads(self.out)


def run_cli(*arguments: str | Path) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session", autouse=True)
def short_latency() -> Iterator[None]:
    """The figures are not judged here, so a second of them is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "LATENCY_BUDGET_S", 1.0)
        patch.setattr(proving, "measure", functools.partial(latency.measure, warmup_s=0.02, pause_s=0.0))
        patch.setattr("attn_deploy.validation.LATENCY_BUDGET_S", 1.0)
        patch.setattr("attn_deploy.graph_export.TUNING_BUDGET_S", 1.0)
        for module in (tuning, searching):
            patch.setattr(module, "measure", functools.partial(latency.measure, warmup_s=0.02, pause_s=0.0))
        patch.setattr(searching, "GAIN_SECONDS", 0.5)
        patch.setattr(searching, "POINT_SECONDS", 0.1)
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture(scope="session")
def attn_deploy_cli() -> Callable[..., Ran]:
    return run_cli


@pytest.fixture(scope="session")
def demo_export(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`attn-deploy export` of the demo in FP32 and INT8, with --json."""
    out = tmp_path_factory.mktemp("demo") / "demo.attn"
    ran = run_cli(
        "export", "--out", out, "--data", demo.HELD_OUT, "--precision", "fp32", "--precision", "int8",
        "--calibration-samples", "32", "--eval-samples", "32", "--threads", "1", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.out + ran.err
    return ran


@pytest.fixture(scope="session")
def demo_bundle(demo_export: Ran) -> Path:
    return Path(demo_export.json["bundle"])
