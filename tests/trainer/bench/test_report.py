import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from medley.errors import DataError
from tests.trainer.bench.made_up import LEARNT, ORDER, record
from trainer.bench.anchors import anchors
from trainer.bench.record import Record, Row, load, save
from trainer.bench.report import markdown, write_report
from trainer.mtil import ORDERS

MTIL = ORDERS["I"]


def seeds() -> list[Record]:
    return [record(seed=seed, gain=gain) for seed, gain in enumerate((-0.02, 0.0, 0.02))]


def row(text: str, *starts: str) -> list[str]:
    """The cells of the one table row that begins so."""
    start = f"| {' | '.join(starts)} |"
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.split("|")[1 + len(starts) : -1]]


def test_the_main_table_has_mean_and_spread_over_seeds() -> None:
    text = markdown(seeds())
    # Transfer: (0.3 + 0.2) / 2. Average: (3 x 0.9 + 0.3 + 2 x 0.8 + 2 x 0.2 + 0.7) / 9, and
    # 6 / 9 of the gain of a seed. Last: (0.9 + 0.8 + 0.7) / 3 and the gain.
    assert row(text, "moe_adapter", "told", "told") == [
        "25.0",
        "63.3 +- 1.3",
        "80.0 +- 2.0",
        "0.00",
    ]
    assert row(text, "moe_adapter", "ddas", "agnostic")[2] == "78.0 +- 2.0"
    assert row(text, "zero-shot", "none", "agnostic") == ["25.0", "30.0", "30.0", "0.00"]
    # Transfer: (0.1 + (0.1 + 0.1) / 2) / 2. Average: 4.3 / 9. Forgetting: (0.5 + 0.5 + 0) / 3.
    assert row(text, "finetune", "none", "agnostic") == ["10.0", "47.8", "56.7", "33.33"]


def test_each_data_set_has_its_last_and_its_transfer() -> None:
    text = markdown(seeds())
    last, transfer = text.split("\n| Last | ")[1].split("\n| Transfer | ")
    assert last.startswith("cold | warm | grey |")
    assert row(last, "agnostic: zero-shot") == ["40.0", "30.0", "20.0"]
    assert row(last, "told: moe_adapter") == ["90.0 +- 2.0", "80.0 +- 2.0", "70.0 +- 2.0"]
    assert row(transfer, "told: moe_adapter") == ["-", "30.0", "20.0"]
    assert row(transfer, "agnostic: finetune") == ["-", "10.0", "10.0"]


def test_the_routing_table_counts_every_image() -> None:
    text = markdown([record()]).split("## Routing")[1]
    # 27 of 30 images went home; rejects (0.1 + 0.1 + 0) / 3, accepts (0.2 + 0 + 0.1) / 3.
    summary, by_task = text.split("| accuracy | cold")[0], text.split("| accuracy | cold")[1]
    assert row(summary, "ddas") == ["90.0", "0.875", "6.7", "5.0", "10.0"]
    accuracy, rejects, accepts = (part.split("\n\n")[0] for part in by_task.split("false "))
    assert row(accuracy, "ddas") == ["80.0", "90.0", "100.0"]
    assert row(rejects, "ddas") == ["10.0", "10.0", "0.0"]
    assert row(accepts, "ddas") == ["20.0", "0.0", "10.0"]


def test_trained_stored_and_active_parameters_stand_apart() -> None:
    text = markdown([record()]).split("## Cost")[1].split("## Pictures")[0]
    assert row(text, "moe_adapter") == ["400,000", "200,000", "100,000", "20.0", "20.0", "500"]
    assert row(text, "finetune")[:3] == ["8,000,000", "4,000,000", "2,000,000"]


def test_the_goals_say_what_is_met_and_what_is_missed() -> None:
    text = markdown([record()])
    assert "0.00 points (goal: 0.00 exactly; met)" in text
    assert row(text, "Transfer less zero-shot >= -0.1") == ["-2.00 **missed**"]
    assert row(text, "Last less told >= -1.0") == ["-2.00 **missed**"]
    assert row(text, "false accepts <= 5.0 %") == ["10.00 **missed**"]
    assert row(text, "false rejects less alpha <= 0.0") == ["1.67 **missed**"]
    assert "Last among all classes" not in text  # nobody measured it


