"""The same architecture and weights behind our `/v1/embeddings` and behind infinity's, in turns.

All servers get the very same bodies and run at the same time, all but one of them idle. Before
anything is timed their embeddings are compared.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from service.bench.names import (
    AGREEMENT,
    BATCHED,
    INFINITY,
    MEDLEY,
    RIVAL,
    RIVAL_LOAD,
    TOLERANCE,
)
from service.bench.served import Served
from service.bench.servers import Server, infinity_server, medley_server
from service.bench.sites import OnStep

__all__ = ["measure_beside_infinity"]

MODEL = "base"  # what both serve it as
BATCHES = (1, 2, 4, 8, 16)  # infinity takes up to 32 at a time
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
    for architecture, forms in plan.compared:
        place = folder / architecture
        weights, model = _write_model(architecture, place)
        size = open_clip.get_model_config(architecture)["vision_cfg"]["image_size"]
        with ExitStack() as stack:
            contenders = {}
            for name, settings in _ours(served, architecture, weights).items():
                ours = medley_server(place / name, place / f"{name}.log", settings)
                contenders[name] = Contender(stack.enter_context(ours), "/v1/embeddings")
            theirs = infinity_server(python, model, place / "infinity.log")
            contenders[INFINITY] = Contender(stack.enter_context(theirs), "/embeddings")
            for form in forms:
                images = write_images(place / form, form, plan.images, input_size=(size, size))
                row = _Row(journal, plan, contenders, load, _bodies(images, form))
                row.measure({"backbone": architecture, "images": form.value}, form)
                on_step(1)


@dataclass(frozen=True)
class Contender:
    """A server and where it answers."""

    server: Server
    path: str


class _Row:
    """Servers and what is sent to all of them."""

    def __init__(
        self,
        journal: Journal,
        plan: Plan,
        contenders: Mapping[str, Contender],
        load: Load,
        bodies: Sequence[Path],
    ) -> None:
        self._journal, self._plan, self._contenders = journal, plan, contenders
        self._load, self._bodies = load, bodies

    def measure(self, conditions: Conditions, form: Form) -> None:
        """Write the lines of one row."""
        self._agree(conditions, form)
        for name in self._contenders:
            self._saturated(name, self._plan.warm_up_s)  # not counted: memory, first batches
        slowest_hz = self._in_turns(conditions)
        timing = Timing(seconds=self._plan.long_s, warm_up_s=self._plan.warm_up_s)
        for name, contender in self._contenders.items():
            outcome = open_loop(
                self._load,
                contender.server,
                self._requests(name),
                range(len(self._bodies)),
                rate_hz=slowest_hz * LOAD_PERCENT / 100,
                timing=timing,
                visitors=self._plan.visitors,
            )
            self._journal.add(
                RIVAL_LOAD, conditions, name, times_s=outcome.latencies_s, values=outcome.values
            )

    def _agree(self, conditions: Conditions, form: Form) -> None:
        """Compare all embeddings with infinity's; where nothing is resized they must be equal."""
        embeddings = {name: self._embeddings(one) for name, one in self._contenders.items()}
        for name, found in embeddings.items():
            if name == INFINITY:
                continue
            apart = float(np.abs(found - embeddings[INFINITY]).max())
            if form is Form.PIXELS and not apart <= TOLERANCE:
                raise LoadError(f"embeddings differ by {apart:.2g}: these are not the same models")
            self._journal.add(AGREEMENT, conditions, name, values={"apart": apart})

    def _in_turns(self, conditions: Conditions) -> float:
        """Saturate all in turns, write their lines; return the slowest one's median rate."""
        outcomes: dict[str, list[Outcome]] = {name: [] for name in self._contenders}
        for _ in range(self._plan.rounds):
            for name, some in outcomes.items():
                some.append(self._saturated(name, self._plan.saturation_s))
        for name, some in outcomes.items():
            times_s = [1 / outcome.throughput_hz for outcome in some]
            self._journal.add(RIVAL, conditions, name, times_s=times_s, values=some[-1].values)
        return min(
            float(np.median([outcome.throughput_hz for outcome in some]))
            for some in outcomes.values()
        )

    def _saturated(self, name: str, seconds: float) -> Outcome:
        return closed_loop(
            self._load,
            self._contenders[name].server,
            self._requests(name),
            range(len(self._bodies)),
            seconds=seconds,
            visitors=self._plan.crowd,
        )

    def _requests(self, name: str) -> list[Ready]:
        path = self._contenders[name].path
        return [
            Ready(path=path, content_type="application/json", body_file=str(body))
            for body in self._bodies
        ]

    def _embeddings(self, one: Contender) -> NDArray[np.float32]:
        return np.stack([_embedding(one.server.url + one.path, body) for body in self._bodies])


def _ours(
    served: Served, architecture: str, weights: Path
) -> dict[str, dict[str, str | int | float]]:
    """Settings of our servers: as they are measured everywhere, and with batches as infinity."""
    chosen = replace(served, backbone=architecture, weights=weights)
    found = {MEDLEY: chosen}
    if chosen.buckets == (1,):
        found[BATCHED] = replace(chosen, buckets=BATCHES, precision="fp32")
    return {name: one.settings(1) for name, one in found.items()}


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
