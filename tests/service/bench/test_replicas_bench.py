"""`medley bench replicas`: its report from lines that are made up, and a quick run of it."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from medley.journal import Journal
from service.bench.command import bench_commands
from service.bench.names import MEDLEY
from service.bench.replicas.cells import CONVERGENCE, FULL, QUICK, READ, Change
from service.bench.replicas.report import PICTURE, REPORT, write_report
from tests.service.bench.made_up import RUN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A line for each cell of a run; every tenth change is ten times as slow."""
    journal = Journal(tmp_path, RUN)
    journal.add("served", {"backbone": "medley-mini"}, MEDLEY)
    times_s = [0.1 if number % 10 == 0 else 0.01 for number in range(100)]
    for hints in (True, False):
        for cell in FULL.cells(hints=hints):
            load = {"rate_hz": 8.0, "visits": 500.0, "errors": 1.0} if cell.loaded else {}
            journal.add(
                cell.bench,
                cell.conditions(3),
                MEDLEY,
                times_s=times_s,
                values=load,
                series={"change_s": (0.02,) * 100},
            )
    return tmp_path


def test_the_report_has_quantiles_of_every_cell_and_what_requests_met(folder: Path) -> None:
    write_report(folder)
    text = (folder / REPORT).read_text()
    row = "| 3 | activation | yes | none | 100 | 10.0 | 100.0 | 100.0 | 20.0 | 20.0 |"
    assert text.count(row) == 2, "one for each bench"
    assert "4 of 2000 requests under load failed." in text
    with Image.open(folder / PICTURE) as picture:
        assert picture.format == "PNG"


def test_the_same_lines_give_the_same_report(folder: Path) -> None:
    write_report(folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_a_plan_measures_both_changes_both_ways_and_load_only_with_hints() -> None:
    cells = [cell for hints in (True, False) for cell in FULL.cells(hints=hints)]
    assert len(cells) == len(set(cells)) == FULL.steps == QUICK.steps
    assert {cell.bench for cell in cells} == {CONVERGENCE, READ}
    assert {cell.change for cell in cells} == set(Change)
    assert {(cell.hints, cell.loaded) for cell in cells} == {
        (True, False),
        (True, True),
        (False, False),
    }
    assert FULL.changes >= 100


def test_a_folder_without_lines_is_one_line(tmp_path: Path) -> None:
    ended = CliRunner().invoke(
        bench_commands, ["replicas", "--out", str(tmp_path), "--report-only"]
    )
    assert ended.exit_code != 0
    assert "measurements.jsonl" in str(ended.exception)


@pytest.mark.slow
def test_a_quick_run_measures_every_cell(tmp_path: Path) -> None:
    words = ["replicas", "--out", str(tmp_path), "--quick"]
    ended = CliRunner().invoke(bench_commands, words)
    assert ended.exit_code == 0, ended.output
    report = (tmp_path / REPORT).read_text()
    for change in Change:
        assert report.count(f"| 2 | {change.value} |") == 6
    assert " 0 of " in report.replace("\n", " ")
