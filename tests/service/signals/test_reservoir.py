"""The sample of unclaimed images: off by default, uniform, bounded, erasable, not for everybody."""

from __future__ import annotations

import asyncio
import base64
import random
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from medley.files import write_whole
from service.errors import NotFoundError, StorageError
from service.intake.forms import Base64, Url
from service.signals.metrics import Metrics
from service.signals.reservoir import MAX_WAITING, Reservoir, Sampler
from tests.service.conftest import MakeBundle, OpenApp
from tests.service.made import image_bytes

NEVER = -1e9  # a threshold that refuses every image
PNG = {"Content-Type": "image/png"}


def opened(folder: Path, *, images: int = 3, max_bytes: int = 3000) -> Reservoir:
    return Reservoir(folder, images=images, max_bytes=max_bytes, metrics=Metrics())


async def offered(reservoir: Reservoir, *images: Any) -> list[str]:
    """Offer images, each after the one before is written; the ids that are kept then."""
    for image in images:
        reservoir.offer(image)
        await reservoir.kept()
    return [kept.id for kept in await reservoir.kept()]


def test_every_item_is_kept_with_the_same_probability() -> None:
    """20,000 draws of 5 among 20: each is kept 5,000 times, give or take 5 deviations of 61."""
    kept: Counter[int] = Counter()
    rng = random.Random(0)
    for _ in range(20_000):
        sampler, places = Sampler(5, rng=rng), {}
        for item in range(20):
            place = sampler.place()
            if place is not None:
                places[place] = item
        kept.update(places.values())

    assert sum(kept.values()) == 100_000
    assert all(abs(count - 5000) < 5 * 61.3 for count in kept.values())


def test_a_sample_has_never_more_images_than_it_may(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path / "u")
        ids = await offered(reservoir, *[bytes([i]) * 10 for i in range(50)])
        assert len(ids) == 3
        assert reservoir.seen == 50
        reservoir.close()

    asyncio.run(run())
    assert len(list((tmp_path / "u").iterdir())) == 3


def test_bytes_are_capped_and_what_is_too_large_is_passed_over(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path, images=3, max_bytes=3000)
        assert await offered(reservoir, b"x" * 1001, Base64("A" * 1340)) == []
        assert reservoir.seen == 0
        assert len(await offered(reservoir, b"x" * 1000)) == 1
        reservoir.close()

    asyncio.run(run())


def test_base64_is_kept_as_the_file_and_what_was_fetched_is_not_kept(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path)
        text = base64.b64encode(b"a picture").decode()
        (id,) = await offered(reservoir, Base64(text), Url("http://example.org/x.png"))
        assert await reservoir.read(id) == b"a picture"
        reservoir.close()

    asyncio.run(run())


def test_a_burst_is_passed_over_beyond_what_may_wait(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path, images=100, max_bytes=10_000)
        for _ in range(50):
            reservoir.offer(b"x")
        assert reservoir.seen == MAX_WAITING
        assert len(await reservoir.kept()) == MAX_WAITING
        reservoir.close()

    asyncio.run(run())


def test_a_restart_goes_on_with_the_sample_and_removes_what_is_too_much(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path, images=3)
        ids = await offered(reservoir, b"a", b"b", b"c")
        reservoir.close()
        (tmp_path / ".half").write_bytes(b"written by a crash")

        again = opened(tmp_path, images=3)
        assert [one.id for one in await again.kept()] == ids
        assert again.seen == 3
        again.close()

        fewer = opened(tmp_path, images=1)
        assert len(await fewer.kept()) == 1
        fewer.close()

    asyncio.run(run())
    assert len(list(tmp_path.iterdir())) == 1


def test_turned_off_it_keeps_nothing_not_even_what_was_there(tmp_path: Path) -> None:
    write_whole(tmp_path / "000000000000001", b"x")

    async def run() -> None:
        reservoir = opened(tmp_path, images=0)
        assert await offered(reservoir, b"y") == []
        reservoir.close()

    asyncio.run(run())
    assert list(tmp_path.iterdir()) == []


