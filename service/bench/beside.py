"""HTTP beside a bare loop on the same images, in turns: what serving costs over computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from medley.admission import admit, retire
from medley.bundle import read_bundle
from medley.classifier import Ask, Classifier
from service.bench.bare import Bare
from service.bench.cells import Site
from service.bench.names import ALONE, BARE, BARE_PIXELS, MEDLEY, SATURATED
from service.bench.served import FIRST
from service.bench.sites import Sites

__all__ = ["measure_beside_bare"]


def measure_beside_bare(
    sites: Sites, site: Site, classifier: Classifier, tasks: Sequence[Mapping[str, Path]]
) -> None:
    """Write lines of both at saturation, and of both with one image at a time.

    A time is that of one image: of a round at saturation, of each image alone.

    Args:
        sites: the server under load, the site's tasks live.
        site: what requests look like.
        classifier: of the server's kind, without tasks; left so.
        tasks: their bundles, by number and version.
    """
    paths = [admit(read_bundle(files[FIRST]), classifier) for files in tasks[: site.tasks]]
    requests, picks = sites.requests(site)
    images = [image.read_bytes() for image in sites.images[site.form]]
    asks = [Ask(paths[pick // len(images)]) for pick in picks]
    bare = Bare(classifier, images, asks)
    saturated: dict[str, list[float]] = {MEDLEY: [], BARE: [], BARE_PIXELS: []}
    alone: dict[str, list[float]] = {MEDLEY: [], BARE: [], BARE_PIXELS: []}
    bare.rate(sites.plan.warm_up_s)
    for _ in range(sites.plan.rounds):
        saturated[BARE].append(1 / bare.rate(sites.plan.saturation_s))
        saturated[MEDLEY].append(1 / sites.saturate(requests, picks).throughput_hz)
        saturated[BARE_PIXELS].append(1 / bare.rate_decoded(sites.plan.saturation_s))
        alone[BARE] += bare.alone_s(sites.plan.alone)
        alone[MEDLEY] += sites.saturate(requests, picks, visitors=1).latencies_s
        alone[BARE_PIXELS] += bare.alone_decoded_s(sites.plan.alone)
    for path in paths:
        retire(path, classifier)
    _write(sites, site, SATURATED, saturated)
    _write(sites, site, ALONE, alone)


def _write(sites: Sites, site: Site, bench: str, columns: Mapping[str, Sequence[float]]) -> None:
    for name, times_s in columns.items():
        sites.journal.add(bench, site.conditions, name, times_s=times_s)
    sites.on_step(1)
