"""Before any test imports torch."""

import os

# As `medley/cli.py` does: tests run servers beside themselves (docs/adr/0011).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
