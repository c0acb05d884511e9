"""Images that no task claims, answered by zero-shot and its nearest tasks: who, and with what."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from medley.backbone import Backbone
from medley.bundle import write_bundle
from medley.classifier import MAX_NEAREST
from service.app import create_app
from service.commands import commands
from service.commands.console import out
from service.settings import Settings
from service.wire.schemas import MAX_NEIGHBOURS
from tests.service.answers.test_inference import Client, asked, held, running, service_of, until
from tests.service.answers.test_inference import value as value_in
from tests.service.conftest import MakeBundle, OpenApp, ServerProcess
from tests.service.fused import made_fusion
from tests.service.made import image_bytes
from tests.service.routes.test_classify import b64
from tests.service.signals.test_signals import value

NEVER = -1e9  # a threshold that no image meets
TASKS: dict[str, dict[str, Any]] = {
    "birds": {"class_names": ("owl", "crow"), "seed": 1, "templates": ("{}, a bird",)},
    "cars": {"class_names": ("van", "Owl", "bus"), "seed": 2, "templates": ("a {}", "my {}")},
    "dogs": {"class_names": ("pug", "corgi"), "seed": 3, "prototypes": False},
    "eels": {"class_names": ("eel", "moray"), "seed": 4},
}
WITH_PROTOTYPES = {"birds", "cars", "eels"}
AGGREGATE = {"unclaimed": "aggregate"}
JSON = {"content-type": "application/json"}
NEW = ["tram", "owl", "daisy"]  # no task has them all


def serve(http: httpx.Client, make: MakeBundle, **tasks: dict[str, Any]) -> None:
    for task, fields in tasks.items():
        bundle = make(**({"task": task, "threshold": NEVER, "prototypes": True} | fields))[1]
        assert http.put(f"/v1/tasks/{task}/versions/1", content=bundle).status_code == 201


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, make: MakeBundle
) -> Iterator[httpx.Client]:
    """An app of tasks that claim nothing, which aggregates where a request says so."""
    store = tmp_path_factory.mktemp("served")
    app = create_app(Settings(store=store, buckets=(4,)), backbone=backbone)
    with TestClient(app) as client:
        http = cast(httpx.Client, client)
        serve(http, make, **TASKS)
        yield http


def ask(http: httpx.Client, image: bytes, **fields: object) -> dict[str, Any]:
    body = {"image": {"bytes_b64": b64(image)}, "top_k": 100} | fields
    response = http.post("/v1/classify", json=body)
    assert response.status_code == 200, response.text
    (result,) = response.json()["results"]
    return dict(result)


def members(result: dict[str, Any]) -> list[str]:
    assert result["path"]["kind"] == "aggregate"
    return [member.get("task", member["kind"]) for member in result["path"]["members"]]


def probabilities(result: dict[str, Any], labels: list[str]) -> torch.Tensor:
    found = {choice["label"]: choice["probability"] for choice in result["top_k"]}
    assert len(found) == len(labels)
    return torch.tensor([found[label] for label in labels], dtype=torch.float64)


def test_an_aggregate_is_zero_shot_and_the_nearest_tasks_that_have_prototypes(
    served: httpx.Client, image: bytes
) -> None:
    result = ask(served, image, **AGGREGATE, neighbours=2)
    path = result["path"]
    zero_shot, *tasks = path["members"]

    assert zero_shot == {"kind": "zero_shot", "weight": pytest.approx(1 / 3)}
    assert path.keys() == {"kind", "members"}
    assert len(tasks) == 2
    for task in tasks:
        assert task["kind"] == "task"
        assert task["version"] == "1"
        assert task["digest"].startswith("sha256:")
        assert task["weight"] == pytest.approx(1 / 3)
    similarities = [task["similarity"] for task in tasks]
    assert similarities == sorted(similarities, reverse=True)
    assert (result["routed_by"], result["label_set"]) == ("auto", "union")


def test_more_neighbours_than_tasks_are_all_that_there_are(
    served: httpx.Client, image: bytes
) -> None:
    most = ask(served, image, **AGGREGATE, neighbours=MAX_NEIGHBOURS)

    assert MAX_NEIGHBOURS == MAX_NEAREST
    assert members(most)[0] == "zero_shot"
    assert set(members(most)[1:]) == WITH_PROTOTYPES
    assert ask(served, image, **AGGREGATE) == most  # the setting is 4


@pytest.mark.parametrize("templates", [None, ["{}!", "the {}"]])
def test_the_answer_is_the_mean_of_what_its_members_say_of_the_labels(
    served: httpx.Client, image: bytes, templates: list[str] | None
) -> None:
    """Logits are known from a path's own answer up to a constant, which a softmax forgets."""
    common = {"labels": NEW, "templates": templates or ["a photo of a {}."]}
    together = ask(served, image, **AGGREGATE, labels=NEW, templates=templates)
    models = ["base" if who == "zero_shot" else who for who in members(together)]
    alone = [probabilities(ask(served, image, model=model, **common), NEW) for model in models]
    expected = torch.stack(alone).log().mean(0).softmax(0)

    assert together["label_set"] == "request"
    torch.testing.assert_close(probabilities(together, NEW), expected, rtol=1e-5, atol=1e-7)


