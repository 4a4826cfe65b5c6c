"""k-means and batches by their properties: any correct implementation passes these tests.

They run on ours and on a textbook's, written out below with loops.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans, kmeans_plusplus

import cluster as ours
from cluster import cluster_batches, nearest, shuffled_batches


def textbook(points, k, generator, max_steps=100, tolerance=1e-4):
    """k-means++ and Lloyd as a textbook has them; an empty cluster takes the farthest point."""
    if len(points) == 0 or k < 1 or not points.isfinite().all():
        raise ValueError("bad points")
    points, N = points.float(), len(points)
    seeds = [int(torch.randint(N, (), generator=generator))]
    for _ in range(k - 1):
        weight = torch.cdist(points, points[seeds]).amin(dim=1).square()
        weight = weight if weight.sum() > 0 else torch.ones(N)
        seeds.append(int(torch.multinomial(weight, 1, generator=generator)))
    centroids, cost = points[seeds].clone(), torch.inf
    for _ in range(max_steps):
        own = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist")
        own = own.argmin(dim=1)
        new = (points - centroids[own]).square().sum(dim=1)
        if new.sum() >= cost * (1 - tolerance):
            break
        cost = new.sum()
        for i in range(k):
            members = points[own == i]
            centroids[i] = members.mean(dim=0) if len(members) else points[new.argmax()]
    own = torch.cdist(points, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
    return centroids, own


IMPLEMENTATIONS = pytest.mark.parametrize("kmeans", [ours.kmeans, textbook])


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(k=12, n=30, C=5, seed=0, spread=0.05):
    g = draw(seed)
    centers = torch.randn(k, C, generator=g) * 3
    return (centers[:, None] + spread * torch.randn(k, n, C, generator=g)).view(-1, C)


def inertia(points, centroids, own):
    return float((points - centroids[own]).square().sum())


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 9), st.integers(1, 6))
def test_nearest_is_brute_force(seed, N, K, C):
    g = draw(seed)
    points, centroids = torch.randn(N, C, generator=g), torch.randn(K, C, generator=g)
    own, distance = nearest(points, centroids)
    brute = (points[:, None] - centroids).square().sum(dim=2)  # (N, K)
    assert torch.allclose(distance, brute.amin(dim=1), atol=1e-4)
    assert torch.allclose(brute.gather(1, own[:, None])[:, 0], brute.amin(dim=1), atol=1e-4)


def test_nearest_takes_the_lower_of_equals_and_tells_close_points_apart_far_from_zero():
    centroids = torch.tensor([[1.0, 0], [1, 0], [2, 0]])
    assert nearest(torch.tensor([[1.0, 0]]), centroids)[0].tolist() == [0]
    far = torch.tensor([[10000.0, 0], [10000.5, 0]])
    assert nearest(far + 0.1, far)[0].tolist() == [0, 1]


def test_nearest_does_not_depend_on_its_chunks(monkeypatch):
    points, centroids = torch.randn(101, 4, generator=draw()), torch.randn(7, 4, generator=draw(1))
    whole = nearest(points, centroids)
    monkeypatch.setattr(ours, "CHUNK", 20)
    assert torch.equal(whole[0], nearest(points, centroids)[0])


@IMPLEMENTATIONS
def test_points_are_at_their_nearest_centroid(kmeans):
    points = torch.randn(200, 6, generator=draw())
    centroids, own = kmeans(points, 9, draw())
    assert centroids.shape == (9, 6) and own.shape == (200,) and own.dtype == torch.int64
    assert torch.equal(own, nearest(points, centroids)[0])


@IMPLEMENTATIONS
@given(seed=st.integers(0, 1000))
def test_centroids_are_the_means_of_their_points_in_the_end(kmeans, seed):
    points = torch.randn(60, 3, generator=draw(seed))
    centroids, own = kmeans(points, 5, draw(seed), max_steps=1000, tolerance=0.0)
    for i in own.unique():
        assert torch.allclose(centroids[i], points[own == i].mean(dim=0), atol=1e-4)


@IMPLEMENTATIONS
def test_well_separated_groups_are_found(kmeans):
    """k-means++ finds most of them at once; points drawn anyhow leave a third of them out."""
    shares = []
    for seed in range(20):
        points = blobs(seed=seed)
        _, own = kmeans(points, 12, draw(seed))
        whole = own.view(12, 30)
        shares.append(len({int(row.mode().values) for row in whole}) / 12)
    assert sum(shares) / len(shares) > 0.9


@IMPLEMENTATIONS
def test_as_good_as_scikit_learns(kmeans):
    points = torch.cat([blobs(20, 20, 8, 3, spread=0.8), torch.randn(100, 8, generator=draw(4))])
    found = [inertia(points, *kmeans(points, 20, draw(seed))) for seed in range(8)]
    theirs = []
    for seed in range(8):
        seeds, _ = kmeans_plusplus(points.numpy(), 20, random_state=seed, n_local_trials=1)
        theirs.append(KMeans(20, init=seeds, n_init=1).fit(points.numpy()).inertia_)
    assert sum(found) < 1.1 * sum(theirs)


@IMPLEMENTATIONS
def test_fewer_distinct_points_than_clusters(kmeans):
    points = torch.tensor([[0.0, 1], [2, 3]]).repeat(10, 1)
    centroids, own = kmeans(points, 5, draw())
    assert inertia(points, centroids, own) < 1e-8
    assert centroids.isfinite().all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("points, k", [
    (torch.zeros(0, 3), 2), (torch.zeros(4, 3), 0), (torch.full((4, 3), torch.nan), 2),
    (torch.tensor([[0.0], [torch.inf]]), 1)])
def test_what_cannot_be_clustered_is_an_error(kmeans, points, k):
    with pytest.raises(ValueError):
        kmeans(points, k, draw())


@IMPLEMENTATIONS
def test_the_same_draws_give_the_same_clusters_and_all_of_one_is_the_mean(kmeans):
    points = torch.randn(50, 100, generator=draw())
    first, second = kmeans(points, 4, draw(7)), kmeans(points, 4, draw(7))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.allclose(kmeans(points, 1, draw())[0][0], points.mean(dim=0), atol=1e-5)


@IMPLEMENTATIONS
def test_no_cluster_stays_empty_where_there_are_points_enough(kmeans):
    for seed in range(20):
        points = torch.cat([torch.zeros(50, 2), torch.randn(10, 2, generator=draw(seed))])
        _, own = kmeans(points, 8, draw(seed))
        assert len(own.unique()) == 8


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(1, 17), st.integers(0, 9))
def test_an_epoch_of_batches_has_every_row_once(own, size, seed):
    own = torch.tensor(own)
    length = torch.randint(2, 50, own.shape, generator=draw(seed))
    for batches in (cluster_batches(own, size, draw(seed)),
                    shuffled_batches(length, size, draw(seed))):
        assert torch.cat(batches).sort().values.tolist() == list(range(len(own)))
        assert len(batches) == -(-len(own) // size)
        assert sum(len(batch) < size for batch in batches) <= 1
    pure = sum(n // size for n in own.bincount().tolist())
    found = cluster_batches(own, size, draw(seed))
    assert sum(len(b) == size and len(own[b].unique()) == 1 for b in found) >= pure


def test_batches_are_drawn_anew_and_by_the_generator_alone():
    own, length = torch.arange(200) % 5, torch.full((200,), 9)
    for make in (lambda g: cluster_batches(own, 16, g), lambda g: shuffled_batches(length, 16, g)):
        first, again, other = (torch.cat(make(draw(seed))) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_shuffled_batches_hold_rows_of_like_length():
    length = torch.randint(2, 257, (2000,), generator=draw())
    batches = shuffled_batches(length, 16, draw())
    padded = sum(int(length[b].max()) * len(b) for b in batches)
    assert padded < 1.1 * int(length.sum())


@pytest.mark.parametrize("far", [1e3, 1e6, 1e8])
@IMPLEMENTATIONS
def test_one_far_point_blurs_no_other(kmeans, far):
    """Squares of large numbers cancel; scikit-learn computes in double precision."""
    points = torch.randn(200, 16, generator=draw())
    points[3] = far
    centroids, own = kmeans(points, 8, draw())
    exact = inertia(points.double(), centroids.double(), own)
    theirs = KMeans(8, n_init=1, random_state=0).fit(points.double().numpy()).inertia_
    assert exact < 1.1 * theirs


def test_seeds_are_drawn_by_squared_distance():
    """Beside a seed at 0, points at 1 and 3 are drawn 1 to 9; by plain distance it were 1 to 3."""
    points, far, near = torch.tensor([[0.0], [1.0], [3.0]]), 0, 0
    for seed in range(900):
        first, second = ours.seeds(points, 2, draw(seed)).tolist()
        far, near = far + ((first, second) == (0, 2)), near + ((first, second) == (0, 1))
    assert 250 < far + near < 350  # the first is any point
    assert far > 5 * near > 0


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@IMPLEMENTATIONS
def test_the_unit_of_the_points_changes_nothing(kmeans, scale):
    points = torch.randn(300, 4, generator=draw())
    assert torch.equal(kmeans(points, 9, draw())[1], kmeans(points * scale, 9, draw())[1])


def test_clusters_that_lost_their_points_go_to_different_ones(monkeypatch):
    """Three equal seeds leave two clusters empty: a step later each has points of its own."""
    points = blobs(k=3, n=5)
    monkeypatch.setattr(ours, "seeds", lambda points, k, generator: torch.zeros(k).long())
    own = ours.kmeans(points, 3, draw(), max_steps=1)[1]
    assert len(own.unique()) == 3
    points = torch.tensor([[0.0], [0.1], [0.2], [10.0]])  # the farthest point takes an empty one
    assert ours.kmeans(points, 2, draw(), max_steps=1)[1].bincount().tolist() == [3, 1]
