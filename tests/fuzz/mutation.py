"""How bytes are damaged: by a few random acts, each of a kind that has broken a parser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

__all__ = ["mutated"]

ACTS = (1, 1, 2, 4)  # how many of them
GROWTH = 2  # a mutant is at most so many times as long, and 1 kB more
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutated(data: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Damage `data`; parts of `others` may end up in it. One in fifty stays whole."""
    mutant = bytearray(data)
    if random.randrange(50):
        for _ in range(random.choice(ACTS)):
            random.choice(_ACTS)(mutant, others, random)
    return bytes(mutant[: GROWTH * len(data) + 1024])


def _flip(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    for _ in range(random.randint(1, 8)):
        if data:
            data[_place(data, random)] ^= 1 << random.randrange(8)


def _truncate(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    del data[random.randint(0, len(data)) :]


def _cut_out(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    start = _place(data, random)
    del data[start : start + random.randint(1, 64)]


def _repeat(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    start = _place(data, random)
    part = data[start : start + random.randint(1, 64)]
    data[start:start] = part * random.choice((1, 1, 2, 100))


def _overwrite(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    start = _place(data, random)
    part = random.randbytes(random.randint(1, 16))
    data[start : start + len(part)] = part


def _set_number(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    """Lengths, counts and dimensions are numbers: make one an edge case."""
    size, start = random.choice((1, 2, 4, 8)), _place(data, random)
    number = (random.choice(_EDGES) + random.choice((-1, 0, 1))) % (1 << 8 * size)
    data[start : start + size] = number.to_bytes(size, random.choice(("little", "big")))


def _splice(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    other = random.choice(others)
    start = random.randrange(len(other))
    data[_place(data, random) :] = other[start:]


def _append(data: bytearray, others: Sequence[bytes], random: Random) -> None:
    data += random.randbytes(random.randint(1, 64))


def _place(data: bytearray, random: Random) -> int:
    """Half of all places are in the first 128 bytes, where formats keep what they are."""
    end = len(data) if random.random() < 0.5 else min(len(data), 128)
    return random.randrange(end) if end else 0


_ACTS: list[Callable[[bytearray, Sequence[bytes], Random], None]] = [
    *(_flip, _truncate, _cut_out, _repeat, _overwrite, _set_number, _set_number, _splice, _append)
]
