"""`medley bench methods`: its report from lines that are made up, its tasks, a quick run of it."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from medley.admission import admit, retire
from medley.bundle import read_bundle
from medley.classifier import Ask, Classifier
from medley.journal import Journal
from medley.pool import Capacity
from medley.routed import RoutedModel
from medley.unified import read_unified
from service.bench.command import bench_commands
from service.bench.methods.cells import FULL, LOADING, QUICK, TRAFFIC, Kind, Traffic
from service.bench.methods.report import REPORT, write_report
from service.bench.methods.tasks import write_tasks
from service.bench.names import MEDLEY
from tests.models import tiny_backbone
from tests.service.bench.made_up import RUN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Lines of a run in which an aggregated image takes three times as long as another."""
    journal = Journal(tmp_path, RUN)
    journal.add("served", {"backbone": "medley-mini"}, MEDLEY)
    for kind in Kind:
        shared = {"unified_bytes": 0.0 if kind is Kind.EXPERTS else 8e6, "upload_s": 0.5}
        journal.add(
            LOADING,
            FULL.conditions(kind),
            MEDLEY,
            times_s=[0.9, 0.2, 0.3, 0.2],
            values=shared | {"bundle_bytes": 1e6, "loaded_bytes": 2e7},
            series={"register_s": (0.8, 0.1, 0.2, 0.1)},
        )
        for traffic in Traffic:
            share = sum(traffic.unclaimed) / len(traffic.unclaimed) * traffic.aggregated
            values = {"aggregated": share, "rows": 1 + 4 * share, "server_cpu_s": 0.01}
            journal.add(
                TRAFFIC,
                FULL.conditions(kind),
                traffic.value,
                times_s=[0.01 * (1 + 2 * share)] * 3,
                values=values | {"p50_s": 0.2, "first_aggregated_s": 0.4},
            )
    return tmp_path


def test_the_report_sets_aggregated_traffic_beside_none(folder: Path) -> None:
    write_report(folder)
    text = (folder / REPORT).read_text()
    for kind in Kind:
        tasks = f"{FULL.tasks[kind]} {kind.value}"
        assert f"| {tasks} | all name a task | 100.0 | 1.00 (1.00 to 1.00) | 1.00 | 0 %" in text
        assert f"| {tasks} | half unclaimed, aggregated | 50.0 | 2.00 (2.00 to 2.00)" in text
    assert "| lora | 1.00 | 8.00 | 1.50 (of 16) | 500 | 900 | 100 | 200 | 4 | 20.00 |" in text
    assert "| moe_adapter | 1.00 | - | 1.00 (of 16) | - | 900 |" in text


def test_the_same_lines_give_the_same_report(folder: Path) -> None:
    write_report(folder)
    first = (folder / REPORT).read_bytes()
    write_report(folder)
    assert (folder / REPORT).read_bytes() == first


def test_half_of_the_traffic_is_half_of_its_requests() -> None:
    shares = {t: sum(t.unclaimed) / len(t.unclaimed) for t in Traffic}
    assert list(shares.values()) == [0, 0.5, 0.5, 1]
    assert QUICK.steps == 3 * (2 + 4)


@pytest.mark.parametrize("kind", Kind)
def test_tasks_are_admitted_claim_nothing_and_are_neighbours(tmp_path: Path, kind: Kind) -> None:
    classifier = Classifier(RoutedModel(tiny_backbone(), capacity=Capacity(max_top_k=2)))
    written = write_tasks(classifier, tmp_path / "tasks", kind, 2)
    assert classifier.selectors.tasks == ()
    unified = read_unified(written.unified) if written.unified else None
    assert (unified is None) == (kind is Kind.EXPERTS)
    bundles = [read_bundle(path) for path in written.bundles]
    paths = [admit(bundle, classifier, unified=unified) for bundle in bundles]
    height, width = classifier.model.backbone.image_size
    pixels_BCHW = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    (others,) = classifier.route(pixels_BCHW, [Ask(nearest=2)]).others
    assert sorted(other.path for other in others) == sorted(paths)
    for path in paths:
        retire(path, classifier)


@pytest.mark.slow
def test_a_quick_run_measures_every_method(tmp_path: Path) -> None:
    ended = CliRunner().invoke(bench_commands, ["methods", "--out", str(tmp_path), "--quick"])
    assert ended.exit_code == 0, ended.output
    report = (tmp_path / REPORT).read_text()
    for kind in Kind:
        assert f"\n| {kind.value} | " in report
        assert report.count(f"| 2 {kind.value} | ") == len(Traffic)
