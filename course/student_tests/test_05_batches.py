"""Exercise 5: which rows come together, and how often."""

import torch

import adapters


def test_batches_of_clusters_hold_every_row_once():
    cluster = torch.tensor([0, 2, 0, 2, 0, 2, 2, 0, 1, 0, 0])
    batches = adapters.cluster_batches(cluster, 3, 0)
    assert sorted(torch.cat(batches).tolist()) == list(range(11))
    assert all(len(batch) <= 3 for batch in batches)


def test_leftovers_are_packed_together():
    # 5 rows and 3 rows in batches of 4: four of the first, and its fifth with the other three.
    cluster = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0])
    for seed in range(10):
        batches = adapters.cluster_batches(cluster, 4, seed)
        kinds = sorted(sorted(cluster[batch].tolist()) for batch in batches)
        assert kinds == [[0, 0, 0, 0], [0, 1, 1, 1]]


def test_an_epoch_is_drawn_freshly():
    cluster = torch.zeros(40, dtype=torch.int64)
    length = torch.arange(2, 42)
    for draw in (lambda seed: adapters.cluster_batches(cluster, 4, seed),
                 lambda seed: adapters.shuffled_batches(length, 4, seed)):
        first = [draw(seed)[0].tolist() for seed in range(10)]
        assert first[0] == draw(0)[0].tolist()  # the same seed, the same draw
        assert len({tuple(batch) for batch in first}) > 5


def test_shuffled_batches_hold_every_row_once():
    batches = adapters.shuffled_batches(torch.arange(2, 25), 5, 0)
    assert sorted(torch.cat(batches).tolist()) == list(range(23))
    assert sorted(len(batch) for batch in batches) == [3, 5, 5, 5, 5]


def test_rows_of_like_length_come_together():
    length = torch.tensor([10, 100] * 32)
    for batch in adapters.shuffled_batches(length, 16, 0):
        assert len(set(length[batch].tolist())) == 1
