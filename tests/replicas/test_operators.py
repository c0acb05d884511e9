"""Two operators change the same thing at the same moment, each through another replica."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import httpx

from tests.replicas.cluster import Cluster
from tests.replicas.witness import Witness
from tests.service.conftest import MakeBundle
from tests.service.versions.test_tasks import put

ROUNDS = 15


def test_of_two_who_name_what_they_saw_one_wins_and_the_other_is_told(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b = replicas = cluster.start_all("a", "b")
    witness.prepare(a, make)
    cluster.until_level()
    with witness.watching(*replicas):
        for _ in range(ROUNDS):
            tag = a.http.get("/v1/tasks/swap").headers["etag"]
            other = "2" if witness.live[max(witness.live)] == "1" else "1"
            headers = {"if-match": tag}
            answers = at_once(
                partial(witness.try_to_activate, a, other, **headers),
                partial(b.http.post, "/v1/tasks/swap:rollback", headers=headers),
            )
            assert sorted(one.status_code for one in answers) == [200, 412], [
                one.text for one in answers
            ]
            for answer in answers:
                if answer.is_success:
                    witness.note(answer, answer.json()["live"])
            cluster.until_level()
            witness.agree(replicas)
            reset(witness, cluster)


def test_of_two_who_do_not_the_later_wins_everywhere(
    cluster: Cluster, witness: Witness, make: MakeBundle
) -> None:
    a, b = replicas = cluster.start_all("a", "b")
    witness.prepare(a, make)
    cluster.until_level()
    with witness.watching(*replicas):
        for _ in range(ROUNDS):
            answers = at_once(
                partial(witness.try_to_activate, a, "1"), partial(witness.try_to_activate, b, "2")
            )
            for answer, version in zip(answers, "12", strict=True):
                witness.note(answer, version)
            cluster.until_level()
            witness.agree(replicas)


def test_the_same_version_is_registered_with_two_replicas_at_once(
    cluster: Cluster, make: MakeBundle, image: bytes
) -> None:
    a, b = cluster.start_all("a", "b")
    same, other = make(task="pets", seed=4)[1], make(task="pets", seed=5)[1]
    answers = at_once(partial(put, a.http, same), partial(put, b.http, same))
    assert sorted(one.status_code for one in answers) == [200, 201], [one.text for one in answers]

    first, second = make(task="pets", version="2", seed=6), make(task="pets", version="2", seed=7)
    answers = at_once(
        partial(put, a.http, first[1], version="2"), partial(put, b.http, second[1], version="2")
    )
    assert sorted(one.status_code for one in answers) == [201, 409], [one.text for one in answers]
    cluster.until_level()
    told = [replica.classify(image, "pets").json() for replica in (a, b)]
    assert told[0] == told[1]
    won = first if answers[0].status_code == 201 else second
    assert told[0]["results"][0]["path"]["digest"] == won[0].digest
    assert put(a.http, other).status_code == 409


def reset(witness: Witness, cluster: Cluster) -> None:
    """Have something to roll back to again: version 1 live, 2 before it."""
    a, b = cluster.all
    witness.activate(a, "2")
    witness.activate(b, "1")
    cluster.until_level()


def at_once(*changes: Callable[[], httpx.Response]) -> list[httpx.Response]:
    """Make changes at the same moment."""
    line = Barrier(len(changes))

    def make_one(change: Callable[[], httpx.Response]) -> httpx.Response:
        line.wait()
        return change()

    with ThreadPoolExecutor(len(changes)) as pool:
        return list(pool.map(make_one, changes))