def test_without_labels_every_member_has_all_tasks_classes_in_its_own_words(
    served: httpx.Client, make: MakeBundle, image: bytes
) -> None:
    result = ask(served, image, **AGGREGATE)
    names = [choice["label"] for choice in ask(served, image, model="base")["top_k"]]
    expected = torch.stack([union_logits(served, make, image, who) for who in members(result)])

    order = ["owl", "crow", "van", "bus", "pug", "corgi", "eel", "moray"]
    assert set(names) == set(order)
    torch.testing.assert_close(
        probabilities(result, order), expected.mean(0).softmax(0), rtol=1e-3, atol=1e-5
    )


def union_logits(http: httpx.Client, make: MakeBundle, image: bytes, who: str) -> torch.Tensor:
    """Told from embeddings; of its own classes a task says what its bundle does."""
    model = "base" if who == "zero_shot" else who
    picture_E = embeddings(http, model, [f"data:image/png;base64,{b64(image)}"])[0]
    rows, seen = [], set()
    for task, fields in TASKS.items():
        names = fields["class_names"]
        if task == who:
            bundle = make(**({"task": task, "threshold": NEVER, "prototypes": True} | fields))[0]
            text_CE = bundle.tensors["class_text_features"].double()
        else:
            templates = fields.get("templates", ("a photo of a {}.",))
            encoded = [
                embeddings(http, model, [template.replace("{}", name) for name in names])
                for template in templates
            ]
            text_CE = torch.stack(encoded).sum(0)
            text_CE = torch.nn.functional.normalize(text_CE, dim=-1)
        new = [row for row, name in enumerate(names) if name.casefold() not in seen]
        rows += list(text_CE[new])
        seen |= {name.casefold() for name in names}
    scale = tiny_logit_scale(http, image)
    return scale * torch.stack(rows) @ picture_E


def embeddings(http: httpx.Client, model: str, inputs: list[str]) -> torch.Tensor:
    body = {"model": model, "input": inputs}
    data = http.post("/v1/embeddings", json=body).raise_for_status().json()["data"]
    return torch.tensor([one["embedding"] for one in data], dtype=torch.float64)


def tiny_logit_scale(http: httpx.Client, image: bytes) -> float:
    """From zero-shot's own answer: how far two labels are apart, by how far their cosines are."""
    picture_E = embeddings(http, "base", [f"data:image/png;base64,{b64(image)}"])[0]
    text_CE = embeddings(http, "base", ["cat", "a lorry"])
    common = {"labels": ["cat", "a lorry"], "templates": ["{}"]}
    said = probabilities(ask(http, image, model="base", **common), ["cat", "a lorry"]).log()
    cosines = text_CE @ picture_E
    return float((said[0] - said[1]) / (cosines[0] - cosines[1]))


