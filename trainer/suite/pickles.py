"""Numpy arrays and plain values out of a pickle, and nothing else.

A pickle can call whatever it names, so it may name only what an array is made of.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.typing import NDArray

from medley.errors import DataError

__all__ = ["load_array", "load_mapping"]

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # as numpy 1 wrote it
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}

_DAMAGED = (  # what the unpickler raises on bytes that nobody pickled
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError),
    *(AttributeError, OverflowError, MemoryError),
)


def load_array(data: bytes) -> NDArray[Any]:
    """The array in a pickle.

    Raises:
        DataError: it names anything but a plain numpy array, is damaged, or holds no array.
    """
    loaded = _load(data)
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"not a pickled array but {type(loaded).__name__}")
    return loaded


def load_mapping(data: bytes) -> dict[str, Any]:
    """The table in a pickle, of arrays and plain values; one that Python 2 wrote will do.

    Raises:
        DataError: it names anything but a plain numpy array, is damaged, or holds no table.
    """
    loaded = _load(data)
    if not isinstance(loaded, dict):
        raise DataError(f"not a pickled table but {type(loaded).__name__}")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in loaded.items()}


def _load(data: bytes) -> Any:
    try:
        return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except _DAMAGED as error:
        raise DataError(f"not a pickled array: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _ALLOWED[module, name]
