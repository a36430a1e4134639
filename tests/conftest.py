"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skip", action="store_true", help="a skipped test is a failure")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    outcome = yield
    report = outcome.get_result()
    if report.skipped and item.config.getoption("--no-skip"):
        report.outcome = "failed"
        report.longrepr = f"skipped, and --no-skip was given: {report.longrepr}"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real weights and images; tests that need them are marked real_data."""
    folder = os.environ.get("ATTN_DEPLOY_DATA")
    if not folder:
        pytest.skip("ATTN_DEPLOY_DATA is not set: real weights and images are not at hand")
    return Path(folder)