def test_who_names_a_model_or_lists_a_task_s_classes_gets_no_aggregate(
    served: httpx.Client, image: bytes
) -> None:
    for fields, kind in (
        ({"model": "base"}, "zero_shot"),
        ({"model": "birds"}, "task"),
        ({"model": "cars@1"}, "task"),
        ({"labels": ["crow", "owl"]}, "task"),
    ):
        plain = ask(served, image, **fields)
        assert plain["path"]["kind"] == kind
        assert ask(served, image, **fields, **AGGREGATE) == plain


def test_every_form_and_protocol_can_ask_for_it(served: httpx.Client, image: bytes) -> None:
    options: dict[str, Any] = {"unclaimed": "aggregate", "neighbours": 2, "labels": NEW}
    result = ask(served, image, **options)
    form = served.post("/v1/classify", files={"file": image}, data=options | {"top_k": 100})
    png = {"content-type": "image/png"}
    raw = served.post("/v1/classify", content=image, params=options | {"top_k": 100}, headers=png)
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [b64(image)]}
    oip = served.post(
        "/v2/models/auto/infer", json={"inputs": [tensor], "parameters": options}
    ).json()
    decision = served.post("/v1/route", files={"file": image}, data=options).json()["results"][0]

    assert members(result)[0] == "zero_shot"
    assert len(members(result)) == 3
    assert form.json()["results"] == raw.json()["results"] == [result]
    told = {output["name"]: output["data"] for output in oip["outputs"]}
    assert told["label"] == [result["label"]]
    assert told["probability"] == [pytest.approx(result["probability"], abs=1e-7)]
    assert (told["task"], told["version"]) == ([""], [""])
    assert oip["parameters"]["aggregated"] == 1
    assert decision["path"] == result["path"]


def test_the_commands_can_ask_for_it_and_show_who_answers(
    server: ServerProcess,
    make: MakeBundle,
    image: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(out, "width", 200)  # wide enough for the path of the picture
    picture = tmp_path / "picture.png"
    picture.write_bytes(image)
    labels = [word for label in NEW for word in ("--label", label)]
    words = [str(picture), *labels, "--url", server.url]
    runner = CliRunner()
    with server.client() as http:
        serve(http, make, near={})
        asked = [*words, "--unclaimed", "aggregate", "--neighbours", "1"]
        shown = runner.invoke(commands, ["classify", *asked])
        routed = runner.invoke(commands, ["route", *asked])
        wrong = runner.invoke(commands, ["classify", *words, "--unclaimed", "all"])
        http.delete("/v1/tasks/near").raise_for_status()

    assert "zero-shot 50%, near@1 50% (request)" in shown.stdout
    assert "zero-shot 50%, near@1 50%" in routed.stdout
    assert wrong.exit_code == 2
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"unclaimed": "nobody"}, "unclaimed"),
        ({"neighbours": 0}, "neighbours"),
        ({"neighbours": MAX_NEIGHBOURS + 1}, "neighbours"),
        ({"neighbours": "x"}, "neighbours"),
        ({"unclaimed": "zero_shot", "neighbours": 2}, ""),
    ],
)
def test_what_makes_no_sense_is_refused_on_every_protocol(
    served: httpx.Client, image: bytes, fields: dict[str, Any], where: str
) -> None:
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [b64(image)]}
    found = [
        served.post("/v1/classify", json={"image": {"bytes_b64": b64(image)}} | fields),
        served.post("/v1/classify", files={"file": image}, data=fields),
        served.post("/v1/route", files={"file": image}, data=fields),
        served.post("/v2/models/auto/infer", json={"inputs": [tensor], "parameters": fields}),
    ]
    for response in found:
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
        assert where in response.json()["errors"][0]["where"]


