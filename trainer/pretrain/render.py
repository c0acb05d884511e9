"""Icon sets to pixels: every named icon of an Iconify package as a square RGBA picture.

Chooses which icons to draw and what they are called; what is trained on is `corpus`'s business.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.pretrain.files import load_json, map_array, save_array, save_json

_STYLE = re.compile(
    r"[- ](outline|outlined|filled|fill|regular|bold|thin|light|duotone|twotone|linear|broken|sharp"
    r"|rounded|round|solid|line|remix|flat|color|negative|24px|[0-9]+|stroke)$"
)
_SKIN_TONE = re.compile(
    r"(light-skin|dark-skin|medium-skin|-medium-dark|-medium-light|-medium$|-dark$|skin-tone"
    r"|(man|woman|person|hand|finger|hands|child|baby|girl|boy).*-(light|medium|dark)(-|$))"
)
_FAINTEST_ALPHA = 60  # an icon that is nowhere more opaque than this did not draw
_STYLES_A_NAME = 2  # of a single-colour icon: outline, filled, sharp, ... are nearly one picture


@dataclass(frozen=True)
class IconSet:
    """One rendered set.

    Attributes:
        name: of the set.
        mono: the icons take the colour of the text around them, so only their alpha is kept.
        pixels: (N, px, px, 4) RGBA or, mono, (N, px, px) alpha, uint8, mapped from disk.
        names: what each icon shows, by its slug.
        categories: the set's own category of each icon, "" if it has none.
    """

    name: str
    mono: bool
    pixels: NDArray[np.uint8]
    names: list[str]
    categories: list[str]


def plain_name(slug: str) -> str:
    """The slug without its style: ``arrow-left-20-filled`` becomes ``arrow left``."""
    name = slug.replace("_", "-")
    while (shorter := _STYLE.sub("", name)) not in ("", name):
        name = shorter
    return name.replace("-", " ").strip()


def render_sets(
    packages: dict[str, Path], mono: Iterable[str], folder: Path, *, px: int, workers: int
) -> Iterator[str]:
    """Render the sets that ``folder`` lacks, several at a time; yields each finished name.

    Args:
        packages: set name to unpacked package.
        mono: the sets of single-colour icons.
        folder: gets ``<set>.npy`` and ``<set>.json``; the JSON comes last and marks it whole.
        px: side of the pictures.
        workers: processes.
    """
    missing = [name for name in packages if not (folder / f"{name}.json").exists()]
    single = set(mono)
    with ProcessPoolExecutor(workers) as pool:
        jobs = {
            pool.submit(render_set, name, packages[name], folder, mono=name in single, px=px): name
            for name in missing
        }
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]


def render_set(name: str, package: Path, folder: Path, *, mono: bool, px: int) -> None:
    """Render one set and write it to ``folder``."""
    icons = load_json(package / "icons.json")
    category = _categories(package)
    pixels, names, categories = [], [], []
    for plain, slug in _chosen(icons["icons"], mono=mono):
        picture = draw(icons, slug, px=px)
        if picture is None or picture[..., 3].max() < _FAINTEST_ALPHA:
            continue
        pixels.append(picture[..., 3] if mono else picture)
        names.append(plain)
        categories.append(category.get(slug, ""))
    save_array(folder / f"{name}.npy", np.stack(pixels))
    save_json(folder / f"{name}.json", {"mono": mono, "names": names, "categories": categories})


def load_set(name: str, folder: Path) -> IconSet:
    """Open a set that `render_set` wrote."""
    about = load_json(folder / f"{name}.json")
    pixels = map_array(folder / f"{name}.npy")
    return IconSet(name, about["mono"], pixels, about["names"], about["categories"])


def draw(icons: dict[str, Any], slug: str, *, px: int) -> NDArray[np.uint8] | None:
    """One icon of an Iconify collection as (px, px, 4) RGBA, or None if its SVG is broken."""
    import resvg_py  # only who renders needs it

    icon = icons["icons"][slug]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{px}" height="{px}" color="#000">'
        f"{icon['body']}</svg>"
    )
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=px, height=px, skip_system_fonts=True)
    except ValueError:
        return None
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def _chosen(icons: dict[str, Any], *, mono: bool) -> list[tuple[str, str]]:
    """(plain name, slug) of the icons worth drawing."""
    slugs: dict[str, list[str]] = {}
    for slug, icon in icons.items():
        if not icon.get("hidden") and (mono or not _SKIN_TONE.search(slug)):
            slugs.setdefault(plain_name(slug), []).append(slug)
    chance = random.Random(0)
    chosen = []
    for name, styles in slugs.items():
        if mono and len(styles) > _STYLES_A_NAME:
            styles = chance.sample(styles, _STYLES_A_NAME)
        chosen += [(name, slug) for slug in styles]
    return chosen


def _categories(package: Path) -> dict[str, str]:
    """Slug to category, the first one that lists it."""
    path = package / "metadata.json"
    listed = load_json(path).get("categories", {}) if path.exists() else {}
    category: dict[str, str] = {}
    for name, slugs in listed.items():
        for slug in slugs:
            category.setdefault(slug, name)
    return category
