from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels.expert_mixing import expert_mixing
from medley.experts import BlockExperts
from trainer.experts import BlockMixture, ExpertConfig, balance_loss

WIDTH, TOKENS = 16, 5
CONFIG = ExpertConfig(num_new=3, bottleneck=4, top_k=2, scale=0.1, dropout=0.1)


def frozen_experts(count: int = 2) -> BlockExperts:
    return BlockExperts(
        torch.randn(count, 4, WIDTH),
        torch.randn(count, 4),
        torch.randn(count, 4, WIDTH),
        torch.randn(count, WIDTH),
        torch.zeros(WIDTH, count),
    )


def random_mixture() -> BlockMixture:
    mixture = BlockMixture(WIDTH, frozen_experts(), CONFIG)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_()
    return mixture


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_new_experts_add_nothing_before_the_first_step() -> None:
    mixture = BlockMixture(WIDTH, None, CONFIG)
    y_BLD, _ = mixture(torch.randn(6, TOKENS, WIDTH))
    assert torch.equal(y_BLD, torch.zeros_like(y_BLD))


def test_evaluation_computes_what_the_server_computes() -> None:
    mixture = random_mixture().eval()
    x_BLD = torch.randn(6, TOKENS, WIDTH)

    def both(name: str) -> torch.Tensor:
        return torch.cat([getattr(mixture, f"frozen_{name}"), getattr(mixture, name).detach()])

    with torch.no_grad():
        ours_BLD, penalties = mixture(x_BLD)
    served_BLD = expert_mixing(
        x_BLD,
        torch.zeros(6, dtype=torch.int64),
        torch.stack([both("down_ERD"), both("up_ERD")], dim=1),
        torch.cat([both("down_bias_ER"), both("up_bias_ED")], dim=1),
        mixture.router.gate_DE.detach()[None],
        torch.arange(5)[None],
        torch.tensor([2]),
        torch.tensor([0.1]),
        max_top_k=2,
    )
    torch.testing.assert_close(ours_BLD, served_BLD)
    assert penalties.balance == penalties.redundancy == 0


def test_rows_with_the_same_token_0_may_share_one_route() -> None:
    mixture = random_mixture().eval()
    x_BLD = torch.randn(6, TOKENS, WIDTH)
    x_BLD[:, 0] = x_BLD[0, 0]
    each_BLD, _ = mixture(x_BLD)
    shared_BLD, _ = mixture(x_BLD, one_route=True)
    torch.testing.assert_close(shared_BLD, each_BLD)


def test_noise_and_dropout_are_only_in_training() -> None:
    mixture, x_BLD = random_mixture(), torch.randn(6, TOKENS, WIDTH)
    assert not torch.equal(mixture(x_BLD)[0], mixture(x_BLD)[0])
    mixture.eval()
    assert torch.equal(mixture(x_BLD)[0], mixture(x_BLD)[0])


def test_gradients_reach_new_experts_and_the_router_only() -> None:
    mixture = random_mixture()
    y_BLD, _ = mixture(torch.randn(20, TOKENS, WIDTH))
    y_BLD.square().sum().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert not any(buffer.requires_grad for buffer in mixture.buffers())


def test_every_choice_in_training_is_counted() -> None:
    mixture = random_mixture()
    mixture(torch.randn(20, TOKENS, WIDTH))
    assert mixture.counts_E.sum() == 20 * CONFIG.top_k
    mixture.eval()
    mixture(torch.randn(20, TOKENS, WIDTH))
    assert mixture.counts_E.sum() == 20 * CONFIG.top_k


def test_gates_are_a_distribution_over_at_most_top_k_experts() -> None:
    gates_BE = random_mixture().eval().gates(torch.randn(9, TOKENS, WIDTH))
    torch.testing.assert_close(gates_BE.sum(1), torch.ones(9))
    assert ((gates_BE > 0).sum(1) == CONFIG.top_k).all()


def test_fewer_experts_than_top_k_are_all_used() -> None:
    config = ExpertConfig(num_new=1, bottleneck=4, top_k=2, scale=0.1, dropout=0.0)
    gates_BE = BlockMixture(WIDTH, None, config).gates(torch.randn(4, TOKENS, WIDTH))
    assert torch.equal(gates_BE, torch.ones(4, 1))


def test_balance_loss_grows_as_use_becomes_one_sided() -> None:
    clean_BE, spread_BE = torch.zeros(64, 4), torch.full((64, 4), 0.7)
    even_BE = torch.randn(64, 4)
    one_sided_BE = even_BE + torch.tensor([9.0, 6.0, 0.0, 0.0])

    def loss(noisy_BE: torch.Tensor, clean_BE: torch.Tensor) -> float:
        top_BK, expert_BK = noisy_BE.topk(2)
        importance_BE = torch.zeros(64, 4).scatter(1, expert_BK, top_BK.softmax(1))
        return float(balance_loss(importance_BE, clean_BE, noisy_BE, spread_BE, 2))

    assert loss(even_BE, clean_BE) < 0.3
    assert loss(one_sided_BE, one_sided_BE - even_BE) > 2


def test_experts_without_relu_are_linear() -> None:
    x_BLD = torch.randn(6, TOKENS, WIDTH)
    odd = []
    for relu in (False, True):
        config = replace(CONFIG, num_new=1, top_k=1, relu=relu)  # one expert: no choice to make
        mixture = BlockMixture(WIDTH, None, config).eval()
        with torch.no_grad():
            mixture.up_ERD.normal_()
            odd.append(torch.allclose(mixture(-x_BLD)[0], -mixture(x_BLD)[0], atol=1e-6))
    assert odd == [True, False]


def test_gradients_are_equal_bits_whatever_the_threads_do() -> None:
    mixture = BlockMixture(64, None, replace(CONFIG, num_new=4, bottleneck=8))
    with torch.no_grad():
        mixture.up_ERD.normal_()
    x_BLD, wanted_BLD = torch.randn(64, 17, 64), torch.randn(64, 17, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grads = []
        for _ in range(40):
            torch.manual_seed(0)  # noise and dropout
            y_BLD, _ = mixture(x_BLD)
            mixture.zero_grad()
            (y_BLD * wanted_BLD).sum().backward()
            grads.append([p.grad.clone() for p in mixture.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(threads)
    assert grads[0]
    for again in grads[1:]:
        assert all(torch.equal(one, other) for one, other in zip(grads[0], again, strict=True))
