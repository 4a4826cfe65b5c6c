"""k-means in plain torch, and the batches that it leads to.

ChameleonLLM groups the requests at hand by k-means on their token embeddings (arXiv 2502.04315).
This is Lloyd's algorithm from greedy k-means++ seeds (Arthur & Vassilvitskii 2007), on any device.
Points are read in chunks, so they may lie in a memory-mapped file; the memory of a step is an
argument. The published code differs: random seeds, always ten steps, and batches that are drawn
once and then stay the same.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class KMeans:
    """What `kmeans` found. Points are at their nearest centroid, as `assign` finds it, converged
    or not."""

    centroids: torch.Tensor  # (K, C) float32
    cluster: torch.Tensor  # (N,) int64, each point's centroid
    inertia: float  # sum of squared distances to it
    iterations: int  # Lloyd steps taken
    converged: bool  # whether it stopped by itself


def assign(points, centroids, max_bytes=1 << 24, dtype=torch.float32):
    """Nearest centroid of each point: points (N, C), centroids (K, C) -> cluster (N,) int64 and
    squared distance (N,) float32. In float32 ties go to the lower index. Chunks of `max_bytes` or
    so are all that is built on the way. `dtype` is the products' type: bfloat16 is faster where the
    hardware has it; too coarse to decide, it names two centroids, and float32 picks one.
    """
    centroids = centroids.float()
    centre = centroids.mean(dim=0)  # near zero, the digits that tell points apart are kept
    centroids = centroids - centre
    score = linear(centroids.to(dtype), (centroids.square().sum(dim=1) / -2).to(dtype))
    cluster = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distance = torch.empty(len(points), dtype=torch.float32, device=points.device)
    size = rows_within(max_bytes, centroids)
    for x, own, far in zip(*(t.split(size) for t in (points, cluster, distance)), strict=True):
        x = x.float() - centre  # (n, C)
        # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x|^2 is the same for every c.
        scores = score(x.to(dtype))  # (n, C) @ (C, K) -> (n, K)
        if dtype == torch.float32:
            best = scores.argmax(dim=1, keepdim=True)  # (n, 1)
        else:
            best = scores.topk(min(2, len(centroids)), dim=1).indices  # (n, 2)
        # Between few centroids, the distance itself is cheap, and free of cancellation.
        exact = F.embedding(best, centroids).sub_(x[:, None]).square_().sum(dim=2)  # (n, 1 or 2)
        far[:], winner = exact.min(dim=1)
        own[:] = best.gather(1, winner[:, None])[:, 0]
    return cluster, distance


def linear(weight, bias):
    """The function x (n, C) -> x weight^T + bias (n, K). On a CPU by oneDNN: MKL, which torch
    prefers for float32, takes 1.6 times as long on some AMD processors."""
    if (weight.device.type, weight.dtype) != ("cpu", torch.float32) or not (
            torch.backends.mkldnn.is_available()):

        def as_asked(x):
            with torch.autocast(weight.device.type, enabled=False):  # it would choose the type
                return F.linear(x, weight, bias)

        return as_asked
    weight, bias = weight.to_mkldnn(), bias.to_mkldnn()
    return lambda x: F.linear(x.to_mkldnn(), weight, bias).to_dense()


def product_type(device, default=torch.float32):
    """What products are made in: autocast's type if it is on, else `default`."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else default


