"""Cells on a real server process with the tiny backbone, and a bare loop beside it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from medley.backbone import Backbone
from medley.bundle import read_bundle
from medley.classifier import Classifier
from medley.journal import Journal, Measurement, read_lines
from service.bench.beside import measure_beside_bare
from service.bench.bundles import write_task
from service.bench.cells import Plan, Site
from service.bench.images import Form, write_images
from service.bench.load import Load, LoadError, Ready, visiting
from service.bench.measure import closed_loop
from service.bench.scrape import scrape
from service.bench.served import Served, register, write_tasks
from service.bench.servers import Server, infinity_server
from service.bench.sites import Sites
from service.bench.swaps import Swaps
from service.bench.traffic import Mix
from tests.service.bench.made_up import RUN
from tests.service.conftest import ServerProcess, StartServer

SITE = Site(form=Form.PIXELS, tasks=2, mix=Mix.UNIFORM)
PLAN = Plan(
    forms=(Form.PIXELS,),
    tasks=(2,),
    percents=(50,),
    long=(50,),
    long_s=1.3,
    saturation_s=0.5,
    warm_up_s=0.1,
    visitors=8,
    crowd=4,
    images=2,
    rounds=1,
    beside=2,
    alone=2,
)


@pytest.fixture(scope="module")
def classifier(backbone: Backbone) -> Classifier:
    return Served(buckets=(4,)).classifier(backbone, 2)


@pytest.fixture(scope="module")
def tasks(
    classifier: Classifier, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Path]]:
    return write_tasks(classifier, tmp_path_factory.mktemp("tasks") / "bundles", 2)


@pytest.fixture(scope="module")
def own_server(
    start_server: StartServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """The task names are the bench's, so the server is not shared with others."""
    with start_server(tmp_path_factory.mktemp("store")) as started:
        yield started


@pytest.fixture(scope="module")
def under_load(own_server: ServerProcess, tasks: list[dict[str, Path]]) -> Server:
    server = Server("medley", own_server.url, psutil.Process(own_server.process.pid))
    register(server, {number: files["1"] for number, files in enumerate(tasks)})
    return server


@pytest.fixture(scope="module")
def load() -> Iterator[Load]:
    with visiting() as started:
        yield started


@pytest.fixture(scope="module")
def make_sites(
    under_load: Server,
    load: Load,
    tasks: list[dict[str, Path]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path], Sites]:
    """What measures on the server and writes into a folder."""
    folder = tmp_path_factory.mktemp("images")
    images = {form: write_images(folder / form, form, 2, input_size=(32, 32)) for form in Form}
    swapped = {version: path.read_bytes() for version, path in tasks[0].items()}

    def made(to: Path) -> Sites:
        return Sites(
            journal=Journal(to, RUN),
            plan=PLAN,
            server=under_load,
            load=load,
            images=images,
            swapped=swapped,
            on_step=lambda _: None,
        )

    return made


@pytest.fixture(scope="module")
def lines(
    make_sites: Callable[[Path], Sites], tmp_path_factory: pytest.TempPathFactory
) -> list[Measurement]:
    """Of one site: saturation, load, load with swaps."""
    folder = tmp_path_factory.mktemp("lines")
    make_sites(folder).measure(SITE)
    return read_lines(folder)


def test_a_site_is_saturated_and_then_put_under_load_with_and_without_swaps(
    lines: list[Measurement],
) -> None:
    saturation, quiet, swapped = lines
    assert [line.bench for line in (saturation, quiet, swapped)] == ["saturation", "load", "load"]
    rate_hz = saturation.values["throughput_hz"]
    for line in (quiet, swapped):
        assert line.values["rate_hz"] == pytest.approx(rate_hz / 2)
        assert line.values["errors"] == 0
        assert len(line.times_s) == line.values["visits"] > 0
        assert line.values["p50_s"] <= line.values["p95_s"] <= line.values["p99_s"]
    assert quiet.conditions == {**SITE.conditions, "swaps": "none", "load": 50}
    assert swapped.conditions["swaps"] == "every second"
    assert len(swapped.series["swap_s"]) == 2  # there and back


