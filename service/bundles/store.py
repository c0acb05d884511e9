"""Bundle bytes on disk, named by their digest. Knows nothing of tasks or of what is in a bundle.

Unified models lie among the bundles: a file is a file.

A file under `bundles/` is complete: bytes are written to `incoming/`, flushed to the disk, and
renamed. What a crash leaves in `incoming/` is removed at the next start. Where replicas share a
store (`shared_store.py`), that one has the bundles, and the folder is this replica's cache.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from medley.errors import BundleError
from service.bundles.shared_store import SharedStore, check_bundle
from service.errors import PayloadError, StorageError, UnavailableError

__all__ = ["BundleStore", "Upload"]


class Upload:
    """Bytes on their way in; a context manager that discards them at its end."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self.max_bytes = max_bytes
        self.size_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    @property
    def path(self) -> Path:
        """Where the bytes are until the store takes them."""
        return Path(self._file.name)

    def write(self, chunk: bytes) -> None:
        """Append `chunk`.

        Raises:
            PayloadError: more than the limit has arrived.
            StorageError: the disk does not take it.
        """
        self.size_bytes += len(chunk)
        if self.size_bytes > self.max_bytes:
            raise PayloadError(f"the bundle is larger than {self.max_bytes} bytes")
        with _storage_errors():
            self._file.write(chunk)

    def finish(self) -> None:
        """Flush to the disk, so that a rename publishes whole bytes or none."""
        with _storage_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Remove the bytes, unless `keep` has given them another name; never fails.

        What a disk does not let go of is removed at the next start.
        """
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


class BundleStore:
    """A folder that one server owns: `bundles/<sha256>.safetensors` and `incoming/`.

    Args:
        folder: made if it is not there.
        shared: where the bundles of all replicas are; then this folder may lose any of them.
    """

    def __init__(self, folder: Path, shared: SharedStore | None = None) -> None:
        self.folder = folder
        self.shared = shared
        self._bundles = folder / "bundles"
        self._incoming = folder / "incoming"
        with _storage_errors():
            self._bundles.mkdir(parents=True, exist_ok=True)
            self._incoming.mkdir(exist_ok=True)
        self._lock = _lock_folder(folder)

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def path(self, digest: str) -> Path:
        """Where the bundle with this digest ("sha256:...") is, if it is here."""
        return self._bundles / f"{digest.removeprefix('sha256:')}.safetensors"

    def upload(self, max_bytes: int) -> Upload:
        """Begin to take bytes in; whatever `keep` has not claimed is gone after `with`."""
        with _storage_errors():
            file = tempfile.NamedTemporaryFile(dir=self._incoming, suffix=".part", delete=False)  # noqa: SIM115
        return Upload(file, max_bytes)

    def keep(self, upload: Upload, digest: str) -> Path:
        """Give a finished upload its final name; the same bundle twice is one file.

        Other replicas can have it when this returns.

        Raises:
            StorageError: the disk or the shared store does not take it; nothing has changed here.
            UnavailableError: replicas share a store, and their registry is away.
        """
        if self.shared is not None:
            self.shared.publish(digest, upload.path)
        target = self.path(digest)
        with _storage_errors():
            upload.path.replace(target)
            _fsync(self._bundles)
        return target

    def has(self, digest: str) -> bool:
        """Whether there is a file here, or in the shared store; whether it is whole, is not seen.

        Raises:
            StorageError: the shared store cannot be used now.
        """
        return self.path(digest).exists() or (self.shared is not None and self.shared.has(digest))

    def spare(self, digest: str) -> None:
        """Let nobody take a file away that the registry is about to name for the first time.

        Raises: as `keep`, which does the same for what it keeps.
        """
        if self.shared is not None:
            self.shared.announce(digest)

    def confirm(self, digest: str) -> None:
        """See that a bundle which the registry names by now is there for others too.

        Raises:
            StorageError, UnavailableError: that cannot be seen now, or it cannot be put again.
        """
        if self.shared is not None and not self.shared.has(digest):
            self.shared.publish(digest, self.path(digest))

    def mend(self, digest: str) -> bool:
        """Put a bundle again that the shared store has lost, if it is whole here.

        Raises: as `confirm`.
        """
        whole = self.shared is not None and _is_whole(self.path(digest), digest)
        if whole:
            self.confirm(digest)
        return whole

    def fetch(self, digest: str) -> Path:
        """Have a bundle here; what a shared store gave is whole, and is that bundle.

        Raises:
            StorageError: the shared store cannot be used now, or the disk takes no more.
            BundleError: the shared store has none (`bundle_lost`) or a damaged one (`damaged`).
        """
        target = self.path(digest)
        if self.shared is None or _is_whole(target, digest):
            return target
        with self.upload(max_bytes=0) as upload:
            self.shared.fetch(digest, upload.path)
            with _storage_errors():
                _fsync(upload.path)
                upload.path.replace(target)
                _fsync(self._bundles)
        return target

    def remove(self, digest: str) -> None:
        """Forget a bundle here; no error if it is not here."""
        with _storage_errors():
            self.path(digest).unlink(missing_ok=True)

    def clean(self, wanted: Collection[str]) -> int:
        """Remove half uploads and bundles here that no version names; returns how many files went.

        If nothing is wanted, bundles stay: a registry that was lost must not take them with it.
        """
        keep = {self.path(digest) for digest in wanted}
        stale = [*self._incoming.iterdir()]
        stale += [path for path in self._bundles.iterdir() if keep and path not in keep]
        with _storage_errors():
            for path in stale:
                path.unlink(missing_ok=True)
        return len(stale)


def _lock_folder(folder: Path) -> IO[bytes]:
    with _storage_errors():
        lock = (folder / "lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UnavailableError(
            "another server uses this store folder", code="store_in_use"
        ) from error
    return lock


def _is_whole(path: Path, digest: str) -> bool:
    """Whether that bundle is in the cache, every byte as it was."""
    try:
        check_bundle(path, digest)
    except BundleError:
        return False
    return True


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _storage_errors() -> Iterator[None]:
    """Disk trouble without the path in it, which is nobody's business outside."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = "storage_full" if full else "storage_failed"
        raise StorageError(f"the store cannot be written: {error.strerror}", code=code) from error
