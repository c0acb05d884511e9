"""Who knows what the right answer is, in every generation, and checks what clients were told.

Two tasks: `stable`, which nobody touches, and `swap`, whose live version changes. An answer names
the generation it comes from, so a request has one right answer, byte for byte, on all replicas.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import httpx

from tests.replicas.cluster import Replica
from tests.service.conftest import MakeBundle
from tests.service.load import Tally, loading
from tests.service.raw import Raw, post
from tests.service.versions.test_tasks import put

__all__ = ["Witness"]

GENERATION = re.compile(rb'^\{"generation":(\d+),')
REQUESTS = {"stable": "/v1/classify?model=stable", "swap": "/v1/classify?model=swap"}
PER_S = 15  # requests a second to each replica: enough to meet every moment, not to fill two cores


@dataclass
class Witness:
    """What is right; `live` says since which generation which version of `swap` is live."""

    image: bytes
    live: dict[int, str] = field(default_factory=dict)
    right: dict[tuple[str, str], bytes] = field(default_factory=dict)  # request, live version

    @property
    def requests(self) -> list[tuple[str, bytes]]:
        """Names and bytes of what clients ask."""
        return [
            (name, post(path, self.image, content_type="image/png"))
            for name, path in REQUESTS.items()
        ]

    def prepare(self, replica: Replica, make: MakeBundle) -> None:
        """Register both tasks, and ask what is answered while each version of `swap` is live."""
        put(replica.http, make(task="stable", seed=1)[1], "stable").raise_for_status()
        for version, seed in (("1", 2), ("2", 3)):
            data = make(task="swap", version=version, seed=seed)[1]
            self.note(put(replica.http, data, "swap", version), version)
            self._ask(replica, version)
        self.activate(replica, "1")
        assert self.right["swap", "1"] != self.right["swap", "2"]
        assert self.right["stable", "1"] == self.right["stable", "2"]

    def activate(self, replica: Replica, version: str, **headers: str) -> int:
        """Make a version of `swap` live; returns the generation."""
        answer = self.try_to_activate(replica, version, **headers)
        answer.raise_for_status()
        return self.note(answer, version)

    def try_to_activate(self, replica: Replica, version: str, **headers: str) -> httpx.Response:
        alias = "/v1/tasks/swap/aliases/live"
        return replica.http.put(alias, json={"version": version}, headers=headers)

    def note(self, answer: httpx.Response, version: str) -> int:
        """Remember which version is live since the generation of a change's answer."""
        answer.raise_for_status()
        generation = int(answer.headers["x-registry-generation"])
        self.live[generation] = version
        return generation

    def _ask(self, replica: Replica, version: str) -> None:
        with Raw(replica.url) as raw:
            for name, request in self.requests:
                answer = raw.ask(request)
                assert answer.status == 200
                self.right[name, version] = GENERATION.sub(b"", answer.body)

    @contextmanager
    def recording(self, *replicas: Replica, per_s: float = PER_S) -> Iterator[list[Tally]]:
        """Load replicas while the block runs; a tally for each, complete after it."""
        tallies: list[Tally] = []
        with ExitStack() as stack:
            for replica in replicas:
                one = loading(replica.url, self.requests, clients=2, per_s=per_s)
                tallies.append(stack.enter_context(one))
            yield tallies

    @contextmanager
    def watching(self, *replicas: Replica) -> Iterator[list[Tally]]:
        """Load replicas while the block runs; then check every answer that any of them gave."""
        with self.recording(*replicas) as tallies:
            yield tallies
        for replica, tally in zip(replicas, tallies, strict=True):
            assert set(tally.statuses) == {200}, (replica.name, tally.statuses)
            assert not tally.torn, f"{replica.name} broke an answer off"
            assert not (wrong := self.wrong(tally)), (replica.name, wrong)

    def wrong(self, tally: Tally) -> Counter[tuple[str, int]]:
        """How often which request got another answer than its generation has."""
        found: Counter[tuple[str, int]] = Counter()
        for (name, _, body), count in tally.answers.items():
            match = GENERATION.match(body)
            assert match is not None, body[:100]
            generation = int(match[1])
            if GENERATION.sub(b"", body) != self.right[name, self.live_in(generation)]:
                found[name, generation] += count
        return found

    def seen(self, tally: Tally) -> dict[int, set[str]]:
        """Which versions of `swap` answered in each generation; fails at any other answer."""
        found: dict[int, set[str]] = {}
        for name, _, body in tally.answers:
            match, rest = GENERATION.match(body), GENERATION.sub(b"", body)
            assert match is not None, body[:100]
            versions = {version for version in "12" if self.right[name, version] == rest}
            assert versions, (name, body)
            if name == "swap":
                found.setdefault(int(match[1]), set()).update(versions)
        return found

    def live_in(self, generation: int) -> str:
        """The version of `swap` that is live in a generation: that of the last change before."""
        changes = sorted(self.live)
        at = bisect.bisect_right(changes, generation)
        assert at, f"generation {generation} is from before the first one"
        return self.live[changes[at - 1]]

    def agree(self, replicas: Sequence[Replica]) -> None:
        """All replicas answer both requests rightly, here and now."""
        for replica in replicas:
            with Raw(replica.url) as raw:
                for name, request in self.requests:
                    answer = raw.ask(request)
                    assert answer.status == 200, (replica.name, name, answer.body)
                    match = GENERATION.match(answer.body)
                    assert match is not None
                    assert int(match[1]) >= max(self.live), f"{replica.name} is behind"
                    right = self.right[name, self.live[max(self.live)]]
                    assert GENERATION.sub(b"", answer.body) == right, (replica.name, name)