def test_what_is_removed_is_gone_also_what_was_still_to_be_written(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path)
        reservoir.offer(b"a")
        reservoir.offer(b"b")
        await reservoir.clear()
        assert await reservoir.kept() == []
        first, second = await offered(reservoir, b"c", b"d")
        await reservoir.remove(first)
        with pytest.raises(NotFoundError):
            await reservoir.read(first)
        with pytest.raises(NotFoundError):
            await reservoir.remove(first)
        assert await reservoir.read(second) == b"d"
        reservoir.close()

    asyncio.run(run())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"no folder")

    async def run() -> None:
        reservoir = opened(blocked / "u")
        assert await offered(reservoir, b"a", b"b") == []
        reservoir.close()

    asyncio.run(run())
    assert "was not kept" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_a_file_that_somebody_took_away_is_storage_trouble(tmp_path: Path) -> None:
    async def run() -> None:
        reservoir = opened(tmp_path)
        (id,) = await offered(reservoir, b"a")
        (tmp_path / id).unlink()
        for trouble in (reservoir.kept, lambda: reservoir.read(id)):
            with pytest.raises(StorageError):
                await trouble()
        await reservoir.clear()
        assert await reservoir.kept() == []
        reservoir.close()

    asyncio.run(run())


def test_only_what_no_task_claims_is_kept_and_given_back_as_it_came(
    open_app: OpenApp, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    claims_none = make(task="pets", threshold=NEVER)[1]
    with open_app(reservoir=10) as http:
        http.put("/v1/tasks/pets/versions/1", content=claims_none).raise_for_status()
        classified(http, image)
        classified(http, image_bytes(2), model="pets")  # the client says whose it is
        classified(http, image_bytes(3), labels="rose")  # no task has that label
        http.put("/v1/tasks/all/versions/1", content=make(task="all")[1]).raise_for_status()
        classified(http, image_bytes(4))  # claimed
        listed = http.get("/v1/unclaimed").json()
        (kept,) = listed["images"]
        data = http.get(f"/v1/unclaimed/{kept['id']}")
        metrics = http.get("/metrics").text
        assert http.delete(f"/v1/unclaimed/{kept['id']}").status_code == 204
        again = http.get(f"/v1/unclaimed/{kept['id']}")

    assert (listed["limit"], listed["seen"], kept["size_bytes"]) == (10, 1, len(image))
    assert data.content == image
    assert data.headers["x-content-type-options"] == "nosniff"
    assert data.headers["cache-control"] == "no-store"
    assert "medley_unclaimed_images 1.0" in metrics
    assert (again.status_code, again.json()["code"]) == (404, "unknown_image")
    folder = tmp_path / "store" / "unclaimed"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == []


def test_by_default_nothing_is_kept(
    open_app: OpenApp, make: MakeBundle, image: bytes, tmp_path: Path
) -> None:
    with open_app() as http:
        http.put("/v1/tasks/pets/versions/1", content=make(task="pets", threshold=NEVER)[1])
        classified(http, image)
        listed = http.get("/v1/unclaimed").json()

    assert listed == {"limit": 0, "seen": 0, "images": []}
    assert not (tmp_path / "store" / "unclaimed").exists()


@pytest.mark.parametrize(
    "ask",
    [
        lambda http: http.get("/v1/unclaimed"),
        lambda http: http.get("/v1/unclaimed/1"),
        lambda http: http.delete("/v1/unclaimed/1"),
        lambda http: http.delete("/v1/unclaimed"),
    ],
)
def test_users_images_need_the_admin_key(
    open_app: OpenApp, ask: Callable[[httpx.Client], httpx.Response]
) -> None:
    with open_app(admin_key=SecretStr("k")) as http:
        assert ask(http).status_code == 401


def classified(http: httpx.Client, image: bytes, **params: str) -> None:
    http.post("/v1/classify", params=params, content=image, headers=PNG).raise_for_status()
