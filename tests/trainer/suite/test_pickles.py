"""A pickle may hold an array and nothing else."""

import os
import pickle

import numpy as np
import pytest

from medley.errors import DataError
from trainer.suite.pickles import load_array, load_mapping


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


def test_a_table_of_plain_values_comes_back() -> None:
    table = load_mapping(pickle.dumps({"data": np.arange(3), b"labels": [1, 2]}, protocol=4))
    assert table["data"].tolist() == [0, 1, 2]
    assert table["labels"] == [1, 2]


@pytest.mark.parametrize("value", [{"data": Caller()}, [1, 2], np.zeros(2), {"x": {Caller}}])
def test_a_table_that_names_anything_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="not a pickled"):
        load_mapping(pickle.dumps(value))


@pytest.mark.parametrize("data", [b"cos\nsystem\n(S'exit 1'\ntR.", b"}b.", b"N}b.", b"\x80\xff"])
def test_bytes_that_nobody_pickled_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a pickled"):
        load_mapping(data)
