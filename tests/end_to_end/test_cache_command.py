"""`attn-deploy cache` on a cache folder of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attn_deploy.runtimes.device_cache import DeviceCache

Cli = Callable[..., Any]
KEY = {"model": "ab" * 32, "gpu": "NVIDIA H200", "tensorrt": "11.4.0"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_an_empty_cache_is_listed_as_such(attn_deploy_cli: Cli, tmp_path: Path) -> None:
    ran = attn_deploy_cli("cache", "list")
    assert ran.code == 0
    assert "0 entries, 0.0 of at most" in ran.out
    assert str(tmp_path / "attn-deploy") in ran.out.replace("\n", "")


def test_an_entry_is_listed_with_what_it_depends_on_and_its_size(attn_deploy_cli: Cli) -> None:
    assert DeviceCache().put("tensorrt-engine", KEY, bytes(2_500_000))
    listed = attn_deploy_cli("cache", "list", "--json").json
    (entry,) = listed["entries"]
    assert (entry["kind"], entry["key"]) == ("tensorrt-engine", KEY)
    assert 2_500_000 < entry["size"] < 2_510_000
    shown = attn_deploy_cli("cache", "list").out
    assert "NVIDIA H200" in shown
    assert "1 entry, 2.5 of at most" in shown


def test_clear_frees_everything_and_says_how_much(attn_deploy_cli: Cli) -> None:
    DeviceCache().put("tensorrt-engine", KEY, bytes(1_000_000))
    freed = attn_deploy_cli("cache", "clear", "--json").json["freed_bytes"]
    assert 1_000_000 < freed < 1_010_000
    assert attn_deploy_cli("cache", "list", "--json").json["entries"] == []
    assert DeviceCache().get("tensorrt-engine", KEY) is None
