"""Exercise 4: what is drawn, over many draws."""

import pytest
import torch

import adapters


def test_shape_and_range():
    chosen = adapters.kmeans_seeds(torch.arange(7.0)[:, None], 4, 0)
    assert chosen.shape == (4,) and chosen.dtype == torch.int64
    assert len(set(chosen.tolist())) == 4
    assert all(0 <= i < 7 for i in chosen.tolist())


def test_each_distinct_point_is_drawn_once_before_any_comes_again():
    points = torch.tensor([[1.0], [1.0], [5.0], [5.0], [9.0], [9.0]])
    for seed in range(20):
        chosen = adapters.kmeans_seeds(points, 3, seed)
        assert sorted(points[chosen].flatten().tolist()) == [1.0, 5.0, 9.0]


def test_more_seeds_than_distinct_points():
    chosen = adapters.kmeans_seeds(torch.tensor([[2.0], [2.0], [3.0]]), 5, 0)
    assert chosen.shape == (5,)
    assert all(0 <= i < 3 for i in chosen.tolist())


def test_a_point_is_drawn_by_the_square_of_its_distance():
    # Points 0, 1 and 3. After 0, the others have squares 1 and 9: 3 comes in 9 of 10 draws.
    points = torch.tensor([[0.0], [1.0], [3.0]])
    drawn = [adapters.kmeans_seeds(points, 2, seed).tolist() for seed in range(1200)]
    firsts = [sum(first == i for first, _ in drawn) / len(drawn) for i in range(3)]
    assert firsts == pytest.approx([1 / 3, 1 / 3, 1 / 3], abs=0.06)
    after_0 = [second for first, second in drawn if first == 0]
    assert sum(second == 2 for second in after_0) / len(after_0) == pytest.approx(0.9, abs=0.06)
