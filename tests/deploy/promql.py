"""What a PromQL expression asks for: enough to see whether such series exist, not a parser."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from service.signals.metrics import Metrics

__all__ = ["RULES", "Known", "alerts_of", "known", "problems", "recorded_of"]

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules"
TARGET = frozenset({"job", "instance"})
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(
    r"\b(ALERTS|[a-z_]+(?::[a-z0-9_:]+)?)\s*(?:\{([^}]*)\}|(?=\s*(?:[\[)<>=!*/+-]|$)))"
)
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_LEVELS = {"job": {"job"}, "instance": TARGET}  # labels by the first word of a recorded name


@dataclass(frozen=True)
class Known:
    """Series that there may be: names with their labels."""

    labels: Mapping[str, frozenset[str]]

    def __contains__(self, name: str) -> bool:
        return name in self.labels


@cache
def known() -> Known:
    """What a server exports, what Prometheus adds, and what our rules record."""
    alerts = TARGET | {"alertname", "alertstate", "severity"}
    found: dict[str, frozenset[str]] = {"up": TARGET, "ALERTS": alerts}
    fields = [m for m in vars(Metrics()).values() if hasattr(m, "_labelnames")]
    for metric in fields:
        family = next(iter(metric.describe()))
        labels = TARGET | set(metric._labelnames)
        ends = {"counter": ["_total"], "histogram": ["_sum", "_count"]}.get(family.type, [""])
        found |= {family.name + end: labels for end in ends}
        if family.type == "histogram":
            found[f"{family.name}_bucket"] = labels | {"le"}
    process = (f for f in Metrics().registry.collect() if f.name.startswith("process_"))
    found |= {sample.name: TARGET for family in process for sample in family.samples}
    return Known(found | {name: _labels(name) for name in recorded_of(RULES)})


def problems(expr: str, known: Known) -> list[str]:
    """Names and labels of an expression that do not exist."""
    bare = re.sub(r"\[[^\]]*\]", "[1m]", _STRING.sub('""', expr))
    names, labels = set(), set()
    for name, matchers in _SELECTOR.findall(_GROUPING.sub(" ", bare)):
        if name in ("up", "ALERTS") or name.startswith(("medley", "process")) or ":" in name:
            names.add(name)
            wrong = set(_MATCHER.findall(matchers)) - known.labels.get(name, frozenset())
            labels |= {f"{name}{{{label}}}" for label in wrong}
    has = set().union(*(known.labels.get(name, frozenset()) for name in names))
    grouped = {part.strip() for found in _GROUPING.findall(bare) for part in found.split(",")}
    unknown = {name for name in names if name not in known}
    return sorted(unknown | labels | (grouped - has - {""})) or ([] if names else ["no series"])


def recorded_of(folder: Path) -> dict[str, str]:
    """Recording rules: expression by name."""
    return {rule["record"]: rule["expr"] for rule in _rules(folder) if "record" in rule}


def alerts_of(folder: Path) -> dict[str, Mapping[str, Any]]:
    """Alerts by name."""
    return {rule["alert"]: rule for rule in _rules(folder) if "alert" in rule}


def _rules(folder: Path) -> Iterable[Mapping[str, Any]]:
    for path in sorted(folder.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


def _labels(recorded: str) -> frozenset[str]:
    """By the convention level:metric:operation; a level is labels joined by underscores."""
    level = recorded.split(":")[0]
    return frozenset().union(*(_LEVELS.get(part, {part}) for part in level.split("_")))
