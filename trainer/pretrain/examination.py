"""What the base knows of pictures it never learnt from: held-out vendors and held-out concepts.

Zero-shot only: one text feature a name, from "{}" and one caption. With the shipped text tower, and
with its teacher's embeddings as the upper bound of what distillation could give.

Dimensions: N images, C classes, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import image_transform_v2
from torch import Tensor

from medley.mini import MINI_PREPROCESS
from trainer.datasets import ImageSet
from trainer.pretrain.augment import on_white
from trainer.pretrain.cache import normalise
from trainer.pretrain.corpus import Corpus, Emoji, normalised
from trainer.pretrain.render import IconSet
from trainer.pretrain.text import embed

_PROMPTS = ("{}", "an icon of a {}")
_BATCH = 32
_SUITE_IMAGES = 600  # of each task; two points of accuracy at most one way or the other

Reader = Callable[[Sequence[str]], Tensor]  # texts to features of length one


@dataclass(frozen=True)
class Result:
    """One line of the examination.

    Attributes:
        test: what was asked.
        text: whose text features, "shipped" or "teacher".
        images: how many.
        classes: names to choose from.
        top1: share of images whose name came first, in percent.
        top5: share whose name was among the first five.
    """

    test: str
    text: str
    images: int
    classes: int
    top1: float
    top5: float


@dataclass(frozen=True)
class Sheet:
    """Named pictures to examine with.

    Attributes:
        features: (N, E) image features of length one.
        names: what each shows.
    """

    features: Tensor
    names: list[str]

    def only(self, chosen: Callable[[str], bool]) -> Sheet:
        """The pictures whose name is chosen."""
        rows = [row for row, name in enumerate(self.names) if chosen(name)]
        return Sheet(self.features[rows], [self.names[row] for row in rows])


def examine(
    model: CLIP,
    readers: dict[str, Reader],
    *,
    vendors: Sequence[IconSet],
    learnt: dict[str, IconSet],
    corpus: Corpus,
    emoji: Emoji,
) -> list[Result]:
    """Ask for every picture's name, over all names of its vendor and over the held-out concepts."""
    sheets = {icons.name: vendor_sheet(model, icons, emoji) for icons in vendors}
    held_out_pictures = [
        np.asarray(learnt[item.set_name].pixels[item.row]) for item in corpus.held_out_items
    ]
    known_vendors = Sheet(
        image_features(model, held_out_pictures), [item.name for item in corpus.held_out_items]
    )
    seen = {item.name for item in corpus.items if item.kind == "colour"}
    results = []
    for text, read in readers.items():
        held_out_CE = class_features(read, corpus.held_out)
        for vendor, sheet in sheets.items():
            names = sorted(set(sheet.names))
            names_CE = class_features(read, names)
            held_out = sheet.only(lambda name: name in corpus.held_out)
            for test, part, classes_CE, choice in (
                ("all names", sheet, names_CE, names),
                ("names seen in training", sheet.only(seen.__contains__), names_CE, names),
                ("held-out concepts over all names", held_out, names_CE, names),
                ("held-out concepts", held_out, held_out_CE, corpus.held_out),
            ):
                results.append(ask(f"{vendor}, {test}", text, part, classes_CE, choice))
        test = "held-out concepts, known vendors"
        results.append(ask(test, text, known_vendors, held_out_CE, corpus.held_out))
    return results


def examine_suite(
    model: CLIP, readers: dict[str, Reader], tasks: Iterable[ImageSet]
) -> list[Result]:
    """Zero-shot on test images of the small suite, with each task's own prompts."""
    results = []
    transform = image_transform_v2(MINI_PREPROCESS, is_train=False)
    for task in tasks:
        rows = np.linspace(0, len(task) - 1, min(len(task), _SUITE_IMAGES)).astype(int).tolist()
        pixels = torch.stack([transform(task.image(row)) for row in rows])
        names = list(task.class_names)
        sheet = Sheet(_features(model, pixels), [names[task.labels[row]] for row in rows])
        for text, read in readers.items():
            classes_CE = class_features(read, names, task.templates)
            results.append(ask(f"suite: {task.name}", text, sheet, classes_CE, names))
    return results


def vendor_sheet(model: CLIP, icons: IconSet, emoji: Emoji) -> Sheet:
    """A vendor's emoji by their emojibase labels, flags left out."""
    names = [normalised(name) for name in icons.names]
    rows = [
        row
        for row, name in enumerate(names)
        if name in emoji.keywords and not name.startswith("flag")
    ]
    pictures = [np.asarray(icons.pixels[row]) for row in rows]
    return Sheet(image_features(model, pictures), [names[row] for row in rows])


def ask(test: str, text: str, sheet: Sheet, classes_CE: Tensor, names: list[str]) -> Result:
    """Top-1 and top-5 of one sheet."""
    if not sheet.names:
        return Result(test, text, 0, len(names), 0.0, 0.0)
    right_N = torch.tensor([names.index(name) for name in sheet.names])
    cosines_NC = sheet.features @ classes_CE.T
    own_N1 = cosines_NC.gather(1, right_N[:, None])
    better_N = (cosines_NC > own_N1).sum(1)
    top1, top5 = ((better_N < k).float().mean().item() * 100 for k in (1, 5))
    return Result(test, text, len(right_N), len(names), round(top1, 1), round(top5, 1))


def class_features(
    read: Reader, names: Sequence[str], templates: Sequence[str] = _PROMPTS
) -> Tensor:
    """(C, E) of length one: the mean over the prompts."""
    read_TCE = torch.stack([read([t.replace("{}", name) for name in names]) for t in templates])
    return F.normalize(read_TCE.sum(0), dim=-1)


def shipped_reader(model: CLIP, tokenizer: SimpleTokenizer) -> Reader:
    """Texts through the model's own text tower."""
    return lambda texts: embed(model, tokenizer(list(texts)))


def image_features(model: CLIP, pictures: Sequence[NDArray[Any]]) -> Tensor:
    """(N, E) of length one, of RGBA pictures on white."""
    starts = range(0, len(pictures), _BATCH)
    batches = (normalise(on_white(pictures[start : start + _BATCH])) for start in starts)
    return torch.cat([_features(model, images) for images in batches])


@torch.inference_mode()
def _features(model: CLIP, pixels_N3SS: Tensor) -> Tensor:
    parts = [F.normalize(model.visual(part), dim=-1) for part in pixels_N3SS.split(_BATCH)]
    return torch.cat(parts)
