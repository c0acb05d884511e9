"""A whole run: tasks are made, a server is started, every cell is measured, all into a journal."""

from __future__ import annotations

import tempfile
from pathlib import Path

from medley.backbone import load_backbone
from medley.journal import Journal
from service.bench.beside import measure_beside_bare
from service.bench.cells import Plan, Site
from service.bench.images import write_images
from service.bench.load import Load, visiting
from service.bench.names import MEDLEY, SERVED
from service.bench.rival import measure_beside_infinity
from service.bench.served import FIRST, Served, register, write_tasks
from service.bench.servers import medley_server
from service.bench.sites import OnStep, Sites
from service.bench.traffic import Mix

__all__ = ["measure"]


def measure(
    journal: Journal,
    plan: Plan,
    served: Served,
    *,
    infinity: Path | None = None,
    on_step: OnStep = lambda _: None,
) -> None:
    """Measure all of a plan.

    Args:
        journal: where the lines go.
        plan: what is measured.
        served: by what.
        infinity: the python of an environment with infinity_emb, to be compared with.
        on_step: hears of each step that is done.

    Raises:
        LoadError: a server or the visitors' process fails.
        BackboneError: there is no such backbone.
    """
    journal.add(SERVED, served.conditions, MEDLEY)
    with tempfile.TemporaryDirectory(prefix="medley-bench-") as name, visiting() as load:
        folder = Path(name)
        _measure_load(journal, plan, served, folder, load, on_step)
        if infinity is not None:
            measure_beside_infinity(journal, plan, served, infinity, folder, load, on_step=on_step)


def _measure_load(
    journal: Journal, plan: Plan, served: Served, folder: Path, load: Load, on_step: OnStep
) -> None:
    backbone = load_backbone(served.backbone, weights=served.weights)
    most = max(plan.tasks)
    classifier = served.classifier(backbone, most)
    tasks = write_tasks(classifier, folder / "bundles", most)
    images = {
        form: write_images(folder / form, form, plan.images, input_size=backbone.image_size)
        for form in plan.forms
    }
    with medley_server(folder / "store", folder / "log", served.settings(most)) as server:
        sites = Sites(
            journal=journal,
            plan=plan,
            server=server,
            load=load,
            images=images,
            swapped={version: path.read_bytes() for version, path in tasks[0].items()},
            on_step=on_step,
        )
        live = 0
        for count in plan.tasks:
            register(
                server, {n: files[FIRST] for n, files in enumerate(tasks[:count]) if n >= live}
            )
            live = count
            for site in plan.sites(count):
                sites.measure(site)
            if count == plan.beside:
                for form in plan.forms:
                    site = Site(form=form, tasks=count, mix=Mix.UNIFORM)
                    measure_beside_bare(sites, site, classifier, tasks)
