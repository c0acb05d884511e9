from pathlib import Path

import pytest

from medley.errors import DataError
from trainer.pretrain.card import BEGIN, END, write_numbers
from trainer.pretrain.examination import Result

RESULTS = [
    Result("toy", "shipped", 20, 10, 30.0, 60.0),
    Result("toy", "teacher", 20, 10, 40.0, 70.0),
]


def test_only_the_numbers_are_rewritten(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_numbers(card, RESULTS)
    first = card.read_text()
    assert "| toy | 20 | 10 | 10 | **30.0** / 60.0 | 40.0 / 70.0 |" in first
    assert first.startswith("before\n")
    assert first.endswith("\nafter\n")
    assert "old" not in first
    write_numbers(card, RESULTS)
    assert card.read_text() == first


def test_a_card_without_marks_is_refused(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text("nothing here")
    with pytest.raises(DataError, match="no place"):
        write_numbers(card, RESULTS)
