"""The bundles of all replicas, by digest, in one place of immutable files.

What is fetched is verified before anybody has it. A bundle that is lost is told from a store that
is away. Who still needs what is for `collector.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from medley.errors import BundleError
from medley.sealed import check_seal
from service.bundles.blobs import Blobs
from service.errors import NotFoundError

__all__ = ["SharedStore", "bundle_digest", "bundle_name", "check_bundle"]

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"bundles/([0-9a-f]{64})\.safetensors")


class SharedStore:
    """Bundles that any replica puts and every replica gets. Calls block: they are for threads.

    All methods raise StorageError if the place cannot be used now.

    Args:
        blobs: the place.
        announce: told of a digest before its bytes are put, so that nobody collects them before
            the registry names them; may wait, and raise.
    """

    def __init__(
        self, blobs: Blobs, *, announce: Callable[[str], None] = lambda digest: None
    ) -> None:
        self.blobs = blobs
        self.announce = announce

    def publish(self, digest: str, path: Path) -> None:
        """Let others have a bundle; one that is there is written again, as it may be damaged.

        Raises:
            UnavailableError: nobody can be told that it arrives.
        """
        self.announce(digest)
        self.blobs.put(bundle_name(digest), path)

    def fetch(self, digest: str, to: Path) -> None:
        """Write a bundle to a file, and see that it is that one.

        Raises:
            BundleError: there is none (`bundle_lost`), or another one or half of it (`damaged`).
        """
        try:
            self.blobs.get(bundle_name(digest), to)
        except NotFoundError as error:
            lost = f"the bundle store has lost {digest}"
            raise BundleError([lost], code="bundle_lost") from error
        check_bundle(to, digest)

    def has(self, digest: str) -> bool:
        """Whether there is something under that digest; whether it is whole, `fetch` says."""
        return self.blobs.has(bundle_name(digest))

    def remove(self, digest: str) -> None:
        """Delete a bundle; no error if there is none."""
        self.blobs.delete(bundle_name(digest))

    def digests(self) -> frozenset[str]:
        """All that are there; other files that lie among them are passed over."""
        found = (bundle_digest(name) for name in self.blobs.names("bundles/"))
        return frozenset(digest for digest in found if digest is not None)


def bundle_name(digest: str) -> str:
    """Where a bundle is in the place; BundleError if this is no digest."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise BundleError([f"{digest} is no digest of a bundle"], code="bundle_lost")
    return f"bundles/{match[1]}.safetensors"


def bundle_digest(name: str) -> str | None:
    """What the bundle of that name is; None if it is none of ours."""
    match = _NAME.fullmatch(name)
    return None if match is None else f"sha256:{match[1]}"


def check_bundle(path: Path, digest: str) -> None:
    """See that a file is that bundle, every byte as it was.

    Raises:
        BundleError: it is damaged, another one, or not there.
    """
    if f"sha256:{check_seal(path)}" != digest:
        raise BundleError(["the bundle in the store is another one"], code="damaged")