def test_a_difference_that_is_just_at_its_goal_meets_it() -> None:
    whole = record()
    *others, told, ddas = whole.rows
    near = replace(
        ddas, accuracy_TT=tuple(tuple(s - 0.01 for s in line) for line in told.accuracy_TT)
    )
    text = markdown([replace(whole, rows=(*others, told, near))])
    assert row(text, "Last less told >= -1.0") == ["-1.00 met"]


def test_the_smallest_forgetting_is_no_zero() -> None:
    whole = record()
    *others, told, ddas = whole.rows
    first, second, last = told.accuracy_TT
    worse = replace(told, accuracy_TT=(first, second, (LEARNT[0] - 1e-6, *last[1:])))
    text = markdown([replace(whole, rows=(*others, worse, ddas))])
    assert "0.00 points (goal: 0.00 exactly; missed)" in text


def test_a_seed_that_lacks_a_row_is_told() -> None:
    one, two, three = seeds()
    text = markdown([replace(one, rows=one.rows[:-1]), two, three])
    assert row(text, "moe_adapter", "ddas", "agnostic")[2] == "79.0 +- 1.4 (2 of 3 seeds)"


def aggregating() -> Record:
    """Twice as many neighbours, a point more; by the weights, half a point more."""
    one = record()
    told = one.rows[2]

    def better(router: str, points: float) -> Row:
        lines = tuple(tuple(s + points / 100 for s in line) for line in told.accuracy_TT)
        return replace(told, router=router, protocol="agnostic", accuracy_TT=lines)

    gains = {"@1": 0.0, "@2": 1.0, "": 2.0, "@8": 3.0, "-similarity": 2.5}
    rows = [
        better(f"{who}aggregate{variant}", points)
        for who in ("labels+", "ddas+", "")
        for variant, points in gains.items()
    ]
    costs = tuple(
        replace(c, bundle_bytes=2_500_000, shared_bytes=16_000_000, fuse_cpu_seconds=2.0)
        for c in one.costs
        if c.method == "moe_adapter"
    )
    return replace(one, rows=(*one.rows, *rows), costs=costs)


def test_what_neighbours_do_is_told_by_how_many_they_are() -> None:
    text = markdown([aggregating()])
    section = text.split("## Aggregated prediction")[1].split("## By data set")[0]
    transfer, last = section.split("| Last |")
    assert row(transfer, "moe_adapter / ddas") == [
        *("23.00", "25.00", "26.00", "27.00", "28.00", "27.50"),
    ]
    assert row(last, "moe_adapter / ddas")[0] == "78.00"
    assert row(last, "moe_adapter / nobody")[:2] == ["30.00", "80.00"]  # the first is zero-shot's
    assert row(last, "moe_adapter / labels")[0] == "-"  # nobody measured it
    assert "aggregate@2" not in text
    assert row(text, "moe_adapter", "ddas+aggregate", "agnostic")[2] == "82.0"


def test_files_and_seconds_of_a_fusion_are_told() -> None:
    text = markdown([aggregating()]).split("## Storage")[1].split("## Pictures")[0]
    assert row(text, "moe_adapter") == ["2.500", "16.00", "20.0", "2.00"]
    assert "## Storage" not in markdown([record()])
    assert "Aggregated" not in markdown([record()])


def test_what_was_run_is_on_top() -> None:
    text = markdown(seeds())
    assert text.startswith("# The small suite, task after task, 3 seeds")
    assert row(text, "command") == ["`medley bench mtil --suite small`"]
    assert row(text, "order") == ["cold, warm, grey"]
    assert row(text, "images") == ["330 to learn from, 30 to test on"]
    assert row(text, "seeds") == ["0, 1, 2"]
    assert row(text, "machine") == ["2 cores"]
    assert '| moe_adapter | `{"lr": 0.005}` |' in text
    assert "nothing is quoted" in text


