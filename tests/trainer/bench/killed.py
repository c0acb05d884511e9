"""Runs the tiny benchmark in a folder, so that a test can kill it."""

import sys
from pathlib import Path

from tests.models import tiny_backbone
from tests.trainer.bench.course import bench

bench(tiny_backbone(), Path(sys.argv[1]))