def serve_fusion(
    http: httpx.Client, folder: Path, backbone: Backbone, method: Literal["lora", "finetune"]
) -> None:
    """Serve a task with prototypes of another method, by whose name it is called."""
    made, task = made_fusion(folder, backbone, [method], method=method), method
    unified = http.put(f"/v1/unified/{made.digest}", content=made.path.read_bytes())
    assert unified.status_code == 201
    bundle, path = made.bundles[task], folder / "near.safetensors"
    manifest = bundle.manifest.model_copy(update={"prototypes": True})
    random = torch.Generator().manual_seed(len(task))
    drawn_CE = torch.randn(bundle.tensors["class_text_features"].shape, generator=random)
    prototypes_CE = torch.nn.functional.normalize(drawn_CE, dim=-1)
    write_bundle(manifest, {**bundle.tensors, "prototypes": prototypes_CE}, path)
    registered = http.put(f"/v1/tasks/{task}/versions/1", content=path.read_bytes())
    assert registered.status_code == 201, registered.text


def test_mixed_requests_are_answered_byte_for_byte_as_each_alone(
    open_app: OpenApp, make: MakeBundle, backbone: Backbone, tmp_path: Path
) -> None:
    """Tasks of every method, claimed, named or neighbours, and zero-shot meet in batches."""
    most = {"labels": NEW, "neighbours": MAX_NEIGHBOURS} | AGGREGATE
    kinds: list[dict[str, object]] = [
        {"labels": ["cat"]},  # some task of pets claims them
        {"model": "birds"},
        {"model": "lora"},
        {"model": "finetune"},
        {"model": "base"},
        {"labels": NEW},
        most,
        {"labels": NEW, **AGGREGATE, "neighbours": 1},
        {"labels": ["owl", "eel"], **AGGREGATE, "templates": ["{}?"], "explain": True},
    ]
    images = [image_bytes(seed) for seed in range(3)]
    requests = [(image, kind) for kind in kinds for image in images]

    def answer(request: tuple[bytes, dict[str, object]]) -> dict[str, Any]:
        return ask(http, request[0], **request[1])

    with open_app(max_wait_ms=20, buckets=(8,)) as http:
        serve(http, make, **TASKS, pets={"threshold": float("inf"), "prototypes": False})
        serve_fusion(http, tmp_path / "lora", backbone, "lora")
        serve_fusion(http, tmp_path / "finetune", backbone, "finetune")
        alone = [answer(request) for request in requests]
        forwards = value(http, "medley_batch_images_count")
        with ThreadPoolExecutor(len(requests)) as pool:
            mixed = list(pool.map(answer, requests))
        shared = value(http, "medley_batch_images_count") - forwards
        several = ask_all(http, images, **most)

    assert mixed == alone
    assert shared < len(requests), "they have met"
    aggregated = alone[-9:]
    assert several == aggregated[:3]
    everybody = {"zero_shot", "lora", "finetune", *WITH_PROTOTYPES}
    assert [set(members(answer)) for answer in aggregated[:3]] == [everybody] * 3
    assert [len(members(answer)) for answer in aggregated[3:]] == [2] * 3 + [5] * 3


def ask_all(http: httpx.Client, images: list[bytes], **fields: object) -> list[dict[str, Any]]:
    body = {"images": [{"bytes_b64": b64(image)} for image in images], "top_k": 100} | fields
    found: list[dict[str, Any]] = http.post("/v1/classify", json=body).json()["results"]
    return found


