"""The cache of artifacts that belong to this host: nothing damaged, foreign or too large comes out of it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from attn_deploy.runtimes.device_cache import MAGIC, DeviceCache, default_folder

KIND = "tensorrt-engine"
KEY = {"model": "abc", "tensorrt": "11.4.0", "gpu": "H200 GPU-1", "driver": "580.1", "options": "{}"}


@pytest.fixture
def cache(tmp_path: Path) -> DeviceCache:
    return DeviceCache(tmp_path / "cache")


def only_file(cache: DeviceCache) -> Path:
    (path,) = cache.folder.glob("*.entry")
    return path


def test_what_was_put_is_got(cache: DeviceCache) -> None:
    assert cache.get(KIND, KEY) is None
    assert cache.put(KIND, KEY, b"engine")
    assert cache.get(KIND, KEY) == b"engine"


def test_the_order_of_a_key_is_no_difference(cache: DeviceCache) -> None:
    cache.put(KIND, KEY, b"engine")
    assert cache.get(KIND, dict(reversed(KEY.items()))) == b"engine"


@pytest.mark.parametrize("part", KEY)
def test_every_part_of_the_key_makes_another_entry(cache: DeviceCache, part: str) -> None:
    cache.put(KIND, KEY, b"engine")
    assert cache.get(KIND, KEY | {part: KEY[part] + "x"}) is None


def test_parts_are_not_joined_ambiguously(cache: DeviceCache) -> None:
    cache.put(KIND, {"a": "bc", "d": ""}, b"one")
    assert cache.get(KIND, {"ab": "c", "d": ""}) is None
    assert cache.get("kind", {"a": "bc", "d": ""}) is None


def test_a_new_content_takes_the_place_of_the_old(cache: DeviceCache) -> None:
    cache.put(KIND, KEY, b"old")
    cache.put(KIND, KEY, b"newer")
    assert cache.get(KIND, KEY) == b"newer"
    assert len(cache.entries()) == 1


def test_buffers_other_than_bytes_are_kept(cache: DeviceCache) -> None:
    assert cache.put(KIND, KEY, memoryview(b"xxengine")[2:])
    assert cache.get(KIND, KEY) == b"engine"


@pytest.mark.parametrize("damage", ["flip a bit of the content", "flip a bit of the header", "cut", "append", "empty"])
def test_a_damaged_entry_is_a_miss_and_removed(cache: DeviceCache, damage: str) -> None:
    cache.put(KIND, KEY, b"engine" * 100)
    path = only_file(cache)
    content = bytearray(path.read_bytes())
    if damage == "flip a bit of the content":
        content[-1] ^= 1
    elif damage == "flip a bit of the header":
        content[len(MAGIC) + 4 + 3] ^= 1
    else:
        content = {"cut": content[:-1], "append": content + b"x", "empty": bytearray()}[damage]
    path.write_bytes(content)
    assert cache.get(KIND, KEY) is None
    assert not path.exists()


def test_an_entry_under_a_wrong_name_is_a_miss(cache: DeviceCache) -> None:
    """A file that was renamed is whole, but belongs to another model."""
    cache.put(KIND, KEY, b"engine")
    first = only_file(cache)
    other = KEY | {"model": "other"}
    cache.put(KIND, other, b"other engine")
    (second,) = set(cache.folder.glob("*.entry")) - {first}
    first.replace(second)
    assert cache.get(KIND, other) is None


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, limit_bytes=4000)
    for number in range(3):
        cache.put(KIND, {"n": str(number)}, bytes(1000))
        os.utime(cache._path(KIND, {"n": str(number)}), (number, number))
    assert cache.get(KIND, {"n": "0"}) is not None  # used now: the oldest is 1
    cache.put(KIND, {"n": "3"}, bytes(1000))
    assert [cache.get(KIND, {"n": str(n)}) is not None for n in range(4)] == [True, False, True, True]


def test_what_is_larger_than_the_limit_is_not_kept_and_evicts_nothing(tmp_path: Path) -> None:
    cache = DeviceCache(tmp_path, limit_bytes=2000)
    cache.put(KIND, {"n": "0"}, bytes(1000))
    assert not cache.put(KIND, {"n": "1"}, bytes(2001))
    assert cache.get(KIND, {"n": "0"}) is not None


def test_folder_and_entries_are_for_the_user_alone(cache: DeviceCache) -> None:
    before = os.umask(0)
    try:
        cache.put(KIND, KEY, b"engine")
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(only_file(cache).stat().st_mode) == 0o600


def test_an_open_folder_is_closed_before_it_is_read(cache: DeviceCache) -> None:
    cache.put(KIND, KEY, b"engine")
    cache.folder.chmod(0o777)
    assert cache.get(KIND, KEY) == b"engine"
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_read(cache: DeviceCache) -> None:
    cache.put(KIND, KEY, b"engine")
    os.chown(cache.folder, 12345, 12345)
    assert cache.get(KIND, KEY) is None
    assert not cache.put(KIND, KEY, b"engine")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = DeviceCache(tmp_path / "file" / "cache")
    assert not cache.put(KIND, KEY, b"engine")
    assert cache.get(KIND, KEY) is None
    assert cache.entries() == []
    assert cache.clear() == 0
    with cache.making(KIND, KEY):
        pass


def test_entries_say_what_is_there_and_clear_removes_it(cache: DeviceCache) -> None:
    cache.put(KIND, KEY, b"engine")
    cache.put("timing", {"gpu": "H200"}, b"timings")
    entries = {e.kind: e for e in cache.entries()}
    assert entries[KIND].key == KEY
    assert entries["timing"].size == Path(entries["timing"].path).stat().st_size
    (cache.folder / "unrelated.txt").write_text("not ours")
    assert cache.clear() == sum(e.size for e in entries.values())
    assert cache.entries() == []
    assert (cache.folder / "unrelated.txt").exists()


def test_what_a_killed_process_left_is_removed(cache: DeviceCache) -> None:
    cache.put(KIND, KEY, b"engine")
    left, running = cache.folder / "a.1.b.partial", cache.folder / "c.2.d.partial"
    left.write_bytes(b"half")
    running.write_bytes(b"half")
    os.utime(left, (0, 0))
    cache.put(KIND, KEY, b"engine")
    assert not left.exists()
    assert running.exists()


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "attn-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "attn-deploy"


WORKER = """
import sys
from pathlib import Path
from attn_deploy.runtimes.device_cache import DeviceCache
cache = DeviceCache(Path(sys.argv[1]) / "cache", limit_bytes=300_000)
made = Path(sys.argv[1]) / "made"
for number in range(12):
    key = {"n": str(number)}
    with cache.making("kind", key):
        content = cache.get("kind", key)
        if content is None:
            with made.open("a") as log:
                log.write(f"{number}\\n")
            content = bytes([number]) * 20_000
            cache.put("kind", key, content)
    assert content == bytes([number]) * 20_000, number
"""


def test_processes_share_entries_and_make_each_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        _, error = worker.communicate()
        assert worker.returncode == 0, error
    assert sorted((tmp_path / "made").read_text().split(), key=int) == [str(n) for n in range(12)]
