"""Ray and an application on it, as a process: `python -m tests.deploy.ray_cluster FOLDER CONFIG`.

Starts what `serve run CONFIG` starts, on a Ray of its own that is small, has its files in FOLDER
(short: Ray makes sockets there) and ends with this process. Each line on its standard input is
another CONFIG to deploy; the end of it ends all. It says when a CONFIG runs, or why it does not.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import ray
import yaml
from ray import serve
from ray.serve._private import api
from ray.serve._private.client import ServeControllerClient
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

SAYS = "application: "  # before what it says itself: Ray writes there too
RUNS = f"{SAYS}it runs"
OBJECTS_BYTES = 80 * 1024 * 1024  # Ray takes no less; no bundle and no image goes there


def main() -> None:
    folder, first = sys.argv[1:]
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECTS_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        namespace="serve",
        _temp_dir=folder,
    )
    try:
        config = read(first)
        client = api.serve_start(
            http_options=config.http_options.model_dump(), proxy_location=config.proxy_location
        )
        say(deploy(client, config))
        for line in sys.stdin:
            say(deploy(client, read(line.strip())))
        serve.shutdown()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def read(path: str) -> ServeDeploySchema:
    return ServeDeploySchema.model_validate(yaml.safe_load(Path(path).read_text()))


def deploy(client: ServeControllerClient, config: ServeDeploySchema) -> str:
    """Deploy, wait until it runs or cannot, and say which of it."""
    client.deploy_apps(config, _blocking=False)
    (name,) = (application.name for application in config.applications)
    while True:
        application = serve.status().applications[name]
        if application.status == ApplicationStatus.RUNNING:
            return "it runs"
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            return application.message.replace("\n", " | ")
        time.sleep(0.1)


def say(line: str) -> None:
    sys.stdout.write(f"{SAYS}{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
