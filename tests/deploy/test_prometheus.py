"""The rules: valid, tested on both sides of each limit, about what exists, in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.deploy.manifests import ROOT, tool
from tests.deploy.promql import RULES, alerts_of, known, problems, recorded_of

FOLDER = ROOT / "deploy" / "prometheus"
TESTS = sorted((FOLDER / "tests").glob("*.yml"))
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n\n(.+?)(?=^## |\Z)", RUNBOOK, re.MULTILINE | re.DOTALL))
ALERTS = alerts_of(RULES)
KEY = "/run/secrets/medley_read_key"


def promtool(*words: str | Path) -> str:
    command = [tool("promtool", "Debian's prometheus"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def cases_of(alert: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each test of promtool that is about an alert, with what it expects."""
    tests = [test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]]
    return [
        (test, expected)
        for test in tests
        for expected in test["alert_rule_test"]
        if expected["alertname"] == alert
    ]


def test_the_configuration_and_its_rules_are_valid(tmp_path: Path) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / "prometheus")
    (copy / "key").write_text("")
    config = copy / "prometheus.yml"
    text = config.read_text()
    assert KEY in text
    config.write_text(text.replace(KEY, "key"))

    told = promtool("check", "config", config)

    assert f"{len(list(RULES.glob('*.yml')))} rule files found" in told
    assert f"{len(ALERTS)} rules found" in told
    assert f"{len(recorded_of(RULES))} rules found" in told


def test_the_rules_do_what_their_tests_say() -> None:
    promtool("test", "rules", *TESTS)


@pytest.mark.parametrize("alert", ALERTS)
class TestEachAlert:
    def test_is_expected_to_fire_and_before_that_not_to(self, alert: str) -> None:
        cases = [expected for _, expected in cases_of(alert)]
        fires = [case["eval_time"] for case in cases if case["exp_alerts"]]
        silent = [case["eval_time"] for case in cases if not case["exp_alerts"]]

        assert fires
        assert silent

    def test_is_tested_with_somebody_on_the_right_side_of_the_limit(self, alert: str) -> None:
        series = [one["series"] for test, _ in cases_of(alert) for one in test["input_series"]]

        assert any('="below"' in one for one in series)

    def test_asks_for_what_exists(self, alert: str) -> None:
        assert problems(ALERTS[alert]["expr"], known()) == []

    def test_says_how_urgent_it_is_and_what_to_do(self, alert: str) -> None:
        rule = ALERTS[alert]

        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{alert.lower()}"
        assert alert in SECTIONS


def test_the_runbook_has_no_alert_that_does_not_exist() -> None:
    assert set(SECTIONS) == set(ALERTS)


def test_the_runbook_names_only_alerts_settings_and_metrics_that_exist() -> None:
    settings = {f"MEDLEY_{name.upper()}" for name in Settings.model_fields}
    names = known()

    assert set(re.findall(r"\bMedley[A-Z]\w+", RUNBOOK)) <= set(ALERTS)
    assert set(re.findall(r"\bMEDLEY_\w+", RUNBOOK)) <= settings
    assert [name for name in re.findall(r"\bmedley_\w+", RUNBOOK) if name not in names] == []


@pytest.mark.parametrize("name", recorded_of(RULES))
def test_what_is_recorded_is_made_of_what_exists_and_has_the_labels_that_it_says(name: str) -> None:
    expr = recorded_of(RULES)[name]
    grouped = re.findall(r"\bby \(([^)]*)\)", expr)

    assert problems(expr, known()) == []
    for labels in grouped:
        assert {part.strip() for part in labels.split(",")} - {"le"} <= known().labels[name]


@pytest.mark.parametrize(
    ("expr", "wrong"),
    [
        ("sum by (job) (rate(medley_images_total[5m]))", []),
        ("rate(medley_image_total[5m])", ["medley_image_total"]),
        ('medley_versions_{state="x"}', ["medley_versions_", "medley_versions_{state}"]),
        ('rate(medley_images_total{outcom="ok"}[5m])', ["medley_images_total{outcom}"]),
        ("sum by (kind) (medley_queue_depth)", ["kind"]),
        ("job:medley_images:rate > 1", ["job:medley_images:rate"]),
        ("medley_queue_depth", []),
        ("medley_queue_dept", ["medley_queue_dept"]),
        ("vector(1)", ["no series"]),
        ("medley_batch_images_bucket", []),
        ("medley_batch_images", ["medley_batch_images"]),
    ],
)
def test_the_check_notices_what_does_not_exist(expr: str, wrong: list[str]) -> None:
    assert problems(expr, known()) == wrong
