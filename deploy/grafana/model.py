"""A dashboard as Grafana's JSON, and the files that it is provisioned from."""

from __future__ import annotations

import json
from typing import Any

from deploy.grafana.panels import Board, Kind, Panel, Place, Unit

__all__ = ["ME", "dashboard", "text"]

JOB = 'job=~"$job"'
ME = f'{JOB}, instance=~"$instance"'
RATE = "$__rate_interval"
SCHEMA = 39  # of Grafana 10.4; newer ones migrate it as they load it
SOURCE = {"type": "prometheus", "uid": "${source}"}
TYPES: dict[Kind, str] = {
    "lines": "timeseries",
    "stacked": "timeseries",
    "number": "stat",
    "heatmap": "heatmap",
    "table": "table",
}
UNITS: dict[Unit, str] = {
    "": "short",
    "s": "s",
    "bytes": "bytes",
    "share": "percentunit",
    "requests/s": "reqps",
    "images/s": "suffix: images/s",
    "1/s": "suffix:/s",
    "cores": "suffix: cores",
}


def text(board: Board) -> str:
    """The file of a dashboard."""
    return json.dumps(dashboard(board), indent=1) + "\n"


def dashboard(board: Board) -> dict[str, Any]:
    """A dashboard as Grafana imports it."""
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.about,
        "tags": ["medley"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "links": [_LINKS],
        "templating": {
            "list": [_SOURCES, _variable("job"), _variable("instance", ME.split(",")[0])]
        },
        "panels": [_panel(number, place) for number, place in enumerate(board.places(), 1)],
    }


_LINKS = {
    "type": "dashboards",
    "title": "Medley",
    "tags": ["medley"],
    "asDropdown": True,
    "includeVars": True,
    "keepTime": True,
}
_SOURCES = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str, matchers: str = "") -> dict[str, Any]:
    """A choice among the values of a label; all of them at first."""
    values = f"label_values(medley_build_info{{{matchers}}}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": values, "refId": label},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(number: int, place: Place) -> dict[str, Any]:
    panel = place.panel
    size = {"x": place.x, "y": place.y, "w": panel.width, "h": panel.height}
    table = {"transformations": [_ordered(panel.columns)]} if panel.columns else {}
    return table | {
        "id": number,
        "type": TYPES[panel.kind],
        "title": panel.title,
        "description": panel.about,
        "gridPos": size,
        "datasource": SOURCE,
        "targets": [_target(panel, place) for place in range(len(panel.queries))],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
    }


def _ordered(columns: tuple[str, ...]) -> dict[str, Any]:
    """The columns of a table: no time, the number last and by its name."""
    places = {name: place for place, name in enumerate((*columns[:-1], "Value"))}
    wanted = {
        "excludeByName": {"Time": True},
        "indexByName": places,
        "renameByName": {"Value": columns[-1]},
    }
    return {"id": "organize", "options": wanted}


def _target(panel: Panel, place: int) -> dict[str, Any]:
    query = panel.queries[place]
    heatmap, now = panel.kind == "heatmap", panel.kind in ("table", "number")
    return {
        "refId": chr(ord("A") + place),
        "datasource": SOURCE,
        "expr": query.filled(me=ME, rate=RATE),
        "legendFormat": "{{le}}" if heatmap else query.legend or panel.title,
        "format": {"heatmap": "heatmap", "table": "table"}.get(panel.kind, "time_series"),
        "instant": now,
        "range": not now,
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    found: dict[str, Any] = {"unit": UNITS[panel.unit]}
    if panel.kind in ("lines", "stacked"):
        found["custom"] = _curve(panel)
        if "margin" not in panel.title.lower():
            found["min"] = 0
    if panel.limit is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.limit}]
        found["thresholds"] = {"mode": "absolute", "steps": steps}
    return found


def _curve(panel: Panel) -> dict[str, Any]:
    stacked = panel.kind == "stacked"
    curve: dict[str, Any] = {
        "lineWidth": 1 if stacked else 2,
        "fillOpacity": 40 if stacked else 0,
        "showPoints": "never",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    if panel.limit is not None:
        curve["thresholdsStyle"] = {"mode": "line"}
    return curve


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "number":
        reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": reduced, "graphMode": "none", "colorMode": "value"}
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
            "yAxis": {"unit": UNITS[panel.unit]},
            "legend": {"show": True},
            "tooltip": {"show": True, "yHistogram": False},
        }
    if panel.kind == "table":
        return {"showHeader": True}
    legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
    return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
