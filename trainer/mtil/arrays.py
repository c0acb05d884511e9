"""Pictures that come many in one file: CIFAR's pickles and MNIST's IDX."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medley.errors import DataError
from trainer.suite.pickles import load_mapping

__all__ = ["read_cifar", "read_idx"]

CIFAR_SHAPE = (3, 32, 32)
IDX_UINT8 = 0x08


def read_cifar(file: Path, num_classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One part of CIFAR-100: pixels uint8 (N, 32, 32, 3) and fine labels int64 (N,).

    Raises:
        DataError: no such file, a pickle of anything but plain values, or not what CIFAR holds.
    """
    try:
        table = load_mapping(_bytes(file))
        pixels_NCHW = np.asarray(table["data"]).reshape(-1, *CIFAR_SHAPE)
        labels_N = np.asarray(table["fine_labels"], dtype=np.int64)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{file}: not a part of CIFAR-100: {error}") from error
    if pixels_NCHW.dtype != np.uint8 or labels_N.shape != pixels_NCHW.shape[:1]:
        raise DataError(f"{file}: {len(pixels_NCHW)} images but labels {labels_N.shape}")
    if labels_N.size and not 0 <= labels_N.min() <= labels_N.max() < num_classes:
        raise DataError(f"{file}: a label outside 0..{num_classes - 1}")
    return pixels_NCHW.transpose(0, 2, 3, 1), labels_N


def read_idx(file: Path, ndim: int) -> NDArray[np.uint8]:
    """An array of bytes with `ndim` dimensions from an IDX file, or from the same with ``.gz``.

    Raises:
        DataError: neither file is there, or it is damaged.
    """
    packed = file.with_name(f"{file.name}.gz")
    if not file.is_file() and not packed.is_file():
        raise DataError(f"{file}: no such file, nor with .gz")
    if file.is_file():
        data = _bytes(file)
    else:
        file, data = packed, _unpacked(packed)
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes([0, 0, IDX_UINT8, ndim]):
        raise DataError(f"{file}: not an IDX file of bytes in {ndim} dimensions")
    shape = np.frombuffer(data, ">u4", count=ndim, offset=4).astype(np.int64)
    expected = int(shape.prod())
    if len(data) - header != expected:
        raise DataError(f"{file}: {expected} bytes announced, {len(data) - header} there")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error


def _unpacked(file: Path) -> bytes:
    try:
        return gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be unpacked: {error}") from error
