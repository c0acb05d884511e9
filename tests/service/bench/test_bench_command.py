"""`medley bench serve` as people type it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.service.bench.made_up import lines

MEDLEY = (sys.executable, "-c", "from medley.cli import main; main()", "bench", "serve")


def bench(*words: str, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MEDLEY, *words], capture_output=True, text=True, timeout=limit_s, check=False
    )


def test_the_report_is_made_again_from_its_lines(tmp_path: Path) -> None:
    lines(tmp_path)
    answer = bench("--out", str(tmp_path), "--report-only")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == str(tmp_path / "report.md")
    assert (tmp_path / "report.md").is_file()


def test_a_folder_without_lines_is_one_line_of_error(tmp_path: Path) -> None:
    answer = bench("--out", str(tmp_path), "--report-only")
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "measurements.jsonl" in answer.stderr


@pytest.mark.slow
def test_a_quick_run_measures_every_section(tmp_path: Path) -> None:
    answer = bench("--out", str(tmp_path), "--quick", limit_s=600)
    assert answer.returncode == 0, answer.stderr
    report = (tmp_path / "report.md").read_text()
    for heading in ("Goals", "HTTP beside a bare loop", "Saturation", "Load", "Swaps"):
        assert f"\n## {heading}\n" in report
