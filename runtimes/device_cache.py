"""What belongs to one host and can be made again: TensorRT engines and timing caches, re-laid-out graphs.

One file per entry, named by the hash of what it depends on (model, runtime, device, driver, options), below the user's
cache folder, for the user alone. Losing it costs time, never correctness: what cannot be written is not kept, what
cannot be read or fails its checksum is removed and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

try:
    import fcntl
except ImportError:  # Windows: entries are still written whole, but two processes may make the same one
    fcntl = None  # type: ignore[assignment]

LIMIT_BYTES = 16 << 30
"""Room for some 80 FP16 engines of ViT-B's size."""

MAGIC = b"ATTNDC01"
SUFFIX = ".entry"
PARTIAL = ".partial"

_HEADER_LIMIT = 1 << 20
_ABANDONED_S = 24 * 3600
"""A partial file that has not been written to for this long was left by a process that was killed."""

Key = Mapping[str, str]
"""What an entry depends on, by name. Entries are the same exactly when all of it is."""


class _Header(msgspec.Struct, frozen=True):
    kind: str
    key: dict[str, str]
    size: int
    sha256: str


class Entry(msgspec.Struct, frozen=True):
    """One entry as `attn-deploy cache list` shows it; `used` is the time of its last use, in seconds since 1970."""

    kind: str
    key: dict[str, str]
    size: int
    used: float
    path: str


def default_folder() -> Path:
    """$XDG_CACHE_HOME/attn-deploy, or ~/.cache/attn-deploy. A relative XDG_CACHE_HOME counts as none (XDG says so)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "attn-deploy"


class DeviceCache:
    """Entries by kind (`tensorrt-engine`, ...) and key, at most `limit_bytes` in all; the least recently used go first.

    Safe for many threads and processes at once. No method raises for what the file system refuses.
    """

    def __init__(self, folder: Path | None = None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = default_folder() if folder is None else folder
        self.limit_bytes = limit_bytes

    def get(self, kind: str, key: Key) -> bytes | None:
        """The content, with its checksum verified; None when there is none. A damaged entry is removed."""
        path = self._path(kind, key)
        if not self._is_private():
            return None
        try:
            with path.open("rb") as stream:
                header = _read_header(stream)
                content = stream.read()
        except OSError:
            return None
        whole = (
            header is not None
            and (header.kind, header.key) == (kind, dict(key))
            and len(content) == header.size
            and hashlib.sha256(content).hexdigest() == header.sha256
        )
        if not whole:
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def put(self, kind: str, key: Key, content: bytes | memoryview) -> bool:
        """Keeps the content, in place of what was there; False when it is larger than the limit or cannot be written.

        What was there stays readable until the new entry takes its place in one step.
        """
        view = memoryview(content).cast("B")
        if view.nbytes > self.limit_bytes or not self._create():
            return False
        header = _Header(kind, dict(key), view.nbytes, hashlib.sha256(view).hexdigest())
        encoded = msgspec.json.encode(header)
        path = self._path(kind, key)
        partial = path.with_name(f"{path.stem}.{os.getpid()}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(MAGIC + len(encoded).to_bytes(4, "little") + encoded)
                stream.write(view)
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            return False
        self._make_room(keep=path)
        return True

    @contextlib.contextmanager
    def making(self, kind: str, key: Key) -> Iterator[None]:
        """Held while an entry is made, so that a second process waits for the first one's instead of making its own.

        Ask `get` again inside: another process may have made it meanwhile.
        """
        with self._locked(self._path(kind, key).name[:2]):
            yield

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        entries = []
        for path, state in self._files(SUFFIX):
            with contextlib.suppress(OSError), path.open("rb") as stream:
                header = _read_header(stream)
                if header is not None:
                    entries.append(Entry(header.kind, header.key, state.st_size, state.st_mtime, str(path)))
        return sorted(entries, key=lambda e: e.used, reverse=True)

    def clear(self) -> int:
        """Removes all entries; returns how many bytes that freed. Entries that are in use stay usable: they are in
        memory."""
        freed = 0
        with self._locked("all"):
            for path, state in [*self._files(SUFFIX), *self._files(PARTIAL)]:
                with contextlib.suppress(OSError):
                    path.unlink()
                    freed += state.st_size
        return freed

    def _make_room(self, keep: Path) -> None:
        """Removes the least recently used entries beyond the limit, and what killed processes left."""
        with self._locked("all"):
            for path, state in self._files(PARTIAL):
                if time.time() - state.st_mtime > _ABANDONED_S:
                    path.unlink(missing_ok=True)
            files = sorted(self._files(SUFFIX), key=lambda f: f[1].st_mtime_ns)
            total = sum(state.st_size for _, state in files)
            for path, state in files:
                if total <= self.limit_bytes:
                    return
                if path != keep:
                    with contextlib.suppress(OSError):
                        path.unlink()
                        total -= state.st_size

    def _path(self, kind: str, key: Key) -> Path:
        named = msgspec.json.encode([kind, sorted(key.items())])
        return self.folder / f"{hashlib.sha256(named).hexdigest()}{SUFFIX}"

    def _files(self, suffix: str) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            paths = [p for p in self.folder.iterdir() if p.name.endswith(suffix)]
        except OSError:
            return
        for path in paths:
            with contextlib.suppress(OSError):  # another process removed it
                state = path.lstat()
                if stat.S_ISREG(state.st_mode):
                    yield path, state

    def _create(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return False
        return self._is_private()

    def _is_private(self) -> bool:
        """Whether the folder is the user's own and closed to others; an open one of the user's is closed.

        An engine is code: one that somebody else could have put there is not loaded.
        """
        try:
            state = self.folder.stat()
            if hasattr(os, "getuid") and state.st_uid != os.getuid():
                return False
            if os.name == "posix" and stat.S_IMODE(state.st_mode) & 0o077:
                self.folder.chmod(0o700)
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One of a few lock files; two entries that share one wait for each other, which is harmless."""
        if fcntl is None or not self._create():
            yield
            return
        locks = self.folder / "locks"
        try:
            locks.mkdir(exist_ok=True, mode=0o700)
            descriptor = os.open(locks / name, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _read_header(stream: BinaryIO) -> _Header | None:
    """The header of an entry, with the stream at its content; None for a file that is no entry."""
    start = stream.read(len(MAGIC) + 4)
    length = int.from_bytes(start[len(MAGIC) :], "little")
    if not start.startswith(MAGIC) or len(start) < len(MAGIC) + 4 or length > _HEADER_LIMIT:
        return None
    try:
        return msgspec.json.decode(stream.read(length), type=_Header)
    except msgspec.MsgspecError:
        return None
