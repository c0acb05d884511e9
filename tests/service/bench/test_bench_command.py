"""`medley bench serve` as people type it."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.bench.command import bench_commands
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


@pytest.mark.parametrize(
    ("sizes", "told"), [("1,3", "3 is not a power of two"), ("1,many", "'many'"), ("8,1", "ascend")]
)
def test_batch_sizes_that_no_server_takes_are_refused_before_anything_is_measured(
    tmp_path: Path, sizes: str, told: str
) -> None:
    words = ["serve", "--out", str(tmp_path / "run"), "--buckets", sizes]
    answer = CliRunner().invoke(bench_commands, words)
    assert answer.exit_code == 2
    assert told in answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_quick_run_measures_every_section(tmp_path: Path) -> None:
    answer = bench("--out", str(tmp_path), "--quick", limit_s=600)
    assert answer.returncode == 0, answer.stderr
    report = (tmp_path / "report.md").read_text()
    for heading in ("Goals", "HTTP beside a bare loop", "Saturation", "Load", "Swaps"):
        assert f"\n## {heading}\n" in report
