"""Exercise 3, on points that one can draw on paper."""

import pytest
import torch
from torch.testing import assert_close

import adapters


def test_the_nearest_of_three():
    points = torch.tensor([[0.0, 0.0], [4.0, 1.0], [9.0, 9.0]])
    centroids = torch.tensor([[10.0, 10.0], [0.0, 1.0], [5.0, 0.0]])
    cluster, distance = adapters.nearest(points, centroids)
    assert cluster.tolist() == [1, 2, 0]
    assert_close(distance, torch.tensor([1.0, 2.0, 2.0]))


def test_a_tie_goes_to_the_lower_index():
    cluster, _ = adapters.nearest(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0], [4.0]]))
    assert cluster.tolist() == [0, 1]


def test_centres_and_an_empty_cluster():
    points = torch.tensor([[1.0, 0.0], [3.0, 4.0], [7.0, 7.0]])
    centres, count = adapters.cluster_centres(points, torch.tensor([2, 2, 0]), 4)
    assert_close(centres, torch.tensor([[7.0, 7.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))
    assert count.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_are_found(seed):
    points = torch.tensor([[0.0], [10.0], [1.0], [11.0]])
    centroids, cluster = adapters.kmeans(points, 2, seed)
    assert cluster[0] == cluster[2] != cluster[1] == cluster[3]
    assert sorted(centroids.flatten().tolist()) == pytest.approx([0.5, 10.5])


@pytest.mark.parametrize("seed", range(5))
def test_as_many_clusters_as_points(seed):
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0], [50.0]])
    cluster = adapters.kmeans(points, 5, seed)[1]
    assert sorted(cluster.tolist()) == [0, 1, 2, 3, 4]


def test_more_clusters_than_distinct_points():
    points = torch.tensor([[2.0], [2.0], [2.0], [5.0]])
    centroids, cluster = adapters.kmeans(points, 4, 0)
    assert centroids.shape == (4, 1)
    assert_close(centroids[cluster], points)


def test_what_cannot_be_clustered_is_refused():
    for points, k in ((torch.zeros(0, 2), 1), (torch.zeros(3, 2), 0),
                      (torch.tensor([[1.0], [torch.nan]]), 1)):
        with pytest.raises(ValueError):
            adapters.kmeans(points, k, 0)
