"""Bundles by address: which addresses a server takes, and how their bytes get into its store.

Off unless MEDLEY_BUNDLE_SOURCES names some. Every address that fsspec knows can be one (a folder,
S3, GCS, HTTP), if its driver is installed. Credentials are the drivers' own business; a request
brings none. Images are fetched elsewhere (`fetch.py`) and never from here.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import get_protocol

from medley.errors import MedleyError
from service.bundles.apart import run_apart
from service.bundles.store import Upload
from service.errors import AccessError, PayloadError, RequestError

__all__ = ["Sources", "check_prefix"]

log = logging.getLogger(__name__)
CHUNK_BYTES = 1024 * 1024
AT_ONCE = 2
# Nothing that some server may decode, expand, chain or walk up.
_SEGMENT = re.compile(r"[A-Za-z0-9@+=_-][A-Za-z0-9@+=._-]*")
_OPTIONS: dict[str, dict[str, Any]] = {  # a redirect could lead anywhere
    "http": {"allow_redirects": False},
    "https": {"allow_redirects": False},
}


def check_prefix(prefix: str) -> str:
    """Take `prefix` as one of MEDLEY_BUNDLE_SOURCES; it ends with a slash afterwards.

    Raises:
        ValueError: no such kind of address, or its driver is not installed.
    """
    protocol = get_protocol(prefix)
    if "::" in prefix or (protocol == "file" and not _local(prefix).is_absolute()):
        raise ValueError(f"{prefix} is no bundle source: give a URL or an absolute path")
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise ValueError(f"no driver for the bundle source {prefix}: {error}") from error
    return prefix.rstrip("/") + "/"


class Sources:
    """The addresses that a server gets bundles from.

    Args:
        prefixes: from `check_prefix`; an address is one of these and a path of plain names.
        timeout_s: for one bundle.
    """

    def __init__(self, prefixes: tuple[str, ...], *, timeout_s: float) -> None:
        self._prefixes = prefixes
        self._timeout_s = timeout_s
        self._turns = asyncio.Semaphore(AT_ONCE)

    def check(self, source: str) -> None:
        """Let a source pass if it may be fetched.

        Raises:
            AccessError: there are none.
            RequestError: it is under none of them.
        """
        if not self._prefixes:
            raise AccessError("this server fetches no bundles", code="sources_disabled")
        if not any(_is_under(prefix, source) for prefix in self._prefixes):
            raise RequestError("the source is none that may be fetched", code="source_refused")

    async def fetch(self, source: str, upload: Upload) -> None:
        """Write the bytes at a source that `check` let pass to `upload`, flushed to the disk.

        A read that hangs cannot be interrupted: its thread is left behind, and does not keep the
        process from ending.

        Raises:
            RequestError: it cannot be read, or not in time (`source_failed`).
            PayloadError, StorageError: too large, or the disk does not take it.
        """
        given_up = threading.Event()
        async with self._turns:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await _in_thread(lambda: _copy(source, upload, given_up))
            except TimeoutError as error:
                raise _failed(f"the source took more than {self._timeout_s:g} s") from error
            finally:
                given_up.set()


def _is_under(prefix: str, source: str) -> bool:
    names = source.removeprefix(prefix).split("/")
    if not source.startswith(prefix) or not all(_SEGMENT.fullmatch(name) for name in names):
        return False
    if get_protocol(prefix) != "file":
        return True
    return _local(source).resolve().is_relative_to(_local(prefix).resolve())  # links lead nowhere


def _local(address: str) -> Path:
    return Path(address.removeprefix("file://"))


def _copy(source: str, upload: Upload, given_up: threading.Event) -> None:
    options = _OPTIONS.get(get_protocol(source), {})
    files, path = fsspec.url_to_fs(
        source, skip_instance_cache=True, use_listings_cache=False, **options
    )
    found = files.info(path)
    if found["type"] != "file":
        raise FileNotFoundError
    if (found.get("size") or 0) > upload.max_bytes:
        raise PayloadError(f"the bundle is larger than {upload.max_bytes} bytes")
    with files.open(path, "rb", block_size=CHUNK_BYTES) as file:
        while not given_up.is_set() and (chunk := file.read(CHUNK_BYTES)):
            upload.write(chunk)
    if not given_up.is_set():
        upload.finish()


async def _in_thread(work: Callable[[], None]) -> None:
    """Run in a thread of its own, which may hang; whatever a driver raises is a failed source."""

    def run() -> None:
        try:
            work()
        except MedleyError:
            raise
        except Exception as error:  # drivers raise what they like; its text is not for clients
            log.warning("a bundle source cannot be read", exc_info=error)
            missing = isinstance(error, FileNotFoundError)
            said = "there is no file at the source" if missing else "the source cannot be read"
            raise _failed(said) from error

    await asyncio.wrap_future(run_apart(run, name="bundle-source"))


def _failed(said: str) -> RequestError:
    return RequestError(said, code="source_failed")
