"""Exercise 6, on numbers that can be worked out by hand."""

import torch
from torch.testing import assert_close

import adapters

EMBEDDING = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 2.0], [4.0, 4.0]])
ROWS = dict(tokens=torch.tensor([1, 2, 3, 3, 2, 3]), start=torch.tensor([0, 4]),
            length=torch.tensor([4, 2]), prompt=torch.tensor([2, 1]), document=torch.tensor([0, 1]))


def test_means_of_two_prompts():
    # Row 0 is 1 2 | 3 3 and row 1 is 2 | 3: prompts of two tokens and of one.
    means, count = adapters.prompt_means(**ROWS, embedding=EMBEDDING)
    assert_close(means, torch.tensor([[0.5, 1.0], [0.0, 2.0]]))
    assert count.tolist() == [2, 1]


def test_no_token_of_a_continuation_is_seen():
    changed = ROWS | {"tokens": torch.tensor([1, 2, 1, 1, 2, 1])}
    before, after = (adapters.prompt_means(**rows, embedding=EMBEDDING)[0]
                     for rows in (ROWS, changed))
    assert torch.equal(before, after)


def test_features_are_directions_from_the_center():
    means = torch.tensor([[3.0, 4.0], [3.0, 0.0], [5.0, 0.0]])
    points = adapters.features(means, torch.tensor([3.0, 0.0]))
    assert_close(points, torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]]))


def test_every_token_weighs_alike():
    # Three tokens of mean 1 and one token of 5: (3 * 1 + 1 * 5) / 4 = 2, and not (1 + 5) / 2 = 3.
    means, count = torch.tensor([[1.0], [8.0], [5.0]]), torch.tensor([3.0, 2.0, 1.0])
    statistic = adapters.cluster_means(means, count, torch.tensor([0, 1, 0]), 2)
    assert_close(statistic, torch.tensor([[2.0], [8.0]]))


def test_an_empty_cluster_gets_the_mean_of_all():
    means, count = torch.tensor([[1.0], [5.0]]), torch.tensor([3.0, 1.0])
    statistic = adapters.cluster_means(means, count, torch.tensor([2, 0]), 3)
    assert_close(statistic, torch.tensor([[5.0], [2.0], [1.0]]))
