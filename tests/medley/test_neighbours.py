"""Which tasks an image is nearest to: against float64, whoever else is there."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import normalize

from medley.neighbours import NOBODY, Neighbours
from tests.devices import DEVICES

PATHS = 9


def units(rows: int, width: int, chance: torch.Generator) -> Tensor:
    return normalize(torch.randn(rows, width, generator=chance), dim=1)


def everybody(rows: int) -> Tensor:
    return torch.ones(rows, PATHS, dtype=torch.bool)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 8),
    paths=st.sets(st.integers(0, PATHS - 1)),
    k=st.integers(0, 16),
    width=st.sampled_from([24, 512]),
)
def test_neighbours_are_those_that_float64_finds(
    seed: int, rows: int, paths: set[int], k: int, width: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    features_BE = units(rows, width, chance)
    among_BP = torch.rand(rows, PATHS, generator=chance) < 0.7
    neighbours = Neighbours(width=width)
    prototypes = {path: units(1 + (seed + path) % 7, width, chance) for path in sorted(paths)}
    for path, prototypes_CE in prototypes.items():
        neighbours.add(path, prototypes_CE * (1 + path))
    paths_BK, similarity_BK = neighbours.nearest(features_BE, among_BP, k)

    assert neighbours.paths == paths
    assert paths_BK.shape == similarity_BK.shape == (rows, k)
    assert (paths_BK.dtype, similarity_BK.dtype) == (torch.int64, torch.float32)
    for row in range(rows):
        cosines = {
            path: float((features_BE[row].double() @ p_CE.double().T).max())
            for path, p_CE in prototypes.items()
            if among_BP[row, path]
        }
        expected = sorted(cosines, key=lambda path: -cosines[path])[:k]
        missing = k - len(expected)
        assert paths_BK[row].tolist() == expected + [NOBODY] * missing
        found = similarity_BK[row].tolist()
        assert found == pytest.approx(
            [cosines[path] for path in expected] + [-math.inf] * missing, abs=1e-6
        )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([1, 2, 4, 8]), others=st.integers(1, 8))
def test_a_similarity_depends_on_no_other_task_and_on_no_other_image(
    seed: int, rows: int, others: int
) -> None:
    chance = torch.Generator().manual_seed(seed)
    features_BE, prototypes_CE = units(rows, 512, chance), units(1 + seed % 100, 512, chance)
    alone, among_others = Neighbours(width=512), Neighbours(width=512)
    alone.add(4, prototypes_CE)
    for path in range(others):
        if path != 4:
            among_others.add(path, units(1 + (seed + path) % 130, 512, chance))
    among_others.add(4, prototypes_CE)
    _, alone_B1 = alone.nearest(features_BE, everybody(rows), 1)
    paths_BK, similarity_BK = among_others.nearest(features_BE, everybody(rows), PATHS)
    assert torch.equal(similarity_BK[paths_BK == 4], alone_B1[:, 0])

    place = seed % rows
    others_BE = units(rows, 512, chance)
    others_BE[place] = features_BE[place]
    again_BK, found_BK = among_others.nearest(others_BE, everybody(rows), PATHS)
    assert torch.equal(again_BK[place], paths_BK[place])
    assert torch.equal(found_BK[place], similarity_BK[place])


@settings(deadline=None)
@given(order=st.permutations(range(PATHS)))
def test_of_equally_near_tasks_the_smaller_path_comes_first(order: list[int]) -> None:
    neighbours = Neighbours(width=24)
    prototypes_CE = units(3, 24, torch.Generator().manual_seed(1))
    for path in order:
        neighbours.add(path, prototypes_CE)
    paths_BK, similarity_BK = neighbours.nearest(prototypes_CE[:2], everybody(2), 5)
    assert paths_BK.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert bool((similarity_BK == similarity_BK[:, :1]).all())


@pytest.mark.parametrize("device", DEVICES)
def test_tasks_come_and_go(device: str) -> None:
    chance = torch.Generator().manual_seed(0)
    features_BE = units(2, 24, chance).to(device)
    neighbours = Neighbours(device, width=24)
    seen = [neighbours.changes]
    for path in (5, 2):
        neighbours.add(path, units(4, 24, chance).half())
        seen.append(neighbours.changes)
    among_BP = everybody(2).to(device)
    before, _ = neighbours.nearest(features_BE, among_BP, 2)
    assert before.sort(dim=1).values.tolist() == [[2, 5]] * 2
    neighbours.remove(5)
    seen.append(neighbours.changes)
    after, _ = neighbours.nearest(features_BE, among_BP, 2)
    assert after.tolist() == [[2, NOBODY]] * 2
    assert neighbours.paths == {2}
    assert len(set(seen)) == len(seen)
    with pytest.raises(KeyError):
        neighbours.remove(5)


def test_an_image_without_numbers_is_near_to_nobody() -> None:
    chance = torch.Generator().manual_seed(0)
    neighbours = Neighbours(width=24)
    neighbours.add(0, units(4, 24, chance))
    features_BE = units(2, 24, chance)
    features_BE[1, 3] = math.nan
    paths_BK, similarity_BK = neighbours.nearest(features_BE, everybody(2), 1)
    assert paths_BK.tolist() == [[0], [NOBODY]]
    assert similarity_BK[1].item() == -math.inf


def test_nothing_is_read_back_from_where_the_features_are() -> None:
    """On tensors without data, where any look at a number fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        neighbours = Neighbours(width=24)
        neighbours._prototypes = {3: torch.empty(24, 4)}
        neighbours._sort()
        among_BP = torch.empty(4, PATHS, dtype=torch.bool)
        paths_BK, _ = neighbours.nearest(torch.empty(4, 24), among_BP, 2)
        assert paths_BK.shape == (4, 2)
        with pytest.raises(DataDependentOutputException):
            paths_BK.tolist()


@pytest.mark.parametrize(
    ("prototypes_CE", "message"),
    [
        (torch.zeros(1, 24), "prototype 0 has no direction, its norm is 0.0"),
        (torch.cat([torch.ones(2, 24), torch.zeros(1, 24)]), "prototype 2 has no direction"),
        (torch.full((1, 24), math.nan), "prototype 0 has no direction, its norm is nan"),
        (torch.full((1, 24), math.inf), "prototype 0 has no direction, its norm is inf"),
        (torch.full((1, 24), 1e-30), "prototype 0 has no direction"),
        (torch.ones(1, 23), r"shape \(1, 23\), expected \(classes, 24\)"),
        (torch.ones(24), r"shape \(24,\), expected \(classes, 24\)"),
        (torch.ones(0, 24), r"shape \(0, 24\), expected \(classes, 24\)"),
    ],
)
def test_what_is_no_prototype_is_refused_and_changes_nothing(
    prototypes_CE: Tensor, message: str
) -> None:
    neighbours = Neighbours(width=24)
    changes = neighbours.changes
    with pytest.raises(ValueError, match=message):
        neighbours.add(0, prototypes_CE)
    assert (neighbours.paths, neighbours.changes) == (frozenset(), changes)


def test_a_path_is_a_task_s_and_its_own() -> None:
    neighbours = Neighbours(width=24)
    neighbours.add(1, torch.ones(1, 24))
    with pytest.raises(ValueError, match="path 1 is taken"):
        neighbours.add(1, torch.ones(1, 24))
    with pytest.raises(ValueError, match="path -1 is not that of a task"):
        neighbours.add(-1, torch.ones(1, 24))
