"""`medley train | fuse | evaluate | pretrain`. Heavy imports wait until a command runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from trainer.bench.commands import bench
from trainer.data_commands import data_commands
from trainer.fuse_command import fuse_command
from trainer.imports.command import import_commands
from trainer.options import (
    BackboneName,
    Computes,
    Device,
    PrecisionName,
    Preset,
    Redundancy,
    RedundancyWeight,
    Weights,
)
from trainer.pretrain.command import pretrain_command
from trainer.progress import bars

if TYPE_CHECKING:
    from medley.backbone import Backbone
    from medley.bundle import Bundle
    from trainer.evaluation import Case, Evaluation
    from trainer.settings import TrainSettings

__all__ = ["commands"]

commands = typer.Typer(no_args_is_help=True)
commands.command("fuse")(fuse_command)
commands.command("pretrain")(pretrain_command)
commands.add_typer(bench, name="bench")
commands.add_typer(data_commands, name="data")
commands.add_typer(import_commands, name="import")
out, err = Console(), Console(stderr=True)


class Method(StrEnum):
    """How a task is learnt."""

    MOE_ADAPTER = "moe_adapter"
    LORA = "lora"
    FINETUNE = "finetune"


class Precision(StrEnum):
    """What the forward is computed in."""

    FP32 = "fp32"
    BF16 = "bf16"


class Freeze(StrEnum):
    """Which experts stay: by gate mass, or the paper's most counted."""

    MASS = "mass"
    COUNT = "count"


class SelectorName(StrEnum):
    """Kinds of selectors."""

    DDAS = "ddas"
    DDAS_AND_REFERENCE = "ddas+reference"
    GAUSSIAN = "gaussian"
    GAUSSIAN_AND_REFERENCE = "gaussian+reference"
    CLASS_GAUSSIANS = "class-gaussians"
    PROTOTYPE = "prototype"


Skip = Annotated[bool, typer.Option(help="Leave unreadable images out instead of stopping.")]


