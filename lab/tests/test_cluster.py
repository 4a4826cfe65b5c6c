import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.cluster import KMeans as Reference
from torch.utils._python_dispatch import TorchDispatchMode

from lab.cluster import assign, cluster_batches, kmeans, seed_centroids

# Small whole numbers: sums are exact in float32, and duplicates are common.
points_of = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.integers(-9, 9)
).map(lambda a: torch.from_numpy(a).float())
ks = st.integers(1, 12)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(n, dim, k, seed=0):
    """Points like embeddings: k uneven groups and noise, on the unit sphere."""
    generator = seeded(seed)
    centres = torch.randn(k, dim, generator=generator)
    group = torch.multinomial(torch.rand(k, generator=generator), n, True, generator=generator)
    points = centres[group] + 0.7 * torch.randn(n, dim, generator=generator)
    return torch.nn.functional.normalize(points, dim=1)


def slow_distances(points, centroids):
    return (points[:, None].double() - centroids[None].double()).square().sum(dim=2)


@given(points_of, ks, st.integers(0, 9))
def test_every_point_is_at_its_nearest_centroid(points, k, seed):
    found = kmeans(points, k, seeded(seed))
    distances = slow_distances(points, found.centroids)
    own = distances[torch.arange(len(points)), found.cluster]
    torch.testing.assert_close(own, distances.min(dim=1).values, atol=1e-3, rtol=1e-4)
    assert found.inertia == pytest.approx(own.sum().item(), abs=1e-2, rel=1e-4)
    assert found.cluster.min() >= 0 and found.cluster.max() < k == len(found.centroids)


@given(points_of, ks, st.integers(0, 9))
def test_inertia_never_rises(points, k, seed):
    steps = [kmeans(points, k, seeded(seed), max_iters=n, tol=0.0) for n in range(8)]
    for before, after in itertools.pairwise(steps):
        assert after.inertia <= before.inertia * (1 + 1e-5) + 1e-4
        assert after.iterations <= before.iterations + 1


@given(points_of, ks)
def test_at_a_fixed_point_every_centroid_is_the_mean_of_its_points(points, k):
    found = kmeans(points, k, seeded(), tol=0.0)
    assert found.converged
    for i in found.cluster.unique():
        mean = points[found.cluster == i].mean(dim=0)
        torch.testing.assert_close(found.centroids[i], mean, atol=1e-4, rtol=1e-4)


@given(points_of)
def test_with_as_many_clusters_as_distinct_points_or_more_nothing_is_left_to_explain(points):
    distinct = len(points.unique(dim=0))
    for k in (distinct, distinct + 3):
        found = kmeans(points, k, seeded())
        assert found.inertia == pytest.approx(0, abs=1e-6)
        assert len(found.cluster.unique()) == distinct
        assert torch.isfinite(found.centroids).all()


@given(st.integers(1, 60), ks, st.integers(0, 10**6))
def test_the_order_of_the_points_does_not_change_the_partition(n, k, seed):
    k, generator = min(k, n), seeded(seed)
    points = torch.randn(n, 3, generator=generator)  # no ties, which rounding would break
    order = torch.randperm(n, generator=generator)
    found, again = (kmeans(p, k, generator, init=points[:k]) for p in (points, points[order]))
    assert torch.equal(found.cluster[order], again.cluster)


@settings(max_examples=20)
@given(st.integers(0, 100), st.randoms(use_true_random=False))
def test_well_separated_groups_are_found_whatever_the_order(seed, random):
    generator = seeded(seed)
    group = torch.randint(6, (60,), generator=generator)
    points = torch.eye(6)[group] * 100 + torch.randn(60, 6, generator=generator)
    order = torch.tensor(random.sample(range(60), 60))
    k = len(group.unique())
    found = kmeans(points[order], k, generator).cluster
    same = group[order][:, None] == group[order]
    assert torch.equal(found[:, None] == found, same)


