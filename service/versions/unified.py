"""Unified models on this server: taken in, listed, and read for the versions that need them.

A unified model is one file that several versions are loaded from (docs/adr/0034). It lies in the
bundle store under a digest of its own and goes with the last version that names it
(docs/adr/0038). What is in it is for `medley/unified.py`. Belongs to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

from medley.errors import BundleError
from medley.unified import Unified, read_unified, unified_name
from service.bundles.sources import Sources
from service.bundles.store import BundleStore, Upload
from service.errors import RequestError
from service.registry.desired import Desired, VersionRecord
from service.signals.metrics import Metrics

__all__ = ["UnifiedModel", "UnifiedModels"]

KEPT_S = 30.0  # in memory after its last use: versions of one fusion are loaded in a row
WAITS_S = 3600.0  # on the disk for the first version that names it
Method = Literal["lora", "finetune"]
DAMAGED = frozenset({"not_safetensors", "truncated", "not_a_bundle", "damaged"})


@dataclass(frozen=True)
class UnifiedModel:
    """What can be said of one now."""

    digest: str
    method: Method
    here: bool
    size_bytes: int | None
    versions: tuple[str, ...]  # that name it, as task@version


@dataclass(frozen=True)
class _Waiting:
    """Taken in, and named by no version yet."""

    method: Method
    since_s: float  # by `time.monotonic`


class UnifiedModels:
    """Those of one server.

    Args:
        store: where their bytes are.
        fingerprint: of the backbone.
        max_bytes: of one.
        metrics: told how long reading takes.
    """

    def __init__(
        self, store: BundleStore, *, fingerprint: str, max_bytes: int, metrics: Metrics
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._metrics = metrics
        self._reading = asyncio.Lock()  # one at a time is in memory
        self._last: Unified | None = None
        self._letting_go: asyncio.TimerHandle | None = None
        self._waiting: dict[str, _Waiting] = {}

    async def of(self, record: VersionRecord) -> Unified | None:
        """Read the unified model that a version is loaded from; None if it is from none.

        The one that was read last is still there for a while.

        Raises:
            BundleError: it is not here (`unified_missing`), or damaged.
            StorageError: the shared store cannot be used now, or the disk takes no more.
        """
        digest = record.unified
        if not digest:
            return None
        async with self._reading:
            path = self._store.path(digest)
            if self._last is not None and self._last.digest == digest and path.exists():
                return self._keep(self._last)
            self._let_go()
            return self._keep(await asyncio.to_thread(self._read, digest))

    async def receive(
        self, digest: str, chunks: AsyncIterator[bytes], desired: Desired
    ) -> tuple[UnifiedModel, bool]:
        """Take one in, for versions to name; bytes that are here already are written anew.

        Returns:
            it, and whether it was not here before.

        Raises:
            BundleError: it is no unified model, or one for another backbone.
            RequestError: it has another digest.
            PayloadError, StorageError, UnavailableError: too large, or the store does not take it.
        """
        await self._forget(desired)
        with self._store.upload(self._max_bytes) as upload:
            async for chunk in chunks:
                await asyncio.to_thread(upload.write, chunk)
            await asyncio.to_thread(upload.finish)
            unified, new = await self._take_in(upload, digest)
        versions = tuple(_named(desired).get(digest, ()))
        method, size_bytes = unified.manifest.method, upload.size_bytes
        return UnifiedModel(digest, method, True, size_bytes, versions), new

    async def fetch(self, digest: str, bundle: str, sources: Sources) -> None:
        """Have one that a bundle names which came from an address; it is looked for beside it.

        Raises:
            BundleError: there is none (`unified_missing`), or as for `receive`.
            PayloadError, StorageError, UnavailableError: as for `receive`.
        """
        if await asyncio.to_thread(self._store.has, digest):
            return
        with self._store.upload(self._max_bytes) as upload:
            try:
                await sources.fetch(f"{bundle.rpartition('/')[0]}/{unified_name(digest)}", upload)
            except RequestError as error:
                raise _missing(digest) from error
            await self._take_in(upload, digest)

    async def all(self, desired: Desired) -> list[UnifiedModel]:
        """Those that versions name, and those that wait to be; by digest."""
        versions = _named(desired)
        methods = {digest: one.method for digest, one in self._waiting.items()}
        methods |= {r.unified: _method(r) for r in desired.versions if r.unified}

        def look() -> list[UnifiedModel]:
            return [
                self._model(digest, methods[digest], tuple(versions.get(digest, ())))
                for digest in sorted(methods)
            ]

        found = await asyncio.to_thread(look)
        return [one for one in found if one.here or one.versions]

    async def _take_in(self, upload: Upload, digest: str) -> tuple[Unified, bool]:
        async with self._reading:
            self._let_go()
            unified = await asyncio.to_thread(self._verify, upload, digest)
        new = not self._store.path(digest).exists()
        await asyncio.to_thread(self._store.keep, upload, digest)
        self._keep(unified)
        self._waiting[digest] = _Waiting(unified.manifest.method, time.monotonic())
        return unified, new

    def _model(self, digest: str, method: Method, versions: tuple[str, ...]) -> UnifiedModel:
        try:
            size_bytes = self._store.path(digest).stat().st_size
        except FileNotFoundError:
            return UnifiedModel(digest, method, False, None, versions)
        return UnifiedModel(digest, method, True, size_bytes, versions)

    async def _forget(self, desired: Desired) -> None:
        """Remove what nobody has named in all that time."""
        early_s = time.monotonic() - WAITS_S
        self._waiting = {d: one for d, one in self._waiting.items() if d not in desired.files}
        for digest in [d for d, one in self._waiting.items() if one.since_s < early_s]:
            del self._waiting[digest]
            await asyncio.to_thread(self._store.remove, digest)

    def _read(self, digest: str) -> Unified:
        try:
            path = self._store.fetch(digest)
            if not path.exists():
                raise _missing(digest)
            with self._metrics.bundle_load_s.labels("verify").time():
                unified = read_unified(path, max_bytes=self._max_bytes)
            if unified.digest != digest:
                raise BundleError(["it is another one"], code="damaged")
        except BundleError as error:
            if error.code == "bundle_lost":
                raise _missing(digest) from error
            if error.code not in DAMAGED:
                raise
            self._store.remove(digest)  # as good as none, so that it is asked for again
            problem = f"the unified model {digest} is damaged here, upload it again: {error}"
            raise BundleError([problem], code="damaged") from error
        return unified

    def _verify(self, upload: Upload, digest: str) -> Unified:
        unified = read_unified(upload.path, max_bytes=self._max_bytes)
        made_for = unified.manifest.backbone.fingerprint
        if made_for != self._fingerprint:
            problem = f"made for the backbone {made_for}, this one is {self._fingerprint}"
            raise BundleError([problem], code="wrong_backbone")
        if unified.digest != digest:
            raise RequestError(
                f"the unified model is {unified.digest}, not {digest}", code="name_mismatch"
            )
        return unified

    def _keep(self, unified: Unified) -> Unified:
        """Have it for the next version, but not for ever: it may be the largest thing in memory."""
        self._let_go()
        self._last = unified
        self._letting_go = asyncio.get_running_loop().call_later(KEPT_S, self._let_go)
        return unified

    def _let_go(self) -> None:
        if self._letting_go is not None:
            self._letting_go.cancel()
        self._last, self._letting_go = None, None


def _named(desired: Desired) -> dict[str, list[str]]:
    """Who names each unified model, as task@version."""
    found: dict[str, list[str]] = {}
    for record in desired.versions:
        if record.unified:
            found.setdefault(record.unified, []).append(f"{record.task}@{record.version}")
    return found


def _method(record: VersionRecord) -> Method:
    return "lora" if record.method == "lora" else "finetune"


def _missing(digest: str) -> BundleError:
    problem = (
        f"the unified model {digest} is not here: put it at /v1/unified/{digest},"
        " or let `medley task register` do that"
    )
    return BundleError([problem], code="unified_missing")
