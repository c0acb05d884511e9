import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.errors import DataError
from tests.trainer.bench.made_up import record
from tests.trainer.tiny import NoLargeFiles
from trainer.bench.record import Record, Routing, Row, load, save

Change = Callable[[dict[str, Any]], object]


def changed(path: Path, change: Change) -> Path:
    """Change what the file says, with a digest that fits."""
    from trainer.bench.record import _digest

    whole = json.loads(path.read_text())
    change(whole["record"])
    whole["digest"] = _digest(whole["record"])
    path.write_text(json.dumps(whole))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(record(), tmp_path / "seed-0.json")
    return tmp_path / "seed-0.json"


def test_what_is_written_is_read_back(file: Path) -> None:
    assert load(file) == record()
    assert [path.name for path in file.parent.iterdir()] == ["seed-0.json"]


SHARES = st.floats(0, 1)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(), st.lists
)
SETTINGS: st.SearchStrategy[Any] = st.dictionaries(st.text(), JSON)


@settings(deadline=None)
@given(st.data())
def test_any_record_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    order = tuple(data.draw(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True)))
    tasks = len(order)

    def line(shares: st.SearchStrategy[Any], length: int) -> Any:
        return data.draw(st.lists(shares, min_size=length, max_size=length).map(tuple))

    written = Record(
        suite=data.draw(st.text()),
        order=order,
        backbone="b",
        seed=data.draw(st.integers()),
        shots=data.draw(st.none() | st.integers(1)),
        rows=(
            Row(
                method=data.draw(st.text()),
                router="r",
                protocol="told",
                accuracy_TT=tuple(line(SHARES, tasks) for _ in order),
            ),
        ),
        routings=(
            Routing(
                router="r",
                counts=tuple(line(st.integers(0), tasks + 1) for _ in order),
                auroc=data.draw(SHARES),
                false_reject=line(SHARES, tasks),
                alpha=data.draw(st.none() | SHARES),
                false_accept=line(SHARES, tasks),
            ),
        ),
        scores=(),
        costs=(),
        settings=data.draw(SETTINGS),
        machine="m",
        images=dict.fromkeys(order, (3, 4)),
    )
    path = tmp_path_factory.mktemp("records") / "r.json"
    save(written, path)
    assert load(path) == written


def test_white_space_is_no_damage(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()), indent=2) + "\n")
    assert load(file) == record()


def test_a_missing_file_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing\.json: No such file"):
        load(tmp_path / "nothing.json")


@pytest.mark.parametrize("keep", [0, 1, 40, 500, -1])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match="is damaged: not JSON"):
        load(file)


@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"[" * 100_000, b"accuracy,0.5\n"])
def test_what_is_not_json_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(DataError, match="is damaged: not JSON"):
        load(file)


def test_a_changed_number_is_damage(file: Path) -> None:
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataError, match="it has changed since it was written"):
        load(file)


@pytest.mark.parametrize("content", ["[]", "null", '{"format": "recipe"}', '{"seed": 0}'])
def test_another_kind_of_file_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(DataError, match=r"seed-0\.json is not a benchmark record$"):
        load(file)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(file: Path, version: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": version}))
    with pytest.raises(DataError, match=r"is a benchmark record of version .*, this reads"):
        load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("suite"), "suite: Field required"),
        (lambda r: r.update(speed=1), "speed: Unexpected keyword"),
        (lambda r: r.update(seed="0"), "seed: Input should be a valid integer"),
        (lambda r: r.update(images={"warm": [1, 2, 3]}), r"images\.warm"),
        (lambda r: r.update(order=["cold", "cold", "grey"]), "task cold is there twice"),
        (lambda r: r.update(order=[]), "the order has no task"),
        (lambda r: r.update(order=["cold", "warm"]), "must be 2 of 2 each"),
        (lambda r: r["rows"].append(r["rows"][0]), "row .* is there twice"),
        (lambda r: r["rows"][0]["accuracy_TT"][0].pop(), "must be 3 of 3 each"),
        (lambda r: r["rows"][0]["accuracy_TT"][0].__setitem__(0, 70.1), "70.1 is not a share"),
        (lambda r: r["rows"][0]["accuracy_TT"][0].__setitem__(0, float("nan")), "finite number"),
        (lambda r: r["routings"][0]["counts"][0].pop(), "must be 3 of 4 each"),
        (lambda r: r["routings"][0].update(auroc=-0.1), "-0.1 is not a share"),
        (lambda r: r["images"].update(chess=[1, 2]), "chess not in the order"),
        (lambda r: r["costs"][0].update(task="chess"), "chess not in the order"),
    ],
)
def test_a_record_that_cannot_be_is_refused_in_one_line(
    file: Path, change: Change, message: str
) -> None:
    with pytest.raises(DataError, match=f"is not a benchmark record: .*{message}") as caught:
        load(changed(file, change))
    assert "\n" not in str(caught.value)


def test_two_routers_of_one_name_are_refused_before_they_are_written() -> None:
    with pytest.raises(DataError, match="routing ddas is there twice"):
        replace(record(), routings=record().routings[:1] * 2)


def test_a_full_disk_leaves_the_older_record(file: Path, no_large_files: NoLargeFiles) -> None:
    large = replace(record(), command="x" * 100_000)
    with no_large_files(), pytest.raises(DataError, match="cannot write"):
        save(large, file)
    assert load(file) == record()
    assert len(list(file.parent.iterdir())) == 1