def test_what_the_server_says_of_its_stages_is_in_the_line(lines: list[Measurement]) -> None:
    for line in lines:
        inside = {"decode_s", "queue_s", "forward_s", "head_s", "batch_images"}
        assert inside | {"server_cpu_s", "visitor_cpu_s", "rss_bytes"} <= line.values.keys()
        assert 1 <= line.values["batch_images"] <= 4
        assert all(line.values[name] > 0 for name in inside)


def test_http_and_the_bare_loop_are_measured_in_turns_and_the_classifier_is_left_empty(
    make_sites: Callable[[Path], Sites],
    classifier: Classifier,
    tasks: list[dict[str, Path]],
    tmp_path: Path,
) -> None:
    measure_beside_bare(make_sites(tmp_path), SITE, classifier, tasks)
    found: dict[str, list[Measurement]] = {}
    for line in read_lines(tmp_path):
        found.setdefault(line.bench, []).append(line)
    assert found.keys() == {"beside bare, saturated", "beside bare, alone"}
    for some in found.values():
        assert {line.column for line in some} == {
            "medley",
            "bare loop",
            "bare loop, decoded before",
        }
        assert all(min(line.times_s) > 0 for line in some)
    assert classifier.selectors.tasks == ()


def test_a_swap_makes_the_other_version_live_and_a_second_one_the_first_again(
    under_load: Server, tasks: list[dict[str, Path]]
) -> None:
    versions = {version: path.read_bytes() for version, path in tasks[0].items()}
    with httpx.Client(base_url=under_load.url) as client:
        swaps = Swaps(client, "task-0", versions)
        for live in ("2", "1"):
            swaps.swap()
            found = client.get("/v1/tasks/task-0").json()["versions"]
            assert [(one["version"], one["state"]) for one in found] == [(live, "live")]
    assert swaps.at_rest


def test_a_refused_swap_is_an_error(under_load: Server) -> None:
    with (
        httpx.Client(base_url=under_load.url) as client,
        pytest.raises(LoadError, match="a swap was refused"),
    ):
        Swaps(client, "task-0", {"1": b"", "2": b"not a bundle"}).swap()


def test_a_server_that_has_ended_is_an_error_and_not_a_slow_server(
    under_load: Server, load: Load, tmp_path: Path
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        gone = psutil.Process(process.pid)
    server = Server("medley", "http://127.0.0.1:9", gone)
    body = tmp_path / "body"
    body.write_bytes(b"x")
    ready = Ready(path="/", content_type="image/jpeg", body_file=str(body))
    with pytest.raises(LoadError, match="has ended"):
        closed_loop(load, server, [ready], [0], seconds=0.1, visitors=1)
    silent = replace(under_load, url=server.url)
    with pytest.raises(LoadError, match="answered nothing"):
        closed_loop(load, silent, [ready], [0], seconds=0.1, visitors=1)
    with pytest.raises(LoadError, match="no metrics"):
        scrape(server.url)


def test_a_python_without_infinity_is_told_by_what_it_said(tmp_path: Path) -> None:
    python, model, log = Path(sys.executable), tmp_path / "model", tmp_path / "log"
    with (
        pytest.raises(LoadError, match="No module named 'infinity_emb'"),
        infinity_server(python, model, log),
    ):
        pass


def test_a_refused_task_is_an_error(under_load: Server, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"not a bundle")
    with pytest.raises(LoadError, match="task-1 was refused"):
        register(under_load, {1: bad})


def test_a_random_task_is_a_bundle_like_any_other(classifier: Classifier, tmp_path: Path) -> None:
    written = write_task(classifier, tmp_path / "a", task="task-7", version="3", seed=5)
    manifest = read_bundle(tmp_path / "a").manifest
    assert (manifest.task, manifest.version) == ("task-7", "3")
    blocks = len(classifier.model.backbone.image.blocks)
    assert sorted(manifest.vision.blocks) == list(range(blocks * 3 // 4, blocks))
    again = write_task(classifier, tmp_path / "b", task="task-7", version="3", seed=5)
    assert again.digest == written.digest
    assert not classifier.model.paths
