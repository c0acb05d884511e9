from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainer.bench.aggregates import Nearness, Unclaimed

ORDER = ("cold", "warm", "grey", "odd")


def some(count: int, seed: int) -> Tensor:
    return normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


PROTOTYPES: Mapping[str, Tensor] = {task: some(3, seed) for seed, task in enumerate(ORDER[:3])}
FEATURES = {"cold": some(37, 10), "odd": some(5, 11)}  # neither is a whole number of buckets


def similarity(task: str, other: str) -> Tensor:
    return (FEATURES[task] @ PROTOTYPES[other].T).amax(1)


def test_the_nearest_are_those_with_the_greatest_cosine_and_only_of_those_that_are_loaded() -> None:
    nearness = Nearness(ORDER, PROTOTYPES, FEATURES)
    for loaded in (ORDER[:1], ORDER[:2], ("warm", "grey"), ORDER):
        places_NK, similarity_NK = nearness.nearest("cold", loaded, 2)
        near = [task for task in loaded if task in PROTOTYPES]
        expected_NT = torch.stack([similarity("cold", task) for task in near], 1)
        ranked_NT, order_NT = expected_NT.sort(dim=1, descending=True)
        names = np.array([ORDER.index(task) for task in near])
        assert (places_NK == names[order_NT[:, :2].numpy()]).all()
        np.testing.assert_allclose(similarity_NK, ranked_NT[:, :2].numpy(), atol=1e-6)


def test_a_task_without_prototypes_is_near_to_nobody() -> None:
    nearness = Nearness(ORDER, PROTOTYPES, FEATURES)
    places_NK, _ = nearness.nearest("odd", ORDER, 8)
    assert places_NK.shape == (5, 3)  # more were asked for than there are
    assert nearness.nearest("odd", ("odd",), 4)[0].shape == (5, 0)


def test_a_tie_goes_to_the_task_that_was_learnt_earlier() -> None:
    twins = {"grey": PROTOTYPES["cold"], "warm": PROTOTYPES["cold"]}
    places_NK, similarity_NK = Nearness(ORDER, twins, FEATURES).nearest("cold", ORDER, 2)
    assert (similarity_NK[:, 0] == similarity_NK[:, 1]).all()
    assert (places_NK == [ORDER.index("warm"), ORDER.index("grey")]).all()


def test_nobody_claims_anything_of_the_unclaimed() -> None:
    assert Unclaimed({"cold": 3}).route("cold", ORDER).tolist() == [-1, -1, -1]
