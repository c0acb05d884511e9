from pathlib import Path

import pytest
from PIL import Image

from medley.errors import DataError
from medley.journal import FILE, Journal, read_lines
from service.bench.goals import goals_of, goals_table
from service.bench.report import REPORT, write_report
from tests.service.bench.made_up import RUN, lines


@pytest.mark.parametrize(("http_s", "met"), [(1.15, True), (1.1501, False)])
def test_fifteen_per_cent_over_the_bare_loop_is_the_limit(
    tmp_path: Path, http_s: float, met: bool
) -> None:
    lines(tmp_path, http_s=http_s)
    (goal,) = [g for g in goals_of(read_lines(tmp_path)) if g.what.startswith("HTTP at saturation")]
    assert goal.met is met


def test_one_failed_request_is_a_missed_goal(tmp_path: Path) -> None:
    lines(tmp_path, errors=1)
    goals = goals_of(read_lines(tmp_path))
    assert [(g.measured, g.met) for g in goals if g.what == "no request fails"] == [
        ("1 of 1200", False)
    ]


def test_servers_that_compute_something_else_are_a_missed_goal(tmp_path: Path) -> None:
    lines(tmp_path, apart=2e-4)
    assert "**missed**" in goals_table(goals_of(read_lines(tmp_path)))


def test_a_ratio_above_one_means_that_we_answer_more_images(tmp_path: Path) -> None:
    lines(tmp_path)
    ratios = {g.what: g.measured for g in goals_of(read_lines(tmp_path)) if "infinity's," in g.what}
    assert [measured.partition(" ")[0] for measured in ratios.values()] == ["0.75", "1.50"]


def test_processor_time_is_taken_apart_into_model_decoding_http_and_visitors(
    tmp_path: Path,
) -> None:
    lines(tmp_path)
    (goal,) = [g for g in goals_of(read_lines(tmp_path)) if g.what.startswith("where the time")]
    assert goal.measured == "model 8.0, decoding +2.0, HTTP and queue +1.0, visitors +1.0"


def test_the_headline_is_the_p99_of_sixteen_tasks_at_eighty_per_cent(tmp_path: Path) -> None:
    lines(tmp_path)
    (goal,) = [g for g in goals_of(read_lines(tmp_path)) if g.what.startswith("p99 at 80")]
    assert goal.measured == "20.0 ms, of 200"


def test_the_report_has_every_section_and_both_pictures(tmp_path: Path) -> None:
    lines(tmp_path)
    write_report(tmp_path)
    text = (tmp_path / REPORT).read_text()
    for heading in ("Goals", "HTTP beside a bare loop", "Beside infinity", "Saturation", "Load"):
        assert f"\n## {heading}\n" in text
    assert "Served: backbone medley-mini, buckets 1." in text
    for name in ("load.png", "throughput.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
        assert f"({name})" in text


def test_a_p99_of_few_visits_is_left_out(tmp_path: Path) -> None:
    lines(tmp_path)
    write_report(tmp_path)
    rows = [
        row.split(" | ")
        for row in (tmp_path / REPORT).read_text().splitlines()
        if row.startswith("| jpeg | 16 | uniform |") and "| 80 |" in row and "200" in row
    ]
    p99 = {row[3]: row[11] for row in rows}
    assert p99 == {"none": "40.0", "every second": "-"}


def test_swaps_stand_beside_the_same_load_without_them(tmp_path: Path) -> None:
    lines(tmp_path)
    write_report(tmp_path)
    swaps = (tmp_path / REPORT).read_text().partition("## Swaps")[2]
    assert "| jpeg | 16 | uniform | 80 | 20.0 | 20.0 | 30.0 | 30.0 | 3 | 60 | 70 |" in swaps


def test_a_run_that_was_stopped_has_a_report_of_what_there_is(tmp_path: Path) -> None:
    Journal(tmp_path, RUN)
    write_report(tmp_path)
    assert "Nothing was measured." in (tmp_path / REPORT).read_text()


def test_a_damaged_line_is_told_by_its_number(tmp_path: Path) -> None:
    lines(tmp_path)
    with (tmp_path / FILE).open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="line"):
        write_report(tmp_path)
