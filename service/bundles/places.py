"""Where named bytes can lie: a folder of the file system, or whatever fsspec has a driver for.

Plain operations that raise what the system or the driver raises. Deadlines, and errors of ours,
are for `blobs.py`. A name is `folder/file`, or just `file`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
from fsspec.utils import get_protocol

__all__ = ["INCOMING", "Folder", "Objects", "Place", "open_place"]

INCOMING = "incoming"  # half of what is being written to a folder


class Place(Protocol):
    """Named bytes, each of which is there whole or not at all.

    Raises: FileNotFoundError where there is nothing of that name, else whatever the system does.
    """

    def create(self, name: str, data: bytes) -> None:
        """Write unless there is something of that name; whoever comes first wins."""

    def put(self, name: str, source: bytes | Path) -> None:
        """Write, on the disk when it returns."""

    def get(self, name: str, to: Path) -> None:
        """Copy to a file."""

    def read(self, name: str) -> bytes:
        """All bytes of one name."""

    def names(self, folder: str) -> list[str]:
        """All names in a folder, `folder/file` each, in no order; "" is the top."""

    def size(self, name: str) -> int:
        """How many bytes are there."""

    def delete(self, name: str) -> None:
        """Forget a name."""


def open_place(url: str) -> Place:
    """Open a folder (an absolute path, or file://) or what fsspec opens; nothing is read.

    Raises:
        ValueError, ImportError: there is no driver for it, or it is no address.
    """
    protocol, path = get_protocol(url), Path(url.removeprefix("file://"))
    if "::" in url or (protocol == "file" and not path.is_absolute()):
        raise ValueError("give a URL or an absolute path")
    return Folder(path) if protocol == "file" else Objects(url)


class Folder:
    """A folder of the file system, local or mounted: write to `incoming/`, flush, rename."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def create(self, name: str, data: bytes) -> None:
        """Make the folder itself too, if need be: this is how a place begins."""
        self._root.mkdir(parents=True, exist_ok=True)
        with self._incoming() as (path, file):
            file.write(data)
            _flush(file)
            try:
                os.link(path, self._root / name)  # unlike a rename, takes nobody's place
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                with suppress(FileExistsError), (self._root / name).open("xb") as only:
                    only.write(data)
                    _flush(only)
        _fsync_folder(self._root)

    def put(self, name: str, source: bytes | Path) -> None:
        """Write to `incoming/` and rename."""
        target = self._root / name
        target.parent.mkdir(exist_ok=True)
        with self._incoming() as (path, file):
            if isinstance(source, bytes):
                file.write(source)
            else:
                with source.open("rb") as original:
                    shutil.copyfileobj(original, file, 1024 * 1024)
            _flush(file)
            path.replace(target)
        _fsync_folder(target.parent)

    def get(self, name: str, to: Path) -> None:
        """Copy a file."""
        shutil.copyfile(self._root / name, to)

    def read(self, name: str) -> bytes:
        """Read a file."""
        return (self._root / name).read_bytes()

    def names(self, folder: str) -> list[str]:
        """List what is in a folder, whoever put it there."""
        return [_in(folder, path.name) for path in (self._root / folder).iterdir()]

    def size(self, name: str) -> int:
        """Ask the file system."""
        return (self._root / name).stat().st_size

    def delete(self, name: str) -> None:
        """Remove a file."""
        (self._root / name).unlink()
        _fsync_folder((self._root / name).parent)

    @contextmanager
    def _incoming(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A file that is gone afterwards, unless it was given another name."""
        path = self._root / INCOMING / secrets.token_hex(16)
        path.parent.mkdir(exist_ok=True)
        try:
            with path.open("xb") as file:
                yield path, file
        finally:
            path.unlink(missing_ok=True)


class Objects:
    """An object store behind fsspec: what was put is there whole, as soon as it is put."""

    def __init__(self, url: str) -> None:
        self._files: Any
        self._files, root = fsspec.url_to_fs(
            url, skip_instance_cache=True, use_listings_cache=False
        )
        self._root = root.rstrip("/")

    def create(self, name: str, data: bytes) -> None:
        """Ask first: not every store knows a condition on a write."""
        with suppress(FileExistsError):
            if not self._files.exists(self._at(name)):
                self._files.pipe_file(self._at(name), data, mode="create")

    def put(self, name: str, source: bytes | Path) -> None:
        """One request, or parts that count when the last is there."""
        if isinstance(source, bytes):
            self._files.pipe_file(self._at(name), source)
        else:
            self._files.put_file(str(source), self._at(name))

    def get(self, name: str, to: Path) -> None:
        """Fetch an object."""
        self._files.get_file(self._at(name), str(to))

    def read(self, name: str) -> bytes:
        """Fetch a small object."""
        return bytes(self._files.cat_file(self._at(name)))

    def names(self, folder: str) -> list[str]:
        """List what has this prefix."""
        found = self._files.ls(self._at(folder).rstrip("/"), detail=True)
        files = (one["name"] for one in found if one["type"] == "file")
        return [_in(folder, path.rpartition("/")[2]) for path in files]

    def size(self, name: str) -> int:
        """Ask the store."""
        return int(self._files.size(self._at(name)))

    def delete(self, name: str) -> None:
        """Remove an object; not every store says that there was none."""
        self._files.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
