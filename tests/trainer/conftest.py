"""Fixtures of the trainer's tests."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.trainer.tiny import NoLargeFiles


@pytest.fixture
def no_large_files() -> NoLargeFiles:
    """A context in which a file cannot grow beyond so many bytes: writing fails in the middle."""

    @contextmanager
    def limited(most_bytes: int = 64 * 1024) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