def test_many_well_separated_groups_each_get_a_seed():
    generator = seeded()
    group = torch.cat([torch.arange(150), torch.randint(150, (1350,), generator=generator)])
    centres = 20 * torch.randn(150, 32, generator=generator)
    points = centres[group] + torch.randn(1500, 32, generator=generator)
    seeds = seed_centroids(points, 150, generator)
    assert len(assign(seeds, centres)[0].unique()) == 150
    assert (slow_distances(seeds, points).min(dim=1).values == 0).all()  # seeds are points


@pytest.mark.parametrize("n, dim, k", [(600, 5, 20), (1000, 32, 30), (900, 20, 12), (2500, 8, 120)])
def test_inertia_is_within_half_a_percent_of_scikit_learn(n, dim, k):
    generator = seeded(n)
    centres = torch.randn(k, dim, generator=generator)
    points = centres[torch.randint(k, (n,), generator=generator)]
    points = points + 0.5 * torch.randn(n, dim, generator=generator)
    ours = min(kmeans(points, k, seeded(i)).inertia for i in range(10))
    theirs = Reference(k, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert ours <= 1.005 * theirs


def test_from_the_same_seeds_lloyd_steps_equal_scikit_learns():
    points = torch.randn(500, 8, generator=seeded())
    ours = kmeans(points, 10, seeded(), init=points[:10], max_iters=7, tol=0.0)
    theirs = Reference(10, init=points[:10].numpy(), n_init=1, max_iter=7, tol=0.0).fit(
        points.numpy())
    torch.testing.assert_close(ours.centroids, torch.from_numpy(theirs.cluster_centers_),
                               atol=1e-5, rtol=1e-4)
    assert np.array_equal(ours.cluster, theirs.labels_)


@given(st.integers(1, 200), st.integers(1, 9), ks, st.integers(0, 10**6))
def test_the_nearest_of_identical_centroids_is_the_first(n, dim, k, seed):
    generator = seeded(seed)
    points, centroids = (torch.randn(m, dim, generator=generator) for m in (n, k))
    cluster = assign(points, centroids)[0]
    assert torch.equal(assign(points, centroids.repeat(3, 1))[0], cluster)
    assert cluster.max() < k


@pytest.mark.parametrize("points", [mixture(6000, 96, 150), torch.randn(6000, 96)],
                         ids=["mixture", "gaussian"])
def test_bf16_products_lose_nothing_in_a_step(points):
    centroids = points[:150]
    for _ in range(3):
        full = assign(points, centroids)[1]
        cluster, half = assign(points, centroids, dtype=torch.bfloat16)
        assert half.sum().item() == pytest.approx(full.sum().item(), rel=1e-5)
        own = (points - centroids[cluster]).square().sum(dim=1)
        torch.testing.assert_close(half, own, rtol=1e-4, atol=1e-6)
        centroids = kmeans(points, 150, seeded(), init=centroids, max_iters=2).centroids


def test_bf16_products_reach_the_inertia_of_float32_ones():
    points = mixture(6000, 96, 150)
    full, half = (kmeans(points, 150, seeded(), init=points[:150], max_iters=8, tol=0.0, dtype=d)
                  for d in (torch.float32, torch.bfloat16))
    assert full.iterations == half.iterations == 8
    assert half.inertia == pytest.approx(full.inertia, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_bound_changes_nothing(dtype):
    points, centroids = torch.randn(300, 7, generator=seeded()), torch.randn(9, 7)
    cluster, distance = assign(points, centroids, dtype=dtype)
    whole = kmeans(points, 9, seeded(), init=centroids, dtype=dtype)
    for max_bytes in (1, 5000):
        again = assign(points, centroids, max_bytes, dtype)
        assert torch.equal(cluster, again[0])
        torch.testing.assert_close(distance, again[1])
        parts = kmeans(points, 9, seeded(), init=centroids, max_bytes=max_bytes, dtype=dtype)
        assert torch.equal(whole.cluster, parts.cluster)
        torch.testing.assert_close(whole.centroids, parts.centroids)


def test_a_memory_mapped_file_gives_the_same_bits(tmp_path):
    points = mixture(3000, 16, 100)
    points.numpy().tofile(tmp_path / "points")
    mapped = np.memmap(tmp_path / "points", dtype=np.float32, shape=(3000, 16))
    one = kmeans(points, 110, seeded())
    two = kmeans(torch.from_numpy(mapped), 110, seeded())
    assert torch.equal(one.centroids, two.centroids) and torch.equal(one.cluster, two.cluster)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.numel() * t.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_table_grows_with_the_number_of_points(dtype):
    points = torch.randn(40_000, 16)
    with Largest() as largest:
        kmeans(points, 100, seeded(), max_iters=2, max_bytes=1 << 17, dtype=dtype)
    assert largest.size <= 8 * 40_000  # an int64 of each point; the points are 2.6 MB


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_points_of_any_float_type_are_read_as_float32(dtype):
    points = torch.randn(400, 4, generator=seeded()).to(dtype)
    found, wanted = kmeans(points, 5, seeded()), kmeans(points.float(), 5, seeded())
    assert found.centroids.dtype == torch.float32
    assert torch.equal(found.centroids, wanted.centroids)
    assert torch.equal(found.cluster, wanted.cluster)


def test_points_far_from_the_origin_keep_float32_distances():
    points = 1000 + torch.randn(400, 4, generator=seeded())
    distances = slow_distances(points, points[:5])
    cluster, distance = assign(points, points[:5])
    assert torch.equal(cluster, distances.argmin(dim=1))
    torch.testing.assert_close(distance.double(), distances.min(dim=1).values, rtol=1e-4, atol=1e-6)


def test_an_empty_cluster_moves_to_the_farthest_point():
    points = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
    init = torch.tensor([[1.0], [1000.0]])
    found = kmeans(points, 2, seeded(), init=init)
    assert found.cluster.tolist() == [0, 0, 0, 1]


def test_the_same_generator_gives_the_same_clusters():
    points = torch.randn(300, 4, generator=seeded())
    one, two, other = (kmeans(points, 20, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.centroids, two.centroids)
    assert not torch.equal(one.centroids, other.centroids)


@pytest.mark.parametrize("points, k, init", [
    (torch.zeros(0, 3), 2, None), (torch.zeros(4, 3), 0, None),
    (torch.zeros(4, 3), 2, torch.zeros(3, 3)),
])
def test_impossible_requests_are_refused(points, k, init):
    with pytest.raises(ValueError):
        kmeans(points, k, seeded(), init=init)


# -------------------------------------------------------------------------------------- batches

clusters_of = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(torch.tensor)


@given(clusters_of, st.integers(1, 9), st.integers(0, 9))
def test_batches_hold_every_example_once_and_are_full(cluster, batch_size, seed):
    batches = cluster_batches(cluster, batch_size, seeded(seed))
    assert sorted(torch.cat(batches).tolist()) == list(range(len(cluster)))
    sizes = sorted(len(batch) for batch in batches)
    assert sizes[1:] == [batch_size] * (len(sizes) - 1) and sizes[0] <= batch_size
    assert len(batches) == -(-len(cluster) // batch_size)


@given(clusters_of, st.integers(1, 9))
def test_each_batch_is_of_one_cluster_but_for_the_ragged_ends(cluster, batch_size):
    batches = cluster_batches(cluster, batch_size, seeded())
    pure = sum(len(batch) == batch_size and len(cluster[batch].unique()) == 1 for batch in batches)
    assert pure >= int((torch.bincount(cluster) // batch_size).sum())
    # leftovers of a cluster stay side by side: at most two mixed batches hold one cluster's
    mixed = [set(cluster[b].tolist()) for b in batches if len(cluster[b].unique()) > 1]
    for i in cluster.unique().tolist():
        assert sum(i in members for members in mixed) <= 2


def test_batches_are_drawn_anew_each_time():
    cluster = torch.arange(64) % 4
    generator = seeded()
    one, two = (cluster_batches(cluster, 8, generator) for _ in range(2))
    assert {frozenset(b.tolist()) for b in one} != {frozenset(b.tolist()) for b in two}
    assert [b.tolist() for b in one] == [b.tolist() for b in cluster_batches(cluster, 8, seeded())]