def test_published_rows_are_quoted_for_their_own_protocol_only() -> None:
    assert "quoted:" not in markdown([record(suite="mtil")])
    assert anchors("small", MTIL, None) == ()
    assert anchors("mtil", MTIL[:5], None) == ()
    assert anchors("mtil", MTIL, 4) == ()


@pytest.mark.parametrize(
    ("order", "shots", "published"),
    [
        ("I", None, (68.9, 76.7, 85.0)),
        ("II", None, (64.3, 74.7, 84.1)),
        ("I", 5, (68.9, 71.4, 76.1)),
        ("I", 16, (69.3, 75.3, 82.3)),
        ("X-TAIL", 16, (56.0, 63.0, 70.5)),
    ],
)
def test_each_protocol_has_its_own_published_rows(
    order: str, shots: int | None, published: tuple[float, float, float]
) -> None:
    rows = {anchor.method: anchor for anchor in anchors("mtil", ORDERS[order], shots)}
    reference = rows["MoE-Adapters (CVPR 24)"]
    assert (reference.transfer, reference.average, reference.last) == published


def test_an_mtil_report_marks_what_it_quotes() -> None:
    one = record(suite="mtil")
    tasks = len(MTIL)
    zero_shot = replace(one.rows[0], accuracy_TT=((0.5,) * tasks,) * tasks)
    text = markdown(
        [
            replace(
                one,
                order=MTIL,
                rows=(zero_shot,),
                routings=(),
                scores=(),
                costs=(),
                images={},
            )
        ]
    )
    source = "quoted: tables of LEBA, DPW, FARA"
    assert row(text, "MoE-Adapters (CVPR 24)", source) == ["agnostic", "68.9", "76.7", "85.0", "-"]
    assert "except rows marked as quoted" in text
    for heading in ("Routing", "Cost", "must show"):
        assert heading not in text  # nothing measured, nothing told


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([], "no benchmark record"),
        ([record(), record()], "two records of one seed: 0, 0"),
        ([record(), record(seed=1, suite="mtil")], "different suite"),
        ([record(), replace(record(seed=1), shots=5)], "different shots"),
        ([record(), replace(record(seed=1), backbone="another")], "different backbone"),
    ],
)
def test_records_that_cannot_be_compared_are_refused(others: list[Record], message: str) -> None:
    with pytest.raises(DataError, match=message):
        markdown(others)


def test_every_picture_of_the_report_lies_beside_it(tmp_path: Path) -> None:
    records = []
    for one in seeds():
        save(one, tmp_path / f"{one.seed}.json")
        records.append(load(tmp_path / f"{one.seed}.json"))
    write_report(tmp_path / "report", records)
    text = (tmp_path / "report" / "report.md").read_text()
    assert text == markdown(seeds())
    linked = {part.split(")")[0] for part in text.split("](")[1:]}
    written = {file.name for file in (tmp_path / "report").iterdir()}
    assert written == linked | {"report.md"}
    assert {"bars.png", "errors.png", "routing-ddas.png", "sequence-agnostic.png"} <= written
    assert "matrix-moe_adapter-ddas-agnostic.png" in written
    assert "matrix-zero-shot-none-agnostic.png" not in written  # nothing changes in it
    for name in linked:
        Image.open(tmp_path / "report" / name).verify()


def test_one_task_and_one_seed_make_a_report(tmp_path: Path) -> None:
    one = record()
    alone = replace(
        one,
        order=ORDER[:1],
        rows=tuple(replace(r, accuracy_TT=((r.accuracy_TT[0][0],),)) for r in one.rows),
        routings=(
            replace(one.routings[0], counts=((8, 2),), false_reject=(0.2,), false_accept=(0.0,)),
        ),
        costs=one.costs[:1],
        images={"cold": (100, 10)},
    )
    write_report(tmp_path, [alone])
    text = (tmp_path / "report.md").read_text()
    assert row(text, "moe_adapter", "told", "told") == ["-", "90.0", "90.0", "0.00"]
    assert "Transfer less zero-shot" not in text


def test_a_bar_in_a_setting_does_not_break_its_table() -> None:
    text = markdown([replace(record(), settings={"a|b": "c|d"})])
    assert r"| a\|b | `" + json.dumps("c|d").replace("|", r"\|") + "` |" in text
