import hashlib
import io
import re
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.sources import (
    ALL,
    COLOUR_ICONS,
    HELD_OUT_ICONS,
    MONO_ICONS,
    TEXTS_AND_TEACHERS,
    Source,
    SourceError,
    fetch,
    source,
)


@pytest.mark.parametrize("pinned", ALL, ids=lambda pinned: pinned.name)
def test_every_source_is_pinned_and_says_whose_it_is(pinned: Source) -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", pinned.sha256)
    assert re.match(r"[0-9]", pinned.version)
    assert pinned.licence
    assert pinned.attribution


def test_names_are_unique() -> None:
    assert len({pinned.name for pinned in ALL}) == len(ALL)


def test_nothing_share_alike_is_learnt_from() -> None:
    assert not [s.name for s in (*COLOUR_ICONS, *MONO_ICONS) if re.search("SA|GPL", s.licence)]
    assert all("SA" in s.licence for s in HELD_OUT_ICONS)


@pytest.mark.parametrize("used", [*COLOUR_ICONS, *MONO_ICONS, *TEXTS_AND_TEACHERS])
def test_notice_names_everything_the_base_was_made_from(used: Source) -> None:
    notice = (Path(__file__).parents[2] / "NOTICE").read_text(encoding="utf-8")
    assert used.attribution in notice
    assert f"{used.package} {used.version}" in notice


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SourceError, match=r"'nope'.*openmoji"):
        source("nope")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A wheel in a folder that pip takes for the index."""
    index = tmp_path / "index"
    index.mkdir()
    path = index / "medley_toy-1.0-py3-none-any.whl"
    info = "medley_toy-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("medley_toy/data.txt", "hello")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: medley-toy\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source("toy", "pip", "medley-toy", "1.0", digest, "MIT", "us")


def test_fetch_unpacks_once_and_leaves_nothing_else(wheel: Source, tmp_path: Path) -> None:
    folder = fetch(wheel, tmp_path / "cache")
    assert (folder / "medley_toy" / "data.txt").read_text() == "hello"
    (folder / "mark").touch()
    assert fetch(wheel, tmp_path / "cache") == folder
    assert (folder / "mark").exists()
    assert list(folder.parent.iterdir()) == [folder]


def test_fetch_refuses_other_bytes_than_those_pinned(wheel: Source, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="do not use it"):
        fetch(replace(wheel, sha256="0" * 64), tmp_path / "cache")
    assert list((tmp_path / "cache" / "sources").iterdir()) == []


def test_fetch_says_what_could_not_be_fetched(wheel: Source, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"toy: cannot fetch medley-toy==9\.9"):
        fetch(replace(wheel, version="9.9"), tmp_path / "cache")


def test_an_archive_that_leads_outside_is_refused(tmp_path: Path) -> None:
    from trainer.sources import _UNPACK

    archive = tmp_path / "evil.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("../../evil")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(tarfile.OutsideDestinationError):
        _UNPACK["npm"](archive, tmp_path / "a" / "b")
    assert not (tmp_path / "evil").exists()
