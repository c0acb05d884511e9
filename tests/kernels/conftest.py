"""What the tests of kernels share."""

from collections.abc import Iterator

import pytest

from tests.devices import CUDA
from tests.kernels.interpreter import Interpreter
from tests.kernels.runner import OnDevice, Runner


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One process for the whole session: importing torch takes longer than most tests."""
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session", params=["interpreted", CUDA])
def runner(request: pytest.FixtureRequest, interpreter: Interpreter) -> Runner:
    """What the laws of a kernel are tested on."""
    return interpreter if request.param == "interpreted" else OnDevice(request.param)
