"""Icon sets in Iconify's JSON form: names, aliases and SVG bodies. Not their meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from trainer.suite.drawing import SIDE, render_svg

__all__ = ["IconSet"]

_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


class IconSet:
    """One set, read from the unpacked package's ``icons.json``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._set: dict[str, Any] = json.loads((folder / "icons.json").read_text(encoding="utf-8"))

    def names_in(self, *categories: str) -> list[str]:
        """Names of the icons that the package's ``metadata.json`` files there, sorted."""
        filed = json.loads((self._folder / "metadata.json").read_text(encoding="utf-8"))
        return sorted(name for category in categories for name in filed["categories"][category])

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def draw(self, name: str, *, side: int = SIDE) -> Image.Image | None:
        """The icon as RGBA, its longer side `side` pixels; None if there is none of that name."""
        icon = self._find(name)
        if icon is None:
            return None
        left, top, width, height = (
            icon.get(key, self._set.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        box = f'viewBox="{left} {top} {width} {height}"'
        scale = side / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return render_svg(f"<svg {_NAMESPACES} {box}>{icon['body']}</svg>", *size)

    def draw_first(self, *names: str, side: int = SIDE) -> Image.Image | None:
        """The first of these icons that the set has: some are spelt in two ways."""
        drawings = (self.draw(name, side=side) for name in names)
        return next((drawing for drawing in drawings if drawing is not None), None)

    def _find(self, name: str) -> dict[str, Any] | None:
        alias = self._set.get("aliases", {}).get(name)
        found = self._set["icons"].get(alias["parent"] if alias else name)
        return None if found is None else dict(found)
