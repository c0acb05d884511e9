import json
from pathlib import Path

import numpy as np
import pytest

from trainer.pretrain.render import draw, load_set, plain_name, render_set, render_sets

pytest.importorskip("resvg_py", reason="the renderer comes with the trainer extra")

RED = '<path fill="#f00" d="M0 0h16v8H0z"/>'
INK = '<path fill="currentColor" d="M0 0h16v16H0z"/>'


def package(folder: Path, **bodies: str) -> Path:
    folder.mkdir()
    icons = {name.replace("_", "-"): {"body": body} for name, body in bodies.items()}
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 16, "height": 16}))
    (folder / "metadata.json").write_text(json.dumps({"categories": {"Shapes": ["red-box"]}}))
    return folder


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("arrow-left-20-filled", "arrow left"),
        ("steam_locomotive", "steam locomotive"),
        ("cat", "cat"),
        ("outline", "outline"),
    ],
)
def test_a_slug_loses_its_style_and_keeps_its_name(slug: str, name: str) -> None:
    assert plain_name(slug) == name


def test_an_icon_is_drawn_where_its_path_is() -> None:
    picture = draw({"icons": {"a": {"body": RED}}}, "a", px=32)
    assert picture is not None
    assert picture.shape == (32, 32, 4)
    assert picture[4, 4].tolist() == [255, 0, 0, 255]
    assert picture[28, 4, 3] == 0


def test_a_broken_icon_is_none() -> None:
    assert draw({"icons": {"a": {"body": "<path"}}}, "a", px=32) is None


def test_a_set_keeps_names_and_categories_and_drops_what_does_not_draw(tmp_path: Path) -> None:
    home = package(tmp_path / "p", red_box=RED, red_box_light_skin_tone=RED, nothing="<g/>")
    render_set("toy", home, tmp_path / "out", mono=False, px=16)
    icons = load_set("toy", tmp_path / "out")
    assert icons.names == ["red box"]
    assert icons.categories == ["Shapes"]
    assert icons.pixels.shape == (1, 16, 16, 4)


def test_of_a_mono_set_two_styles_and_only_alpha_are_kept(tmp_path: Path) -> None:
    home = package(tmp_path / "p", box_outline=INK, box_filled=INK, box=INK)
    render_set("toy", home, tmp_path / "out", mono=True, px=16)
    icons = load_set("toy", tmp_path / "out")
    assert icons.names == ["box", "box"]
    assert np.array_equal(icons.pixels, np.full((2, 16, 16), 255))


def test_rendered_sets_are_not_rendered_again(tmp_path: Path) -> None:
    packages = {"one": package(tmp_path / "a", a=RED), "two": package(tmp_path / "b", b=INK)}
    out = tmp_path / "out"
    assert sorted(render_sets(packages, ["two"], out, px=16, workers=1)) == ["one", "two"]
    assert list(render_sets(packages, ["two"], out, px=16, workers=1)) == []
    assert load_set("two", out).mono
