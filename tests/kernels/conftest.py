"""What the tests of kernels share."""

from collections.abc import Iterator

import pytest

from tests.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One process for the whole session: importing torch takes longer than most tests."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
