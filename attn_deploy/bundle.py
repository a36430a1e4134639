"""Bundles: written whole or not at all, checked before they are used."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import msgspec

from attn_deploy.errors import BundleError, StorageError, UsageError
from attn_deploy.manifest import SCHEMA_VERSION, FileEntry, Graph, Manifest, Variant, graph_file
from attn_deploy.receipt import Receipt
from attn_deploy.target import nearest

MANIFEST = "manifest.json"
RECEIPT = "receipt.json"
CANONICAL = "canonical.onnx"
PORTABLE = "portable.onnx"
REPORT = "report.html"
VARIANTS = "variants"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_in_progress: set[Path] = set()
"""Work folders of this process. In a container every export has the same process id: one that bears it and is not
among these was left behind by a process that was killed."""


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into a StorageError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            free = _free_mb(path)
            raise StorageError(
                "the disk is full", where=str(path), got=f"{error.strerror}, {free} MB free",
                next_step="free some space or choose another folder with -o; nothing was written",
            ) from error  # fmt: skip
        raise StorageError(
            "a file cannot be read or written", where=str(error.filename or path), got=error.strerror or str(error)
        ) from error


def _free_mb(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free // 1_000_000


@contextlib.contextmanager
def writing(out: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends without an error, and is removed else.

    Raises UsageError when `out` exists and `force` is not given. With `force` the old bundle is there until the new
    one takes its place in one step. Where `out` is a link, the bundle that it leads to is replaced.
    """
    out = out.resolve()
    check_free(out, force=force)
    _remove_left_behind(out)
    work = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        work.mkdir()
    _in_progress.add(work)
    try:
        with storage_errors(out):
            yield work
            _put_in_place(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _in_progress.discard(work)


def check_free(out: Path, *, force: bool) -> None:
    """Raises UsageError when `out` must not be written."""
    if out.exists() and not force:
        raise UsageError(
            "the output exists already", got=str(out), next_step="choose another -o, or replace it with --force"
        )
    if out.exists() and not (out / MANIFEST).is_file():
        raise UsageError(
            "the output is not a bundle, so it is not replaced", got=str(out), expected="a bundle, or nothing there"
        )


def _put_in_place(work: Path, out: Path) -> None:
    if not out.exists():
        work.rename(out)
    elif not _exchange(work, out):
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        out.rename(old)
        work.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step where the kernel can (renameat2 with RENAME_EXCHANGE)."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_cwd, exchange = -100, 2
    return bool(libc.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)


def _remove_left_behind(out: Path) -> None:
    """Folders of killed exports: their process is gone."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        pid = folder.name.split(".")[-2]
        if pid.isdigit() and folder not in _in_progress and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Whether a process of this id runs; True where that cannot be asked without harm."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def file_entry(path: Path) -> FileEntry:
    """SHA-256 and size of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return FileEntry(sha256=digest.hexdigest(), size=path.stat().st_size)


def write_manifest(work: Path, manifest: Manifest) -> None:
    """Writes the manifest of the files that lie in `work`; their sizes and hashes are taken here."""
    files = {
        path.relative_to(work).as_posix(): file_entry(path)
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    complete = msgspec.structs.replace(manifest, files=files)
    (work / MANIFEST).write_bytes(encode(complete))


def encode(value: Manifest | Receipt) -> bytes:
    """JSON as it stands in a bundle."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2)


def _replace(contents: Mapping[Path, bytes]) -> None:
    """Replaces files, each whole and in this order; none of them when one cannot be written."""
    written = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in contents}
    try:
        for path, content in contents.items():
            written[path].write_bytes(content)
        for path, temporary in written.items():
            temporary.replace(path)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)


class Bundle:
    """An opened bundle. Files are checked against the manifest when they are asked for."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    def path(self, name: str) -> Path:
        """The checked path of a file of the bundle. Raises BundleError: outside, missing, wrong size."""
        entry = self._entry(name)
        path = self.root / name
        if not path.is_file():
            raise BundleError("a file of the bundle is missing", where=str(path), next_step="copy or export it again")
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise BundleError("a file of the bundle leads out of it", where=str(path), got=str(path.resolve()))
        if path.stat().st_size != entry.size:
            raise BundleError(
                "a file of the bundle has the wrong size", where=str(path), got=path.stat().st_size,
                expected=entry.size, next_step="copy or export it again",
            )  # fmt: skip
        return path

    def read(self, name: str) -> bytes:
        """The bytes of a file, with its hash checked: what was checked is what is used."""
        content = self.path(name).read_bytes()
        self._require_hash(name, hashlib.sha256(content).hexdigest())
        return content

    def check(self, name: str) -> Path:
        """The path of a file whose hash was checked."""
        path = self.path(name)
        self._require_hash(name, file_entry(path).sha256)
        return path

    def check_all(self) -> None:
        """Checks every file of the manifest."""
        for name in self.manifest.files:
            self.check(name)

    def receipt(self) -> Receipt:
        try:
            return msgspec.json.decode(self.read(RECEIPT), type=Receipt)
        except msgspec.MsgspecError as error:
            raise BundleError(
                "the receipt is not understood", where=str(self.root / RECEIPT), got=str(error)
            ) from error

    def receipts(self) -> dict[str, Receipt]:
        """The receipt of each graph, by its name."""
        found = self.receipt().by_graph()
        missing = self.manifest.graphs.keys() - found.keys()
        if missing:
            raise BundleError(
                "the receipt says nothing of a graph", where=str(self.root / RECEIPT), got=", ".join(found),
                expected=", ".join(self.manifest.graphs), next_step="copy or export it again",
            )  # fmt: skip
        return found

    @contextlib.contextmanager
    def adopting(self) -> Iterator[Callable[[str, Sequence[Path]], tuple[str, ...]]]:
        """A function (graph, files) -> their names in the bundle, where copies of them lie from then on. They are part
        of it once `rewrite` has named them in `variants`; where that fails they are removed."""
        made: list[Path] = []

        def adopt(graph: str, files: Sequence[Path]) -> tuple[str, ...]:
            folder = _free_folder(self.root / graph_file(graph, VARIANTS))
            with storage_errors(self.root):
                folder.mkdir(parents=True)
                made.append(folder)
                copies = [Path(shutil.copyfile(file, folder / file.name)) for file in files]
            return tuple(copy.relative_to(self.root).as_posix() for copy in copies)

        try:
            yield adopt
        except BaseException:
            for folder in made:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def rewrite(
        self,
        receipt: Receipt,
        chosen: dict[str, str],
        page: str | None = None,
        variants: Mapping[str, Mapping[str, Variant]] | None = None,
    ) -> None:
        """Replaces receipt, its page and choice, of each graph its own. Each file is replaced whole, the manifest last.
        Without a page there is none any more: it would tell of another receipt.

        `variants`: of the graphs of which they change, by graph. Their files are there; those that no variant names any
        more are removed when the manifest is in place."""
        contents = {RECEIPT: encode(receipt)}
        if page is not None:
            contents[REPORT] = page.encode()
        graphs = dict(self.manifest.graphs)
        for name, found in receipt.graphs.items():
            graphs[name] = msgspec.structs.replace(graphs[name], chosen=found.chosen)
        for name, of_graph in (variants or {}).items():
            graphs[name] = msgspec.structs.replace(graphs[name], variants=dict(of_graph))
        before, after = _variant_files(self.manifest.graphs), _variant_files(graphs)
        gone = before - after
        files = {name: entry for name, entry in self.manifest.files.items() if name not in {REPORT, *gone}}
        files |= {n: FileEntry(sha256=hashlib.sha256(c).hexdigest(), size=len(c)) for n, c in contents.items()}
        with storage_errors(self.root):
            files |= {name: file_entry(self.root / name) for name in sorted(after - before)}
            manifest = msgspec.structs.replace(self.manifest, files=files, chosen=chosen, graphs=graphs)
            _replace({self.root / name: c for name, c in contents.items()} | {self.root / MANIFEST: encode(manifest)})
            for name in gone if page is not None else {*gone, REPORT}:
                (self.root / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    (self.root / name).parent.rmdir()
        self.manifest = manifest

    def _entry(self, name: str) -> FileEntry:
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(
                "the manifest does not list a file", where=str(self.root), got=name,
                expected=nearest(name, self.manifest.files),
            )  # fmt: skip
        return entry

    def _require_hash(self, name: str, found: str) -> None:
        expected = self._entry(name).sha256
        if found != expected:
            raise BundleError(
                "a file of the bundle was changed", where=str(self.root / name), got=f"sha256 {found[:16]}...",
                expected=f"sha256 {expected[:16]}...", next_step="copy or export it again",
            )  # fmt: skip


def _variant_files(graphs: Mapping[str, Graph]) -> set[str]:
    return {file for graph in graphs.values() for variant in graph.variants.values() for file in variant.held}


def _free_folder(variants: Path) -> Path:
    """One that is not there yet: a file that is in use is never written over."""
    return next(folder for n in itertools.count(1) if not (folder := variants / str(n)).exists())


class _Version(msgspec.Struct):
    schema_version: int


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads and checks the manifest. Raises BundleError: not a bundle, a newer schema, names that climb out of it."""
    root = Path(path)
    manifest_path = root / MANIFEST
    if not root.is_dir() or not manifest_path.is_file():
        raise BundleError(
            "this is not a bundle", got=str(path), expected=f"a folder with {MANIFEST}",
            next_step=_hint(root) or "make one: attn-deploy export SOURCE -o NAME.attn",
        )  # fmt: skip
    try:
        content = manifest_path.read_bytes()
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                "the bundle is newer than this attn-deploy", where=str(manifest_path), got=f"schema_version {version}",
                expected=f"at most {SCHEMA_VERSION}", next_step="install a newer attn-deploy",
            )  # fmt: skip
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError("the manifest is not understood", where=str(manifest_path), got=str(error)) from error
    if not manifest.graphs:
        raise BundleError("the bundle holds no graph", where=str(manifest_path), next_step="copy or export it again")
    for name in _names(manifest):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
            raise BundleError(
                "a name in the manifest leaves the bundle", where=str(manifest_path), got=name,
                expected="names below the bundle's folder",
            )  # fmt: skip
    return Bundle(root, manifest)


def _names(manifest: Manifest) -> Iterator[str]:
    yield from manifest.files
    yield from manifest.graphs
    for graph in manifest.graphs.values():
        for variant in graph.variants.values():
            yield from variant.held


def _hint(root: Path) -> str | None:
    if not root.parent.is_dir():
        return None
    others = [p.name for p in root.parent.iterdir() if (p / MANIFEST).is_file()]
    return nearest(root.name, others) if others else None
