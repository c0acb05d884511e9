"""docs/traps.md answers every trap, and every test that it names is there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "traps.md").read_text()
PROOFS = sorted(set(re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", PAGE)))


def test_every_trap_has_a_row_and_an_answer() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    numbers = [row[0].removeprefix("| ") for row in rows]

    assert [n for n in numbers if n.isdigit()] == [str(n) for n in range(1, 31)]
    assert [n for n in numbers if len(n) == 1 and n.isalpha()] == list("ABCDEFGHIJKL")
    assert all(len(row[-1].removesuffix(" |")) > 20 for row in rows if row[-1] != "here |")


@pytest.mark.parametrize("file", sorted({file for file, _ in PROOFS}))
def test_every_test_that_is_named_exists(file: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    there = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}

    assert {name for where, name in PROOFS if where == file} <= there
