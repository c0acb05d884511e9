"""A pickle may hold an array and nothing else."""

import os
import pickle

import numpy as np
import pytest

from medley.errors import DataError
from trainer.suite.pickles import load_array


@pytest.mark.parametrize("dtype", ["uint8", "float64", "int32"])
@pytest.mark.parametrize("protocol", [3, 4])
def test_an_array_comes_back(dtype: str, protocol: int) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    loaded = load_array(pickle.dumps(array, protocol=protocol))
    np.testing.assert_array_equal(loaded, array)
    assert loaded.dtype == array.dtype


class Caller:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(Caller()),
        pickle.dumps(np.array([Caller()], dtype=object)),
        pickle.dumps({"a": 1}),
        pickle.dumps(np.zeros(100))[:-20],
        b"",
        b"no pickle",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a pickled array"):
        load_array(data)
