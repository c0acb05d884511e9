"""HTTP beside a bare loop on the same images, in turns: what serving costs over computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from medley.admission import admit, retire
from medley.bundle import read_bundle
from medley.classifier import Ask, Classifier
from service.bench.bare import Bare, Pace
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
    bare.pace(sites.plan.warm_up_s)
    saturated: dict[str, list[Pace]] = {MEDLEY: [], BARE: [], BARE_PIXELS: []}
    alone: dict[str, list[float]] = {MEDLEY: [], BARE: [], BARE_PIXELS: []}
    for _ in range(sites.plan.rounds):
        saturated[BARE].append(bare.pace(sites.plan.saturation_s))
        crowd = sites.saturate(requests, picks)
        saturated[MEDLEY].append(Pace(1 / crowd.throughput_hz, crowd.values["server_cpu_s"]))
        saturated[BARE_PIXELS].append(bare.pace_decoded(sites.plan.saturation_s))
        alone[BARE] += bare.alone_s(sites.plan.alone)
        alone[MEDLEY] += sites.saturate(requests, picks, visitors=1).latencies_s
        alone[BARE_PIXELS] += bare.alone_decoded_s(sites.plan.alone)
    for path in paths:
        retire(path, classifier)
    for name, paces in saturated.items():
        times_s = [pace.time_s for pace in paces]
        cpu_s = {"cpu_s": median(pace.cpu_s for pace in paces)}
        sites.journal.add(SATURATED, site.conditions, name, times_s=times_s, values=cpu_s)
    sites.on_step(1)
    for name, times_s in alone.items():
        sites.journal.add(ALONE, site.conditions, name, times_s=times_s)
    sites.on_step(1)
