"""Small promises about the project as a whole."""

import importlib.metadata
import tomllib
from itertools import chain
from pathlib import Path

import kernels

ROOT = Path(__file__).parents[1]


def test_the_package_kernels_is_ours_and_not_the_distribution_of_that_name() -> None:
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    assert "kernels" not in installed
    assert Path(kernels.__file__ or "").parent == ROOT / "kernels"


def test_pip_is_told_to_refuse_the_other_kernels() -> None:
    assert "kernels<0" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_changelog_names_the_package_version_or_what_is_not_released_yet() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")
    ]
    assert headings[0] == "## [Unreleased]" or headings[0].startswith(f"## [{version}]")


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        if requirement.startswith(f"{project['name']}["):
            continue  # an extra that takes in others
        name = requirement.split(">=")[0].split("[")[0]
        assert name.lower() in pinned, f"{name} is not pinned in constraints.txt"
