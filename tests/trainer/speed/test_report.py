from pathlib import Path

import pytest

from medley.errors import DataError
from medley.journal import FILE, Journal, read_lines
from medley.rows import rows_of
from tests.trainer.speed.made_up import RUN, lines
from trainer.speed.goals import goals_of
from trainer.speed.report import REPORT, write_report, write_summary


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path, RUN)
    series = {"swap_s": (0.1, 0.2)}
    journal.add("swap", {"batch": 8}, "a", times_s=[1.5], values={"x": 2.0}, series=series)
    journal.add("swap", {"batch": 8}, "b", failure="died")
    first, second = read_lines(tmp_path)
    assert (first.run, first.conditions, first.times_s) == (RUN, {"batch": 8}, (1.5,))
    assert (first.values, first.series, first.failure) == ({"x": 2.0}, series, None)
    assert second.failure == "died"


def test_a_line_that_is_not_ours_is_told_by_its_number(tmp_path: Path) -> None:
    lines(tmp_path)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"bench": "kernels"}\n')
    number = len((tmp_path / FILE).read_text().splitlines())
    with pytest.raises(DataError, match=f"line {number}"):
        read_lines(tmp_path)


def test_a_ratio_is_the_median_of_the_ratios_within_rounds(tmp_path: Path) -> None:
    journal = Journal(tmp_path, RUN)
    for name, times_s in (("slow", [2.0, 30.0, 4.0]), ("quick", [1.0, 10.0, 1.0])):
        journal.add("kernels", {"batch": 1}, name, times_s=times_s)
    (row,) = rows_of(read_lines(tmp_path), "kernels")
    ratio = row.ratio("slow", "quick")
    assert ratio is not None
    assert ratio.median == 3
    assert row.ratio("slow", "absent") is None


@pytest.mark.parametrize(("branch", "met"), [(4.0, True), (3.999, False)])
def test_a_goal_is_compared_without_rounding(tmp_path: Path, branch: float, met: bool) -> None:
    lines(tmp_path, branch=branch)
    goals = {goal.promise: goal for goal in goals_of(read_lines(tmp_path))}
    assert goals["expert branch >= 4 x as fast as the dispatcher"].met is met


def test_every_bench_has_its_goals_met_or_missed(tmp_path: Path) -> None:
    lines(tmp_path, different=1)
    found = [(goal.promise.split(",")[0], goal.met) for goal in goals_of(read_lines(tmp_path))]
    assert found == [
        ("relative error against float64 <= 1e-05", False),
        ("expert branch >= 4 x as fast as the dispatcher", True),
        ("tower with experts", True),
        ("throughput with 256 active tasks >= 95 % of 1 task", False),
        ("DDAS with 10 tasks <= 1 % of a forward", True),
        ("DDAS with 1000 tasks <= 10 % of a forward", False),
        ("answers of other tasks over 9 swaps: none differs by a bit", False),
        ("memory grows by <= 1000 bytes a swap", True),
    ]


def test_a_report_shows_goals_failures_errors_and_pictures(tmp_path: Path) -> None:
    lines(tmp_path)
    write_report(tmp_path)
    report = (tmp_path / REPORT).read_text()
    for words in ("**missed**", "failed: NoKernel: on a CPU", "**wrong**", "10.0 GB/s", "a desk"):
        assert words in report
    for name in ("ratios", "overhead", "shares", "swaps"):
        assert f"({name}.png)" in report
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_lines_give_the_same_report(tmp_path: Path) -> None:
    lines(tmp_path)
    write_report(tmp_path)
    first = (tmp_path / REPORT).read_bytes()
    write_report(tmp_path)
    assert (tmp_path / REPORT).read_bytes() == first


def test_a_summary_has_the_goals_of_all_parts(tmp_path: Path) -> None:
    goals = {}
    for name in ("kernels", "swap"):
        lines(tmp_path / name)
        goals[name] = write_report(tmp_path / name)
    write_summary(tmp_path, goals)
    summary = (tmp_path / "README.md").read_text()
    assert "(kernels/report.md)" in summary
    assert summary.count("expert branch") == 2
