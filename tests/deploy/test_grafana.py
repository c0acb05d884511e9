"""The dashboards: what the source says, valid for Grafana, about metrics that exist."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models import heatmap, stat, table, timeseries

from deploy.grafana.boards import BOARDS
from deploy.grafana.model import ME, dashboard, text
from deploy.grafana.panels import COLUMNS, Board, Panel, Unit
from deploy.grafana.pictures import shown
from tests.deploy.manifests import ROOT
from tests.deploy.promql import RULES, alerts_of, known, problems, recorded_of

FOLDER = ROOT / "deploy" / "grafana"
PAGE = ROOT / "docs" / "dashboards.md"
PANELS = [pytest.param(panel, id=f"{b.uid}-{panel.title}") for b in BOARDS for panel in b.panels]
OPTIONS = {"timeseries": timeseries, "stat": stat, "heatmap": heatmap, "table": table}
# What is for people who look at one server, or says what runs.
NOT_SHOWN = {"medley_build_info", "process_virtual_memory_bytes", "process_start_time_seconds"}

boards = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


@boards
def test_the_file_is_what_the_source_makes(board: Board) -> None:
    path = FOLDER / "dashboards" / f"{board.uid}.json"

    assert path.read_text() == text(board), "python -m deploy.grafana write"


def test_there_is_no_other_file() -> None:
    assert {path.stem for path in (FOLDER / "dashboards").iterdir()} == {b.uid for b in BOARDS}


@boards
def test_grafana_own_model_knows_every_field(board: Board) -> None:
    ours = dashboard(board)
    theirs = _read(grafana.Dashboard.from_json(ours))

    assert missing(ours, theirs) == []


@boards
def test_grafana_own_model_of_each_kind_of_panel_knows_its_options(board: Board) -> None:
    for panel in dashboard(board)["panels"]:
        kind: Any = OPTIONS[panel["type"]]
        assert missing(panel["options"], _read(kind.Options.from_json(panel["options"]))) == []
        curve = panel["fieldConfig"]["defaults"].get("custom")
        if curve is not None:
            assert missing(curve, _read(timeseries.FieldConfig.from_json(curve))) == []


def test_a_field_that_grafana_does_not_know_is_noticed() -> None:
    ours = dashboard(BOARDS[0]) | {"colour": "green"}

    assert missing(ours, _read(grafana.Dashboard.from_json(ours))) == ["colour"]


@boards
def test_panels_lie_beside_one_another(board: Board) -> None:
    cells = [
        (x, y)
        for place in board.places()
        for x in range(place.x, place.x + place.panel.width)
        for y in range(place.y, place.y + place.panel.height)
    ]

    assert len(cells) == len(set(cells))
    assert len(cells) == COLUMNS * (1 + max(y for _, y in cells)), "a line is not full"


@boards
def test_titles_are_told_apart(board: Board) -> None:
    titles = [panel.title for panel in board.panels]

    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("panel", PANELS)
class TestEachPanel:
    def test_asks_for_what_exists(self, panel: Panel) -> None:
        for query in panel.queries:
            assert problems(query.filled(me=ME, rate="$__rate_interval"), known()) == []

    def test_asks_for_the_servers_that_were_chosen(self, panel: Panel) -> None:
        for query in panel.queries:
            expr = query.filled(me=ME, rate="1m")
            for name in re.findall(r"\b(?:medley|process)_\w+(?!\w|:)", expr):
                if f":{name}" not in expr:
                    assert f"{name}{{{ME}" in expr, f"{name} of all servers"

    def test_names_its_series_by_labels_that_they_have(self, panel: Panel) -> None:
        for query in panel.queries:
            grouped = re.search(r"\b(?:by|group_right) \(([^)]*)\)", query.expr)
            for label in re.findall(r"\{\{(\w+)\}\}", query.legend):
                names = re.findall(r"\b[a-z_]+(?::[a-z0-9_:]+)?", query.expr)
                has = set().union(*(known().labels[n] for n in names if n in known()))
                assert label in has
                if grouped and "by (" in query.expr:
                    assert label in re.split(r",\s*", grouped[1])

    def test_says_what_it_is_about(self, panel: Panel) -> None:
        assert panel.about.endswith(".")
        if len(panel.queries) > 1:
            assert all(query.legend for query in panel.queries)

    def test_has_columns_if_it_is_a_table(self, panel: Panel) -> None:
        grouped = re.search(r"\bby \(([^)]*)\)", panel.queries[0].expr)

        assert bool(panel.columns) == (panel.kind == "table")
        if panel.columns:
            assert grouped
            assert set(panel.columns[:-1]) == set(grouped[1].split(", "))


def test_every_metric_is_looked_at_by_somebody() -> None:
    asked = [query.expr for board in BOARDS for panel in board.panels for query in panel.queries]
    asked += [*recorded_of(RULES).values(), *(rule["expr"] for rule in alerts_of(RULES).values())]
    words = set(re.findall(r"\w+", " ".join(asked)))
    series = {
        re.sub(r"_(bucket|sum|count)$", "", name) for name in known().labels if ":" not in name
    }
    seen = {re.sub(r"_(bucket|sum|count)$", "", word) for word in words}

    assert series - seen == NOT_SHOWN


def test_limits_that_are_drawn_are_those_of_the_alerts() -> None:
    alerts = alerts_of(RULES)
    drawn = {
        "Classification": "MedleySlow",
        "Oldest image that waits": "MedleyQueueLong",
        "Unclaimed, of an hour": "MedleyUnclaimed",
        "Device memory that is free": "MedleyDeviceMemory",
        "Share of the memory that it may take": "MedleyMemory",
        "Lag": "MedleyReplicaBehind",
    }
    limits = {p.title: p.limit for b in BOARDS for p in b.panels if p.limit is not None}

    assert limits.keys() == drawn.keys()
    for title, alert in drawn.items():
        assert re.search(rf"[<>] {limits[title]:g}(?!\S)", alerts[alert]["expr"]), alert


@pytest.mark.parametrize(
    ("value", "unit", "told"),
    [
        (0.1234, "share", "12.3 %"),
        (0.0025, "s", "2.5 ms"),
        (30, "s", "30 s"),
        (3 * 2**30, "bytes", "3 GiB"),
        (0, "bytes", "0 B"),
        (12345, "images/s", "12,345 images/s"),
        (3, "", "3"),
        (math.nan, "s", "none"),
    ],
)
def test_numbers_are_written_as_people_do(value: float, unit: Unit, told: str) -> None:
    assert shown(value, unit) == told


def test_the_page_shows_every_dashboard() -> None:
    page = PAGE.read_text()
    for board in BOARDS:
        assert f"## {board.title.removeprefix('Medley: ').capitalize()}" in page
        assert f"(dashboards/{board.uid}.png)" in page
        assert (PAGE.parent / "dashboards" / f"{board.uid}.png").stat().st_size > 10_000


def test_grafana_is_told_where_the_dashboards_and_the_numbers_are() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = dict(mount.split(":")[:2] for mount in compose["grafana"]["volumes"])
    providers = yaml.safe_load((FOLDER / "provisioning/dashboards/medley.yml").read_text())
    sources = yaml.safe_load((FOLDER / "provisioning/datasources/medley.yml").read_text())
    prometheus = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())

    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    (provider,) = providers["providers"]
    assert provider["options"]["path"] == mounts["./deploy/grafana/dashboards"]
    (source,) = sources["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]


def family(series: str) -> str:
    """The metric that a series is of."""
    return re.sub(r"_(bucket|sum|count)$", "", series)


def missing(ours: Any, theirs: Any, at: str = "") -> list[str]:
    """Places of what is in ours and not, or otherwise, in theirs."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            place
            for name, value in ours.items()
            for place in missing(value, theirs.get(name, ...), f"{at}.{name}".lstrip("."))
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [place for n, (one, other) in pairs for place in missing(one, other, f"{at}[{n}]")]
    return [] if ours == theirs else [at]


def _read(model: Any) -> Any:
    """What a model of Grafana's would write."""
    return json.loads(json.dumps(model, default=lambda one: one.to_json()))
