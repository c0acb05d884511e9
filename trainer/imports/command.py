"""`medley import`: bundles of checkpoints that others have published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from medley.backbone import Backbone
    from medley.bundle import Bundle
    from medley.extractor import Extractor
    from trainer.datasets import ImageSet
    from trainer.imports.checkpoint import Checkpoint
    from trainer.imports.tasks import TaskText

__all__ = ["import_commands"]

import_commands = typer.Typer(no_args_is_help=True)
out = Console()

BACKBONE = "ViT-B-16/openai"
# The authors' checkpoint holds OpenAI's weights, which open_clip knows from a file only under the
# name that says which activation they were trained with.
BACKBONE_INSIDE = "ViT-B-16-quickgelu"
HUB_FILE = "alexnet-owt-7be5be79.pth"


@import_commands.callback()
def checkpoints() -> None:
    """Make bundles of checkpoints that others have published."""


@import_commands.command("moe-adapters4cl")
def moe_adapters4cl(
    checkpoint: Annotated[
        Path, typer.Option(help="The authors' file after the last task, such as SUN397.pth.")
    ],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the bundles.")],
    tasks: Annotated[
        Path | None,
        typer.Option(help="JSON list of {task, class_names, templates} in the order of learning."),
    ] = None,
    order: Annotated[
        str, typer.Option(help="Without --tasks: the order of MTIL that was learnt.")
    ] = "I",
    autochooser: Annotated[
        Path | None, typer.Option(help="The authors' selector, such as SUN397_autochooser.pth.")
    ] = None,
    alexnet: Annotated[
        Path | None,
        typer.Option(help="torchvision's AlexNet, which that selector looks at; else from cache."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Of the authors' selector; few-shot checkpoints: 0.06.")
    ] = 0.0655,
    root: Annotated[
        Path | None, typer.Option(help="Folder that holds the data sets of MTIL, for our selector.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="TASK=DATA, DATA as for train: training images for our selector."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help=f"open_clip name; default: {BACKBONE}.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone.")] = None,
    backbone_from_checkpoint: Annotated[
        bool, typer.Option(help="Write the checkpoint's own CLIP beside the bundles and use it.")
    ] = False,
    device: Annotated[str, typer.Option(help="Torch device.")] = "cpu",
    version: Annotated[str, typer.Option(help="Version of the bundles.")] = "1",
    licence: Annotated[str, typer.Option(help="Terms of the bundles.")] = "unspecified",
) -> None:
    """Write a bundle for each task of a MoE-Adapters4CL checkpoint (docs/import.md)."""
    from medley.backbone import load_backbone
    from medley.errors import DataError
    from trainer.checkpoint import make_folder
    from trainer.imports.autochooser import read_autochooser
    from trainer.imports.bundles import Source, write_bundles
    from trainer.imports.checkpoint import read_checkpoint
    from trainer.imports.tasks import mtil_tasks, read_tasks

    if backbone_from_checkpoint and weights is not None:
        raise DataError("--weights and --backbone-from-checkpoint exclude each other")
    texts = mtil_tasks(order) if tasks is None else read_tasks(tasks)
    published = read_checkpoint(checkpoint)
    texts = _learnt(texts, published.learnt())
    images = _images(texts, root, data or [])
    extractor = None if autochooser is None else _alexnet(alexnet, device)
    make_folder(folder)
    if backbone_from_checkpoint:
        backbone, weights = backbone or BACKBONE_INSIDE, _write_backbone(published, folder)
    base = load_backbone(backbone or BACKBONE, weights=weights, device=device)
    chooser = None
    if autochooser is not None and extractor is not None:
        chooser = read_autochooser(autochooser, tasks=len(texts), width=_width(extractor, base))
    source = Source(
        checkpoint=published,
        tasks=texts,
        autochooser=chooser,
        threshold=threshold,
        images=images,
        version=version,
        licence=licence,
    )
    extractors = [] if extractor is None else [extractor]
    _show(write_bundles(source, base, folder, extractors=extractors), folder)


def _learnt(texts: tuple[TaskText, ...], learnt: int) -> tuple[TaskText, ...]:
    """The tasks that are in the checkpoint and have a name; say which are left out."""
    if unlearnt := [text.task for text in texts[learnt:]]:
        out.print(f"the checkpoint has not learnt {', '.join(unlearnt)}: left out")
    if len(texts) < learnt:
        out.print(f"the checkpoint has learnt {learnt - len(texts)} tasks more: left out")
    return texts[:learnt]


def _images(
    texts: Sequence[TaskText], root: Path | None, data: Sequence[str]
) -> dict[str, ImageSet]:
    """Training images by task: of MTIL below `root`, and those named one by one."""
    from medley.errors import DataError
    from trainer.datasets import open_dataset
    from trainer.suites import open_suite

    names = [text.task for text in texts]
    images: dict[str, ImageSet] = {}
    if root is not None:
        suite = open_suite("mtil", root=root)
        images = {name: suite.load(name, "train") for name in names}
    for text in data:
        name, equals, spec = text.partition("=")
        if not equals or name not in names:
            raise DataError(f"--data {text}: expected TASK=DATA, TASK one of {', '.join(names)}")
        images[name] = open_dataset(spec, "train")
    return images


def _alexnet(weights: Path | None, device: str) -> Extractor | None:
    """AlexNet from the file named, or from torchvision's cache; it is never fetched."""
    import torch

    from medley.extractor import load_alexnet

    cached = Path(torch.hub.get_dir()) / "checkpoints" / HUB_FILE
    if weights is None and not cached.is_file():
        out.print(
            "no AlexNet weights are at hand (--alexnet FILE): the authors' selector is left out"
        )
        return None
    return load_alexnet(weights or cached, device=device)


def _width(extractor: Extractor, backbone: Backbone) -> int:
    import torch

    with torch.inference_mode():
        blank = torch.zeros(1, 3, *backbone.image_size, device=backbone.device)
        return extractor(blank).shape[1]


def _write_backbone(checkpoint: Checkpoint, folder: Path) -> Path:
    from safetensors.torch import save

    from medley.errors import DataError
    from medley.files import write_whole

    path = folder / "backbone.safetensors"
    try:
        write_whole(path, save(checkpoint.frozen()))
    except OSError as error:
        problem = f"cannot write {path}: {error.strerror}"
        raise DataError(problem, code="not_written") from error
    return path


def _show(bundles: Iterable[Bundle], folder: Path) -> None:
    """One line for each bundle as it is done."""
    for bundle in bundles:
        manifest = bundle.manifest
        file = folder / f"{manifest.task}-{manifest.version}.safetensors"
        out.print(
            f"{file} ({file.stat().st_size / 1e6:.1f} MB, {len(manifest.class_names)} classes); "
            f"selector: {manifest.selector.calibration.method}",
            soft_wrap=True,
            highlight=False,
        )
