"""Exercise 7, on numbers that can be worked out by hand."""

import torch
from torch.testing import assert_close

import adapters

WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # V = 3 tokens, C = 2


def network(start, n_in=2, through=0.0):
    """Weights that carry the first number of a statistic through one unit of each layer, times
    `through`, into the first number that is written."""
    state = {"0.weight": torch.zeros(64, n_in), "0.bias": torch.zeros(64),
             "2.weight": torch.zeros(32, 64), "2.bias": torch.zeros(32),
             "4.weight": torch.zeros(len(start), 32), "4.bias": torch.tensor(start)}
    for name in ("0.weight", "2.weight"):
        state[name][0, 0] = 1.0
    state["4.weight"][0, 0] = through
    return state


def head_state(start, through=0.0, center=(0.0, 0.0), spread=(1.0, 1.0)):
    state = {f"hypernetwork.{name}": t for name, t in network(start, 2, through).items()}
    return state | {"center": torch.tensor(center), "spread": torch.tensor(spread),
                    "clusters": torch.zeros(3, 2)}


def test_an_untrained_network_writes_its_start():
    start = torch.tensor([1.0, -2.0, 3.0])
    written = adapters.hypernetwork(torch.randn(5, 4), start, None)
    assert_close(written, start.expand(5, 3))


def test_the_network_by_hand():
    statistics = torch.tensor([[1.0, 7.0], [-1.0, 7.0]])  # a ReLU stops what is negative
    written = adapters.hypernetwork(statistics, torch.zeros(2), network([10.0, 20.0], through=6.0))
    assert_close(written, torch.tensor([[16.0, 20.0], [10.0, 20.0]]))


def test_a_comes_first_and_each_is_written_row_by_row():
    state = head_state([float(i) for i in range(10)])  # r C + V r = 4 + 6
    A, B = adapters.chameleon_factors(WEIGHT, 2, 4.0, state, torch.zeros(1, 2))
    assert_close(A, torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))
    assert_close(B, torch.tensor([[[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]]]))


def test_a_statistic_is_standardised():
    state = head_state([0.0] * 5, through=1.0, center=(1.0, 7.0), spread=(2.0, 0.0))
    # (5 - 1) / 2 = 2; the second number never varied in training, so it says nothing.
    statistics = torch.tensor([[5.0, 7.0], [5.0, 999.0]])
    A, _ = adapters.chameleon_factors(WEIGHT, 1, 4.0, state, statistics)
    assert_close(A, torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]]))


def test_an_untrained_head_is_the_frozen_head():
    hidden = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])
    logits = adapters.chameleon_logits(WEIGHT, 1, 2.0, None, hidden, torch.randn(1, 2))
    assert_close(logits, torch.tensor([[[1.0, 1.0, 2.0], [2.0, 0.0, 2.0]]]))


def test_the_logits_by_hand():
    # A = (1, 2), so A h = 3, and B = (3, 4, 5). alpha / rank is 2.
    hidden = torch.ones(1, 1, 2)
    state = head_state([1.0, 2.0, 3.0, 4.0, 5.0])
    logits = adapters.chameleon_logits(WEIGHT, 1, 2.0, state, hidden, torch.zeros(1, 2))
    assert_close(logits, torch.tensor([[[1.0 + 18.0, 1.0 + 24.0, 2.0 + 30.0]]]))


def test_each_row_has_an_update_of_its_own():
    # The statistic's first number is added to A: (1 + s, 2).
    hidden, statistics = torch.ones(2, 1, 2), torch.tensor([[0.0, 0.0], [4.0, 0.0]])
    state = head_state([1.0, 2.0, 1.0, 0.0, 0.0], through=1.0)
    logits = adapters.chameleon_logits(WEIGHT, 1, 1.0, state, hidden, statistics)
    assert_close(logits[:, 0], torch.tensor([[1.0 + 3.0, 1.0, 2.0], [1.0 + 7.0, 1.0, 2.0]]))
