"""`medley bench cil`. Heavy imports wait until it runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from trainer.options import DEFAULT_SEEDS, BackboneName, Cache, Device, Preset, Seeds, Weights
from trainer.progress import bars
from trainer.sources import DEFAULT_CACHE

if TYPE_CHECKING:
    from trainer.datasets import ImageSet

__all__ = ["cil_command"]

out, err = Console(), Console(stderr=True)


class CilMethodName(StrEnum):
    """What is compared; bundles: one a step, DDAS choosing among them."""

    ZERO_SHOT = "zero-shot"
    LINEAR_PROBE = "linear-probe"
    FINETUNE = "finetune"
    LORA = "lora"
    MOE_ADAPTER = "moe_adapter"
    BUNDLES = "bundles"


def cil_command(
    data: Annotated[
        str,
        typer.Argument(help="suite:<task>, mtil:<task>:<folder>, or a folder with train and test."),
    ],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the run; one that was interrupted goes on.")
    ],
    steps: Annotated[int, typer.Option(min=1, help="In so many steps the classes arrive.")] = 10,
    base: Annotated[
        int, typer.Option(min=0, help="So many classes come first, in a step of their own.")
    ] = 0,
    epochs: Annotated[
        int, typer.Option(min=1, help="Over the images of a step; 1 in the paper.")
    ] = 1,
    method: Annotated[
        list[CilMethodName] | None, typer.Option(help="Only this one; repeat for more.")
    ] = None,
    seed: Seeds = None,
    preset: Annotated[Preset, typer.Option(help="Settings of learning.")] = Preset.SMALL,
    backbone: BackboneName = "medley-mini",
    weights: Weights = None,
    device: Device = "cpu",
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Learn the classes of one data set in steps and measure after each, over all classes seen."""
    from medley.backbone import load_backbone
    from trainer.bench.cil import run_cil
    from trainer.bench.cil_plan import CilPlan, cil_settings
    from trainer.bench.cil_report import write_cil_report
    from trainer.bench.course import empty_classifier, tap_names
    from trainer.datasets import open_dataset
    from trainer.frozen import FrozenStore
    from trainer.settings import PRESETS, TrainSettings

    frozen = load_backbone(backbone, weights=weights, device=device)
    train_set, test_set = (open_dataset(data, part, cache=cache) for part in ("train", "test"))
    settings = TrainSettings(**PRESETS[preset.value])
    with bars(err) as show:
        classifier = empty_classifier(frozen, settings)
        store = FrozenStore(cache.expanduser() / "frozen", classifier, taps=tap_names(frozen))
        count = show.counting("frozen features", len(train_set) + len(test_set))
        kept_train = store.keep(train_set, on_images=count)
        kept_test = store.keep(test_set, on_images=count)
        results = [
            run_cil(
                frozen,
                kept_train,
                kept_test,
                plan,
                method=name.value,
                folder=folder / f"seed{number}" / name.value,
                watch=partial(show.learning, batch_size=plan.settings.batch_size),
            )
            for number in seed or DEFAULT_SEEDS
            for name in method or CilMethodName
            for chosen in [cil_settings(name.value, replace(settings, seed=number))]
            for plan in [
                CilPlan(
                    steps=_steps(train_set, steps, base, number), settings=chosen, epochs=epochs
                )
            ]
        ]
    report = write_cil_report(folder, results, command=" ".join(["medley", *sys.argv[1:]]))
    out.print(Markdown(report))


def _steps(images: ImageSet, steps: int, base: int, seed: int) -> tuple[tuple[str, ...], ...]:
    """CIFAR-100 in its published order, others shuffled by the seed."""
    from trainer.bench.cil_plan import class_steps
    from trainer.mtil.orders import CIFAR100

    if images.name == "cifar100":
        names = [images.class_names[label] for label in CIFAR100]
        return class_steps(names, steps, base=base)
    return class_steps(images.class_names, steps, base=base, seed=seed)
