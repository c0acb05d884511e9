"""The same architecture and weights behind our `/v1/embeddings` and behind infinity's, in turns.

Both servers get the very same bodies and run at the same time, one of them idle. Before anything is
timed their embeddings are compared.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from medley.journal import Conditions, Journal
from service.bench.cells import Plan
from service.bench.hf_clip import write_hf_clip
from service.bench.images import Form, write_images
from service.bench.load import Load, LoadError, Ready
from service.bench.measure import Outcome, Timing, closed_loop, open_loop
from service.bench.served import Served
from service.bench.servers import Server, infinity_server, medley_server
from service.bench.sites import COLUMN, OnStep

__all__ = ["INFINITY", "RIVAL", "RIVAL_LOAD", "measure_beside_infinity"]

RIVAL, RIVAL_LOAD, AGREEMENT = (
    "beside infinity, saturated",
    "beside infinity, same load",
    "beside infinity, agreement",
)
INFINITY = "infinity"
MODEL = "base"  # what both serve it as
ROUTES = {COLUMN: "/v1/embeddings", INFINITY: "/embeddings"}
TOLERANCE = 1e-4
LOAD_PERCENT = 80


def measure_beside_infinity(
    journal: Journal,
    plan: Plan,
    served: Served,
    python: Path,
    folder: Path,
    load: Load,
    *,
    on_step: OnStep = lambda _: None,
) -> None:
    """Write lines of every compared architecture: agreement, saturation, one common rate.

    Args:
        journal: where to.
        plan: which architectures, and how long.
        served: our settings; backbone and weights are replaced.
        python: of an environment that has infinity_emb.
        folder: an empty one.
        load: the visitors.
        on_step: hears of every row.

    Raises:
        LoadError: a server fails, or the two do not compute the same.
    """
    for architecture in plan.compared:
        place = folder / architecture
        weights, model = _write_model(architecture, place)
        ours = replace(served, backbone=architecture, weights=weights)
        size = open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
        with (
            medley_server(place / "store", place / "medley.log", ours.settings(1)) as medley,
            infinity_server(python, model, place / "infinity.log") as infinity,
        ):
            servers = {COLUMN: medley, INFINITY: infinity}
            for form in plan.forms:
                images = write_images(place / form, form, plan.images, input_size=(size, size))
                pair = _Pair(journal, plan, servers, load, _bodies(images, form))
                pair.measure({"backbone": architecture, "images": form.value}, exact=form)
                on_step(1)


class _Pair:
    """Two servers and what is sent to both."""

    def __init__(
        self,
        journal: Journal,
        plan: Plan,
        servers: Mapping[str, Server],
        load: Load,
        bodies: Sequence[Path],
    ) -> None:
        self._journal, self._plan, self._servers, self._load = journal, plan, servers, load
        self._bodies = bodies

    def measure(self, conditions: Conditions, *, exact: Form) -> None:
        """Write the lines of one row."""
        self._agree(conditions, exact)
        rates_hz = self._saturate(conditions)
        rate_hz = min(rates_hz.values()) * LOAD_PERCENT / 100
        timing = Timing(seconds=self._plan.cell_s, warm_up_s=self._plan.warm_up_s)
        for name in self._servers:
            outcome = open_loop(
                self._load,
                self._servers[name],
                self._requests(name),
                range(len(self._bodies)),
                rate_hz=rate_hz,
                timing=timing,
                visitors=self._plan.visitors,
            )
            self._write(RIVAL_LOAD, conditions, name, outcome)

    def _agree(self, conditions: Conditions, form: Form) -> None:
        """Compare the two servers' embeddings; where nothing is resized they must be the same."""
        ours, theirs = (
            np.stack([_embedding(server.url + ROUTES[name], body) for body in self._bodies])
            for name, server in self._servers.items()
        )
        apart = float(np.abs(ours - theirs).max())
        if form is Form.PIXELS and not apart <= TOLERANCE:
            raise LoadError(f"embeddings differ by {apart:.2g}: these are not the same models")
        self._journal.add(AGREEMENT, conditions, COLUMN, values={"apart": apart})

    def _saturate(self, conditions: Conditions) -> dict[str, float]:
        """Saturate both in turns; return the median rate of each."""
        timing = Timing(seconds=self._plan.saturation_s, warm_up_s=self._plan.warm_up_s)
        outcomes: dict[str, list[Outcome]] = {name: [] for name in self._servers}
        for _ in range(self._plan.rounds):
            for name, server in self._servers.items():
                outcomes[name].append(
                    closed_loop(
                        self._load,
                        server,
                        self._requests(name),
                        range(len(self._bodies)),
                        timing=timing,
                        visitors=self._plan.crowd,
                    )
                )
        for name, some in outcomes.items():
            times_s = [1 / outcome.throughput_hz for outcome in some]
            self._journal.add(RIVAL, conditions, name, times_s=times_s, values=some[-1].values)
        return {
            n: float(np.median([o.throughput_hz for o in some])) for n, some in outcomes.items()
        }

    def _requests(self, name: str) -> list[Ready]:
        return [
            Ready(path=ROUTES[name], content_type="application/json", body_file=str(body))
            for body in self._bodies
        ]

    def _write(self, bench: str, conditions: Conditions, name: str, outcome: Outcome) -> None:
        self._journal.add(
            bench, conditions, name, times_s=outcome.latencies_s, values=outcome.values
        )


def _write_model(architecture: str, folder: Path) -> tuple[Path, Path]:
    """Draw weights and write them for both servers: a file of open_clip's, a folder of theirs."""
    folder.mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = open_clip.create_model(architecture).state_dict()
    weights, model = folder / "weights.safetensors", folder / MODEL
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    write_hf_clip(architecture, state, model)
    return weights, model


def _bodies(images: Sequence[Path], form: Form) -> list[Path]:
    """Write the request of each image beside it."""
    bodies = []
    for image in images:
        data = base64.b64encode(image.read_bytes()).decode()
        body = {
            "model": MODEL,
            "input": [f"data:{form.content_type};base64,{data}"],
            "modality": "image",
            "encoding_format": "base64",
        }
        path = image.with_suffix(".json")
        path.write_text(json.dumps(body))
        bodies.append(path)
    return bodies


def _embedding(url: str, body: Path) -> NDArray[np.float32]:
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(url, content=body.read_bytes(), headers=headers, timeout=120)
    if not answer.is_success:
        raise LoadError(f"{url} answered {answer.status_code}: {answer.text[:200]}")
    return np.frombuffer(base64.b64decode(answer.json()["data"][0]["embedding"]), np.float32)
