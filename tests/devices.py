"""Where a test's body runs: on the CPU everywhere, and on a CUDA device where there is one."""

import pytest
import torch

__all__ = ["CUDA", "DEVICES", "ON_CUDA"]

# Of whatever runs on a device; `pytest -m gpu` selects it.
ON_CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
)
CUDA = pytest.param("cuda", marks=ON_CUDA)
DEVICES = ("cpu", CUDA)
