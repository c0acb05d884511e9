"""A small share of `make fuzz` in the ordinary run: other seeds find other things."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.bundles import Bundles, Resealed
from tests.fuzz.campaign import Chunk, Result, Target, chunk
from tests.fuzz.fusions import Fusions
from tests.fuzz.images import Images, corpus, with_checksums
from tests.fuzz.mutation import mutated
from tests.fuzz.served import Requests, Served, Uploads
from tests.service.conftest import ServerProcess

SEED = 20_261_122
KEPT = Path(__file__).parents[1] / "fuzz" / "kept"  # what has once been a finding, by target
OFFLINE: dict[str, Callable[[], Target]] = {
    "images": Images,
    "bundles": Bundles,
    "resealed": Resealed,
    "fusions": Fusions,
}
ONLINE: dict[str, Callable[[str], Target]] = {
    "served": Served,
    "requests": Requests,
    "uploads": Uploads,
}
COUNT = {
    "images": 3000,
    "bundles": 3000,
    "resealed": 150,
    "fusions": 150,
    "served": 8,
    "requests": 300,
    "uploads": 50,
}


@pytest.mark.filterwarnings("default:Invalid APNG")
@pytest.mark.parametrize("name", OFFLINE)
def test_damage_is_refused_and_nothing_else_happens(name: str) -> None:
    assert not chunk(OFFLINE[name](), SEED, range(COUNT[name])).findings


@pytest.mark.parametrize("name", ONLINE)
def test_damage_over_http_is_refused_and_the_server_lives(server: ServerProcess, name: str) -> None:
    done = chunk(ONLINE[name](server.url), SEED, range(COUNT[name]))

    assert not done.findings
    assert server.process.poll() is None
    with server.client() as http:
        assert http.get("/readyz").status_code == 200


@pytest.mark.parametrize("path", sorted(KEPT.glob("*.bin")), ids=lambda path: path.stem)
def test_what_was_found_once_is_not_found_again(path: Path, server: ServerProcess) -> None:
    name = path.stem.partition("-")[0]
    target = OFFLINE[name]() if name in OFFLINE else ONLINE[name](server.url)

    target.check(path.read_bytes())


def test_cases_are_known_by_their_number_and_reach_behind_the_first_check() -> None:
    once, again = (chunk(Images(), 7, range(200)) for _ in range(2))

    assert once.outcomes == again.outcomes
    assert {"image", "undecodable", "not_an_image"} <= set(once.outcomes)
    assert {"bundle", "damaged"} <= set(chunk(Bundles(), 7, range(500)).outcomes)


def test_every_picture_of_the_corpus_can_be_decoded() -> None:
    target = Images()

    assert {target.check(data) for data in corpus()} == {"image"}
    assert all(with_checksums(data) == data for data in corpus())


def test_a_finding_is_told_with_its_number() -> None:
    class Picky:
        def make(self, random: Random) -> bytes:
            return mutated(b"abcdefgh", [b"xyz"], random)

        def check(self, data: bytes) -> str:
            if data != b"abcdefgh":
                raise ValueError("changed")
            return "whole"

    done = chunk(Picky(), 1, range(300))

    assert 0 < done.outcomes["whole"] < 60
    assert set(done.findings.values()) == {"ValueError: changed"}
    assert done.outcomes.total() + len(done.findings) == 300


def test_growth_is_that_of_the_process_that_grew_most() -> None:
    result = Result()
    for pid, sizes in ((1, (10, 12, 11, 12)), (2, (10, 10, 10, 15))):
        for size in sizes:
            result.add(Chunk(pid, size, chunk(Bundles(), 1, range(0)).outcomes, 0.0, {}))

    assert result.growth_bytes == 5
