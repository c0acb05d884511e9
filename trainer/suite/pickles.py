"""Numpy arrays out of a pickle, and nothing else: a pickle can call whatever it names."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.typing import NDArray

from medley.errors import DataError

__all__ = ["load_array"]

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,  # as numpy 1 wrote it
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def load_array(data: bytes) -> NDArray[Any]:
    """The array in a pickle.

    Raises:
        DataError: it names anything but a plain numpy array, is damaged, or holds no array.
    """
    try:
        loaded = _ArrayUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError) as error:
        raise DataError(f"not a pickled array: {error}") from error
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"not a pickled array but {type(loaded).__name__}")
    return loaded


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return _ALLOWED[module, name]
