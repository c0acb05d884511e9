"""The limit is the least that any group of the process allows; a CPU has no memory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.signals.memory import memory_limit_bytes, watch
from service.signals.metrics import Metrics
from tests.service.conftest import MakeBundle, OpenApp

GIB = 2**30


def laid_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_container_says_its_limit(tmp_path: Path) -> None:
    root = laid_out(
        tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{GIB}\n"}
    )

    assert memory_limit_bytes(root) == GIB


def test_the_least_of_all_groups_above_counts(tmp_path: Path) -> None:
    root = laid_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/pod/app/memory.max": f"{2 * GIB}\n",
        },
    )

    assert memory_limit_bytes(root) == GIB


def test_an_older_kernel_says_it_elsewhere(tmp_path: Path) -> None:
    # A container of version 1 names the path of its group on the host, and sees it at the top.
    root = laid_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,memory:/docker/1f\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        },
    )

    assert memory_limit_bytes(root) == GIB


@pytest.mark.parametrize("cgroup", ["0::/\n", ""])
def test_without_a_limit_it_is_the_memory_of_the_machine(tmp_path: Path, cgroup: str) -> None:
    root = laid_out(tmp_path, {"proc/self/cgroup": cgroup} if cgroup else {})
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )

    assert memory_limit_bytes(root) == pytest.approx(total, rel=0.05)


def test_a_cpu_has_no_memory_of_its_own() -> None:
    metrics = Metrics()
    watch(metrics, torch.device("cpu"))
    names = {s.name for family in metrics.registry.collect() for s in family.samples}

    assert "medley_memory_limit_bytes" in names
    assert "medley_device_memory_bytes" not in names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_says_what_of_it_is_taken() -> None:
    metrics = Metrics()
    watch(metrics, torch.device("cuda"))
    held = torch.zeros(2**20, device="cuda")
    samples = [s for family in metrics.registry.collect() for s in family.samples]
    taken = {s.labels["kind"]: s.value for s in samples if s.name == "medley_device_memory_bytes"}

    assert held.nbytes <= taken["allocated"] <= taken["reserved"] < taken["total"]
    assert 0 < taken["free"] < taken["total"]


def test_a_failed_self_test_is_counted_and_other_refusals_are_not(
    open_app: OpenApp, make: MakeBundle
) -> None:
    _, wrong = make(task="wrong", self_test_error=1.0)
    _, unfit = make(task="unfit", feature="block9:mean")
    with open_app() as http:
        before = http.get("/metrics").text
        refused = [
            http.put(f"/v1/tasks/{task}/versions/1", content=data).status_code
            for task, data in (("wrong", wrong), ("unfit", unfit))
        ]
        after = http.get("/metrics").text

    assert refused == [422, 422]
    assert "medley_self_test_failures_total 0.0" in before
    assert "medley_self_test_failures_total 1.0" in after
    assert 'medley_bundle_loads_total{result="refused"} 2.0' in after