def rows_within(max_bytes, centroids):
    """How many points to take at a time: scores (n, K) and up to four times (n, C) of float32."""
    K, C = centroids.shape
    return max(1, max_bytes // (4 * (K + 4 * C)))


def seed_centroids(points, k, generator, max_bytes=1 << 24):
    """Greedy k-means++: each new seed is the best of a few points, drawn by squared distance.

    points (N, C) -> (k, C) float32. The few are 2 + 4 ln k; scikit-learn's 2 + ln k more often
    leaves one of many well-separated groups without a seed. To compare them to all points costs
    as much as many Lloyd steps, so a large k first cuts the space into 4 sqrt(k) cells. Each cell
    keeps its best candidate ready, judged by its own points; the best of all becomes a seed, and
    only its cell draws again. At most 32 points per seed are looked at. Under autocast products
    are of its type: a seed need not be the very best.
    """
    device, trials = points.device, 2 + int(4 * math.log(k))
    order = torch.randperm(len(points), generator=generator, device=generator.device)
    order = order[: 32 * k].to(device)
    cells = [order]
    if k >= 100:
        few = int(4 * math.sqrt(k))
        coarse = kmeans(points[order[: 64 * few]], few, generator, 5, max_bytes=max_bytes).centroids
        cell = assign(points, coarse, max_bytes)[0][order]
        cells = [order[cell == i] for i in cell.unique()]

    def propose(rows, nearest):
        """Best of the candidates in a cell: what it gains, its index, `nearest` (n,) after it."""
        x = points[rows].float()
        x = x - x.mean(dim=0)  # (n, C)
        squared = x.square().sum(dim=1)  # (n,)
        weights = nearest.to(wide(device)).cumsum(dim=0)  # (n,)
        drawn = torch.rand(trials, generator=generator, device=generator.device).to(weights)
        drawn = torch.searchsorted(weights, drawn * weights[-1])
        drawn = drawn.clamp(max=len(x) - 1)  # all weights are 0 once every point is a seed
        # (trials, C) @ (C, n) -> squared distances (trials, n)
        distance = torch.addmm(squared, x[drawn], x.T, alpha=-2).add_(squared[drawn, None])
        distance = torch.minimum(distance.clamp_(min=0), nearest)
        left, best = distance.sum(dim=1).min(dim=0)
        nearest = distance[best].clone()
        nearest[drawn[best]] = 0  # exactly: rounding must not let a seed be drawn again
        return (weights[-1] - left).item(), rows[drawn[best]], nearest

    # Without a seed, every point is as good as infinitely far: each cell gets one seed first.
    ready = [propose(rows, torch.full(rows.shape, 1e30, device=device)) for rows in cells]
    chosen = []
    for _ in range(k):
        best = max(range(len(cells)), key=lambda i: ready[i][0])
        _, seed, nearest = ready[best]
        chosen.append(seed)
        ready[best] = propose(cells[best], nearest)
    return points[torch.stack(chosen)].float()


def wide(device):
    """The type for long sums: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def kmeans(points, k, generator, max_iters=100, tol=1e-4, init=None, max_bytes=1 << 24,
           dtype=torch.float32):
    """Partition `points` (N, C) of any float type into at most k clusters; returns a `KMeans`.

    Stops when the points no longer move, when a step lowers the inertia by less than `tol` of
    itself, or after `max_iters` steps. `init` (k, C) replaces the seeding. A centroid that loses
    all its points moves to the point that is farthest from its own; if there are fewer distinct
    points than k, some clusters stay empty. `max_bytes` and `dtype` are those of `assign`.
    Raises ValueError for no points, k < 1 or an `init` of another shape.
    """
    if len(points) == 0 or k < 1:
        raise ValueError(f"cannot make {k} clusters of {len(points)} points")
    if init is None:
        centroids = seed_centroids(points, k, generator, max_bytes)
    elif init.shape != (k, points.shape[1]):
        raise ValueError(f"init has shape {tuple(init.shape)}, not {(k, points.shape[1])}")
    else:
        centroids = init.float()
    cluster, distance = assign(points, centroids, max_bytes, dtype)
    inertia, iterations, converged = distance.sum(dtype=wide(points.device)).item(), 0, False
    while iterations < max_iters and not converged:
        iterations += 1
        centroids = means(points, cluster, centroids, distance, max_bytes)
        before, previous = cluster, inertia
        cluster, distance = assign(points, centroids, max_bytes, dtype)
        inertia = distance.sum(dtype=wide(points.device))
        moved = (cluster != before).sum().to(inertia)
        inertia, moved = torch.stack([inertia, moved]).tolist()  # the step's only wait for a GPU
        converged = moved == 0 or previous - inertia <= tol * previous
    return KMeans(centroids, cluster, inertia, iterations, converged)


def means(points, cluster, centroids, distance, max_bytes):
    """Mean (K, C) of each cluster's points; empty clusters go to the farthest points (N,)."""
    centre = centroids.mean(dim=0)
    total, count = torch.zeros_like(centroids), cluster.new_zeros(len(centroids), 1)
    size = rows_within(max_bytes, centroids)
    for x, own in zip(points.split(size), cluster.split(size), strict=True):
        total.index_add_(0, own, x.float() - centre)  # (n, C) -> (K, C)
        count.index_add_(0, own, torch.ones_like(own)[:, None])  # (n, 1) -> (K, 1)
    # The first empty cluster gets the farthest point, and so on. Every cluster looks one up:
    # to ask how many are empty would keep a GPU waiting.
    farthest = distance.topk(min(len(centroids), len(points))).indices
    rank = (count[:, 0] == 0).cumsum(dim=0) - 1  # (K,)
    spare = points[farthest[rank.clamp(0, len(farthest) - 1)]].float()  # (K, C)
    return torch.where(count == 0, spare, centre + total / count.clamp(min=1))


def cluster_batches(cluster, batch_size, generator):
    """One epoch of batches: a list of ceil(N / batch_size) index tensors, freshly drawn.

    cluster: (N,). Every example comes exactly once. A batch is filled from one cluster while the
    cluster lasts; what is left over at the clusters' ends is packed together, whole clusters side
    by side, so that only one batch of the epoch is short. With all examples in one cluster these
    are plain shuffled batches.
    """
    N = len(cluster)
    shuffled = torch.randperm(N, generator=generator)
    # Clusters come in random order, so that leftovers meet by chance.
    place = torch.randperm(int(cluster.max()) + 1, generator=generator).argsort()  # (K,)
    order = shuffled[place[cluster[shuffled]].argsort(stable=True)]  # grouped by cluster
    _, own, size = cluster[order].unique_consecutive(return_inverse=True, return_counts=True)
    rank = torch.arange(N) - (size.cumsum(0) - size)[own]  # (N,) position within its own cluster
    full = rank < (size // batch_size * batch_size)[own]
    batches = [*order[full].split(batch_size), *order[~full].split(batch_size)]
    batches = [batch for batch in batches if len(batch)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