@commands.command()
def train(
    data: Annotated[
        str, typer.Argument(help="Folder of class folders, CSV file, or suite:<task>.")
    ],
    task: Annotated[str, typer.Option(help="Name of the task.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    version: Annotated[str, typer.Option(help="Version of the task.")] = "1",
    after: Annotated[
        list[Path] | None,
        typer.Option(help="Earlier bundle whose experts may be reused; repeat for more."),
    ] = None,
    licence: Annotated[str, typer.Option(help="Terms of the bundle.")] = "unspecified",
    backbone: BackboneName = "medley-mini",
    weights: Weights = None,
    device: Device = "cpu",
    preset: Annotated[
        Preset, typer.Option(help="Where settings not given come from; paper: MoE-Adapters.")
    ] = Preset.SMALL,
    method: Annotated[Method | None, typer.Option(help="How to learn.")] = None,
    shots: Annotated[int | None, typer.Option(help="Learn from so many images a class.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images in a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    experts: Annotated[int | None, typer.Option(help="New experts in each block.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Experts an image uses.")] = None,
    bottleneck: Annotated[
        int | None, typer.Option(help="Hidden units of an expert; the rank of lora (64).")
    ] = None,
    first_expert_block: Annotated[
        int | None, typer.Option(help="First image block with experts; default: the last quarter.")
    ] = None,
    first_text_block: Annotated[
        int | None, typer.Option(help="First text block with experts.")
    ] = None,
    augmented_copies: Annotated[
        int | None, typer.Option(help="Random crops of each image; 0: none.")
    ] = None,
    balance: Annotated[float | None, typer.Option(help="Weight of the balance loss.")] = None,
    redundancy: Redundancy = None,
    redundancy_weight: RedundancyWeight = None,
    redundancy_groups: Annotated[
        int | None, typer.Option(help="Groups of an expert's ranks, each of 8 or more.")
    ] = None,
    redundancy_within: Annotated[
        bool | None, typer.Option(help="Compare the groups of an expert.")
    ] = None,
    redundancy_across: Annotated[
        bool | None, typer.Option(help="Compare experts chosen for the same image.")
    ] = None,
    redundancy_frozen: Annotated[
        bool | None, typer.Option(help="Compare new experts with those of --after.")
    ] = None,
    freeze: Annotated[Freeze | None, typer.Option(help="Which experts are kept.")] = None,
    freeze_mass: Annotated[
        float | None, typer.Option(help="Share of the gates that kept experts cover.")
    ] = None,
    hold_out: Annotated[
        float | None, typer.Option(help="Share of each class that calibrates DDAS.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of its own images the task may refuse.")
    ] = None,
    selector: Annotated[
        SelectorName | None,
        typer.Option(help="Who decides whether the task knows an image (docs/training.md)."),
    ] = None,
    ddas_iterations: Annotated[
        int | None, typer.Option(help="Optimiser steps of each autoencoder.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal bundles.")] = None,
    precision: Annotated[Precision | None, typer.Option(help="Of the forward.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the folder's checkpoint.")] = False,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    skip_unreadable: Skip = False,
) -> None:
    """Learn a task from images and write it as a bundle."""
    from medley.backbone import load_backbone
    from medley.bundle import read_bundle
    from trainer.datasets import open_dataset
    from trainer.distributed import joined, own_device
    from trainer.export import Label
    from trainer.run import learn

    with joined(device) as team, team.place(folder) as place:
        settings = _settings(
            preset,
            method=method,
            shots=shots,
            iterations=iterations,
            batch_size=batch_size,
            lr=lr,
            num_experts=experts,
            top_k=top_k,
            bottleneck=bottleneck,
            first_expert_block=first_expert_block,
            first_text_block=first_text_block,
            augmented_copies=augmented_copies,
            balance=balance,
            redundancy=redundancy,
            redundancy_weight=redundancy_weight,
            redundancy_groups=redundancy_groups,
            redundancy_within=redundancy_within,
            redundancy_across=redundancy_across,
            redundancy_frozen=redundancy_frozen,
            freeze=freeze,
            freeze_mass=freeze_mass,
            hold_out=hold_out,
            alpha=alpha,
            selector=selector,
            ddas_iterations=ddas_iterations,
            seed=seed,
            precision=precision,
        )
        label = Label(task=task, version=version, licence=licence)
        earlier = [read_bundle(path) for path in after or []]
        frozen = load_backbone(backbone, weights=weights, device=own_device(device))
        images = open_dataset(data, "train", skip_unreadable=skip_unreadable)
        told = out if team.is_first else Console(quiet=True)
        told.print(f"{images.name}: {len(images)} images of {len(images.class_names)} classes")
        if team.size > 1:
            told.print(f"{team.size} processes share each batch")
        with bars(err if team.is_first else told) as show:
            outcome = learn(
                frozen,
                images,
                settings,
                label=label,
                folder=place,
                after=earlier,
                resume=resume,
                checkpoint_every_s=checkpoint_every,
                watcher=show.learning("training", settings.batch_size),
                team=team,
            )
        _print_outcome(told, outcome.report, outcome.path)


@commands.command()
def evaluate(
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="TASK=DATA, DATA as for train; the name of no bundle: images nobody has learnt.",
        ),
    ],
    bundle: Annotated[list[Path], typer.Option(help="A bundle to be live; repeat for more.")],
    folder: Annotated[
        Path | None, typer.Option("--out", help="Write evaluation.json and confusion.png here.")
    ] = None,
    backbone: BackboneName = "medley-mini",
    weights: Weights = None,
    device: Device = "cpu",
    precision: Computes = PrecisionName.EXACT,
    alexnet: Annotated[
        Path | None, typer.Option(help="torchvision's AlexNet, for imported bundles that need it.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Fit a linear probe on the training part.")] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many test images of each data set.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the images.")] = 0,
    skip_unreadable: Skip = False,
) -> None:
    """Measure bundles per image: accuracy, routing, false rejects; beside zero-shot and a probe."""
    from medley.backbone import load_backbone
    from medley.bundle import read_bundle
    from medley.extractor import load_alexnet
    from medley.unified import unified_of
    from trainer.evaluation import evaluate as measure
    from trainer.evaluation import served

    bundles = [read_bundle(path) for path in bundle]
    unified = [unified_of(b.manifest, path.parent) for b, path in zip(bundles, bundle, strict=True)]
    cases = [_case(text, bundles, probe, limit, seed, skip_unreadable) for text in data]
    base = load_backbone(backbone, weights=weights, device=device)
    extractors = [] if alexnet is None else [load_alexnet(alexnet, device=device)]
    classifier, paths = served(
        bundles, base, unified=unified, precision=precision.value, extractors=extractors
    )
    with bars(err) as show:
        result = measure(
            classifier,
            paths,
            cases,
            alphas={b.manifest.task: b.manifest.selector.alpha for b in bundles},
            seed=seed,
            on_images=show.counting("images"),
        )
    _print_evaluation(result)
    if folder is not None:
        _write_evaluation(result, bundles, classifier.model.backbone, folder)


def _settings(preset: Preset, **given: Any) -> TrainSettings:
    """The preset, over it what suits the method, and over that what was given."""
    from trainer.settings import METHOD_DEFAULTS, PRESETS, TrainSettings

    plain: dict[str, Any] = {
        name: value.value if isinstance(value, StrEnum) else value
        for name, value in given.items()
        if value is not None
    }
    of_method = METHOD_DEFAULTS[plain.get("method", "moe_adapter")]
    return TrainSettings(**(PRESETS[preset.value] | of_method | plain))


def _case(
    text: str,
    bundles: Sequence[Bundle],
    probe: bool,
    limit: int | None,
    seed: int,
    skip_unreadable: bool,
) -> Case:
    """Open the data set of `TASK=DATA`, its labels in the order of the task's class names."""
    import numpy as np

    from medley.errors import DataError
    from trainer.datasets import align, open_dataset
    from trainer.evaluation import Case

    name, equals, spec = text.partition("=")
    if not equals or not name or not spec:
        raise DataError(f"--data {text}: expected TASK=DATA, such as fashion=demo/fashion")
    test = open_dataset(spec, "test", skip_unreadable=skip_unreadable)
    if limit is not None:
        chosen = np.random.default_rng(seed).permutation(len(test))[:limit]
        test = test.subset(np.sort(chosen))
    parted = spec.startswith(("suite:", "mtil:")) or (Path(spec) / "train").is_dir()
    training = (
        open_dataset(spec, "train", skip_unreadable=skip_unreadable) if probe and parted else None
    )
    manifest = next((b.manifest for b in bundles if b.manifest.task == name), None)
    if manifest is None:
        return Case(name=name, test=test, train=training)

    def matched(images: Any) -> Any:
        return replace(align(images, manifest.class_names), templates=manifest.templates)

    return Case(name=name, task=name, test=matched(test), train=training and matched(training))


def _print_outcome(told: Console, report: dict[str, Any], path: Path) -> None:
    from trainer.run import unified_row

    table = Table(show_header=False)
    rows = {
        "bundle": f"{path} ({report['size_bytes'] / 1e6:.2f} MB)",
        "digest": report["digest"],
        **unified_row(report),
        **{name.replace("_", " "): f"{value:.1%}" for name, value in report["metrics"].items()},
        "refuses of its own": _refuses(report["selector"]),
        "time": f"{report['training_s']} s training, {report['export_s']} s calibration",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    told.print(table)


def _refuses(selector: dict[str, Any]) -> str:
    measured = f"{selector['calibration']['false_reject_rate']:.1%} measured"
    alpha = selector["alpha"]
    return measured if alpha is None else f"{measured}, at most {alpha:.1%} promised"


def _print_evaluation(result: Evaluation) -> None:
    table = Table(
        *("data", "images", "classes", "zero-shot", "probe", "told", "DDAS"),
        *("routing", "refused", "alpha"),
        title="Top-1 over the set's own classes, per image, mixed batches",
    )
    for score in result.scores:
        shares = (score.zero_shot, score.linear_probe, score.told, score.agnostic, score.routing)
        table.add_row(
            *(score.name, str(score.images), str(score.classes)),
            *("-" if s is None else f"{s:.1%}" for s in (*shares, score.false_reject, score.alpha)),
        )
    out.print(table)
    routing = Table("images of \\ routed to", *result.columns, title="Routing")
    for score, counts in zip(result.scores, result.confusion.tolist(), strict=True):
        routing.add_row(score.name, *map(str, counts))
    out.print(routing)


def _write_evaluation(
    result: Evaluation, bundles: Sequence[Bundle], backbone: Backbone, folder: Path
) -> None:
    from trainer.checkpoint import make_folder, write_whole
    from trainer.plots import confusion_png

    make_folder(folder)
    about = {
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "bundles": [
            {"task": b.manifest.task, "version": b.manifest.version, "digest": b.digest}
            for b in bundles
        ],
    }
    text = json.dumps(about | result.as_dict(), indent=1)
    write_whole(folder / "evaluation.json", text.encode())
    names = [score.name for score in result.scores]
    write_whole(folder / "confusion.png", confusion_png(result.confusion, names, result.columns))
