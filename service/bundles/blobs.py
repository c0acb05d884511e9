"""A place of immutable files that replicas share, at a path or a URL that fsspec knows.

Each file is there whole or not at all, and every call has a deadline. Knows nothing of bundles
(`store.py`) nor of who still needs what (`collector.py`). Calls block: they are for threads.
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import TypeVar

from service.bundles.apart import run_apart
from service.bundles.places import INCOMING, open_place
from service.errors import NotFoundError, StorageError

__all__ = ["ID_FILE", "Blobs"]

log = logging.getLogger(__name__)
ID_FILE = "medley-store.json"
FORMAT = 1
AT_ONCE = 16  # calls, those included that hang and were given up
SLOWEST_BYTES_PER_S = 1024 * 1024  # a transfer has that much longer than any other call
T = TypeVar("T")


class Blobs:
    """Files by name (`folder/file`) in one shared place.

    All methods raise StorageError (`store_unavailable`, `storage_full`) if the place cannot be
    used now, or does not answer in time: transient, to be tried again. A place that has become
    another one, such as a mount that has fallen away, is one that cannot be used.

    Args:
        url: a folder, or a URL such as s3://bucket/prefix; made if it is not there.
        timeout_s: for one call; what moves bytes has a second more for each MiB.

    Raises:
        StorageError: it cannot be used now; with code `store_refused`, it never will: no driver,
            of a newer format, or something else than a store.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self.up = True  # whether the last call was answered
        self._timeout_s = timeout_s
        self._turns = threading.BoundedSemaphore(AT_ONCE)
        try:
            self._place = open_place(url)
        except (ValueError, ImportError) as error:
            raise _refused(f"no bundle store can be had there: {error}") from error
        self.id = self._call(self._open)

    def put(self, name: str, source: bytes | Path) -> None:
        """Write a file, durable when this returns; one that is there is replaced by its like."""
        try:
            size_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        except OSError as error:
            raise _error_of(error) from error

        def work() -> None:
            self._check_same()
            self._place.put(name, source)

        self._call(work, size_bytes=size_bytes)

    def get(self, name: str, to: Path) -> None:
        """Copy a file to `to`, which is not flushed; NotFoundError if there is none."""
        size_bytes = self.size(name)
        self._call(lambda: self._of(name, lambda: self._place.get(name, to)), size_bytes=size_bytes)

    def read(self, name: str) -> bytes:
        """The bytes of a small file; NotFoundError if there is none."""
        return self._call(lambda: self._of(name, lambda: self._place.read(name)))

    def size(self, name: str) -> int:
        """How many bytes a file has; NotFoundError if there is none."""
        return self._call(lambda: self._of(name, lambda: self._place.size(name)))

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.size(name)
        except NotFoundError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        """The names that begin with `prefix`, in order: `folder/` or longer, or "" for the top."""
        folder, _, _ = prefix.rpartition("/")

        def work() -> list[str]:
            return self._of(folder, lambda: self._place.names(folder))

        try:
            found = self._call(work)
        except NotFoundError:  # nothing was ever put there
            return []
        return sorted(name for name in found if name.startswith(prefix))

    def delete(self, name: str) -> None:
        """Forget a file; no error if there is none."""
        try:
            self._call(lambda: self._of(name, lambda: self._place.delete(name)))
        except NotFoundError:
            return

    def _open(self) -> str:
        """Say whose place this is, and see that it can be written."""
        try:
            self._place.read(ID_FILE)
        except FileNotFoundError:
            whose = {"format": FORMAT, "id": secrets.token_hex(16)}
            self._place.create(ID_FILE, json.dumps(whose).encode())
        found = _parse_id(self._place.read(ID_FILE))
        probe = f"{INCOMING}/{secrets.token_hex(16)}"
        self._place.put(probe, b"")
        self._place.delete(probe)
        return found

    def _check_same(self) -> None:
        """A mount that has fallen away leaves an empty folder, which must not be taken for it."""
        if _parse_id(self._place.read(ID_FILE)) != self.id:
            raise _unavailable("the bundle store has become another one")

    def _of(self, name: str, work: Callable[[], T]) -> T:
        """Tell a file that is not there from a place that is not."""
        try:
            return work()
        except FileNotFoundError as error:
            self._check_same()
            raise NotFoundError(f"the bundle store has no {name}", code="unknown_blob") from error

    def _call(self, work: Callable[[], T], *, size_bytes: int = 0) -> T:
        """Do one thing in the place, and wait for it only so long."""
        timeout_s = self._timeout_s + size_bytes / SLOWEST_BYTES_PER_S
        try:
            result = self._in_time(work, timeout_s)
        except NotFoundError:
            self.up = True
            raise
        except StorageError:
            self.up = False
            raise
        except Exception as error:  # drivers raise what they like
            self.up = False
            log.warning("the bundle store cannot be used: %s: %s", type(error).__name__, error)
            raise _error_of(error) from error
        self.up = True
        return result

    def _in_time(self, work: Callable[[], T], timeout_s: float) -> T:
        if not self._turns.acquire(timeout=timeout_s):
            raise _unavailable("too many calls to the bundle store hang")
        future = run_apart(work, name="bundle-store")
        future.add_done_callback(lambda _: self._turns.release())
        if not wait([future], timeout_s).done:
            raise _unavailable(f"the bundle store took more than {timeout_s:g} s")
        return future.result()


def _parse_id(data: bytes) -> str:
    try:
        found = json.loads(data)
        version, store_id = found["format"], found["id"]
    except (ValueError, KeyError, TypeError) as error:
        raise _refused(f"the bundle store's {ID_FILE} is none of ours") from error
    if version != FORMAT:
        raise _refused(f"the bundle store has format {version}, this Medley knows {FORMAT}")
    return str(store_id)


def _error_of(error: Exception) -> StorageError:
    """Trouble of a place, without paths in it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(f"the bundle store is full: {error.strerror}", code="storage_full")
    said = error.strerror if isinstance(error, OSError) else None
    return _unavailable(f"the bundle store cannot be used: {said or type(error).__name__}")


def _unavailable(said: str) -> StorageError:
    return StorageError(said, code="store_unavailable")


def _refused(said: str) -> StorageError:
    return StorageError(said, code="store_refused")