def test_a_request_overrides_the_setting_and_the_setting_holds_without_one(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    settings = {"unclaimed": "aggregate", "neighbours": 1, "aggregate_weights": "similarity"}
    with open_app(**settings) as http:
        nobody = ask(http, image, labels=NEW)
        serve(http, make, birds=TASKS["birds"], cars=TASKS["cars"])
        one = ask(http, image, labels=NEW)
        two = ask(http, image, labels=NEW, neighbours=2)
        plain = ask(http, image, labels=NEW, unclaimed="zero_shot")
        base = ask(http, image, labels=NEW, model="base")

    assert nobody["path"] == {"kind": "zero_shot"}
    assert [member["weight"] for member in one["path"]["members"]] == [0.5, 0.5]
    zero_shot, nearer, farther = two["path"]["members"]
    assert zero_shot["weight"] == pytest.approx(1 / 3)
    assert nearer["similarity"] > farther["similarity"]
    assert nearer["weight"] > 1 / 3 > farther["weight"]
    assert plain | {"routed_by": "explicit"} == base


def test_where_no_task_has_prototypes_zero_shot_answers_alone_as_ever(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    with open_app() as http:
        serve(http, make, dogs=TASKS["dogs"])
        assert ask(http, image, **AGGREGATE) == ask(http, image)
        assert ask(http, image, labels=NEW, **AGGREGATE) == ask(http, image, labels=NEW)


def test_a_task_that_is_deleted_meanwhile_still_answers_and_then_does_no_more(
    tmp_path: Path, backbone: Backbone, make: MakeBundle, image: bytes
) -> None:
    fields = json.loads(asked(image)) | {"model": "auto", "labels": NEW} | AGGREGATE
    body = json.dumps(fields).encode()

    async def run() -> None:
        async with running(tmp_path, backbone) as app:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://it") as http:
                for task in ("birds", "cars"):
                    fields = {"task": task, "threshold": NEVER, "prototypes": True} | TASKS[task]
                    bundle = make(**fields)[1]
                    put = await http.put(f"/v1/tasks/{task}/versions/1", content=bundle)
                    assert put.status_code == 201
                async with held(app):
                    client = Client(app, body)
                    request = client.start()
                    await until(lambda: value_in(app, "medley_queue_depth") == 1)
                    assert (await http.delete("/v1/tasks/cars")).status_code == 204
                await request
                (during,) = json.loads(client.body)["results"]
                (after,) = (await http.post("/v1/classify", content=body, headers=JSON)).json()[
                    "results"
                ]
                assert set(members(during)) == {"zero_shot", "birds", "cars"}
                assert members(after) == ["zero_shot", "birds"]
                assert service_of(app).signals.used("cars").images == 0

    asyncio.run(run())


def test_an_aggregated_image_is_still_unclaimed_and_its_neighbours_are_paid_for(
    open_app: OpenApp, make: MakeBundle, image: bytes
) -> None:
    rollout = {"version": "2", "mode": "canary", "share": 1.0, "min_images": 1000}
    with open_app(reservoir=4) as http:
        serve(http, make, birds=TASKS["birds"], cars=TASKS["cars"])
        second = make(task="birds", version="2", **TASKS["birds"], prototypes=True)[1]
        http.put("/v1/tasks/birds/versions/2?activate=false", content=second)
        assert http.put("/v1/tasks/birds/rollout", json=rollout).status_code == 200
        before = value(http, "medley_stage_duration_seconds_sum", stage="forward")
        result = ask(http, image, **AGGREGATE)
        spent = value(http, "medley_stage_duration_seconds_sum", stage="forward") - before
        parts = {
            task: value(http, "medley_task_forward_seconds_total", task=task)
            for task in ("zero_shot", "birds", "cars")
        }
        used = http.get("/v1/tasks/birds/usage").json()
        rows = value(http, "medley_neighbour_rows_total")
        counted = {
            "aggregated": value(http, "medley_aggregated_images_total"),
            "unclaimed": value(http, "medley_router_decisions_total", decision="unclaimed"),
            "zero_shot": value(
                http, "medley_images_total", task="zero_shot", route="auto", outcome="ok"
            ),
            "tried": value(http, "medley_rollout_images_total", task="birds", result="same"),
        }
        seen = http.get("/v1/unclaimed").json()["seen"]

    assert {m["version"] for m in result["path"]["members"][1:]} == {"1"}, "no candidate"
    assert counted == {"aggregated": 1, "unclaimed": 1, "zero_shot": 1, "tried": 0}
    assert (seen, rows) == (1, 2)
    assert parts["birds"] == parts["cars"] == pytest.approx(parts["zero_shot"])
    assert sum(parts.values()) == pytest.approx(spent, rel=1e-6)
    assert used["images"] == 0
    assert used["forward_s"] == pytest.approx(parts["birds"])
