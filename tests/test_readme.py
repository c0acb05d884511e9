"""Commands that the README and the docs show exist, with the options they show."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup

from medley.cli import build

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHOWN = [
    (page.relative_to(ROOT), line)
    for page in PAGES
    for line in re.findall(r"^\s+(?:\$ )?medley (\w.*)$", page.read_text(), flags=re.MULTILINE)
]


def test_the_readme_shows_commands() -> None:
    assert sum(page.name == "README.md" for page, _ in SHOWN) >= 5


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_a_command_that_is_shown_exists_with_its_options(page: Path, line: str) -> None:
    command: Any = build()
    words = re.sub(r"[\[\]]", "", line.partition("#")[0]).split()
    while isinstance(command, TyperGroup):
        assert words[0] in command.commands, f"{page}: no command {words[0]}"
        command = command.commands[words.pop(0)]
    known = {o for one in command.params for o in (*one.opts, *one.secondary_opts)}
    assert {w for w in words if w.startswith("-")} <= known | {"--help"}
