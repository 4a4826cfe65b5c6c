"""k-means in plain torch, and the batches that it leads to.

ChameleonLLM groups the requests at hand by k-means on their token embeddings (arXiv 2502.04315).
This is Lloyd's algorithm from greedy k-means++ seeds (Arthur & Vassilvitskii 2007), on any device;
it never builds an N x K table, the memory of a step is an argument. The published code differs:
random seeds, always ten steps, and batches that are drawn once and then stay the same.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class KMeans:
    """What `kmeans` found. Every point is at its nearest centroid, converged or not."""

    centroids: torch.Tensor  # (K, C) float32
    cluster: torch.Tensor  # (N,) int64, each point's centroid
    inertia: float  # sum of squared distances to it
    iterations: int  # Lloyd steps taken
    converged: bool  # whether it stopped by itself


def assign(points, centroids, max_bytes=1 << 26):
    """Nearest centroid of each point: points (N, C), centroids (K, C) -> cluster (N,) int64 and
    squared distance (N,) float32. Ties go to the lower index. The distances being compared never
    take more than `max_bytes`.
    """
    centroids = centroids.float()
    centre = centroids.mean(dim=0)  # near zero, float32 keeps the digits that tell points apart
    centroids = centroids - centre
    squared = centroids.square().sum(dim=1)  # (K,)
    cluster = torch.empty(len(points), dtype=torch.int64, device=points.device)
    distance = torch.empty(len(points), dtype=torch.float32, device=points.device)
    chunk = max(1, max_bytes // (4 * (len(centroids) + 2 * points.shape[1])))
    for start in range(0, len(points), chunk):
        rows = slice(start, start + chunk)
        x = points[rows].float() - centre  # (n, C)
        # |x - c|^2 = |x|^2 - 2 x c + |c|^2, and |x|^2 is the same for every c.
        nearest = torch.addmm(squared, x, centroids.T, alpha=-2).argmin(dim=1)  # (n, K) -> (n,)
        cluster[rows] = nearest
        # Once the centroid is known, the distance itself is computed without cancellation.
        distance[rows] = (x - centroids[nearest]).square().sum(dim=1)
    return cluster, distance


def seed_centroids(points, k, generator):
    """Greedy k-means++: each new seed is the best of a few points, drawn by squared distance.

    points (N, C) -> (k, C). The few are 2 + 4 ln k; scikit-learn's 2 + ln k more often leaves one
    of many well-separated groups without a seed.
    """
    N = len(points)
    trials = 2 + int(4 * math.log(k))
    wide = torch.float32 if points.device.type == "mps" else torch.float64  # MPS has no float64
    first = torch.randint(N, (1,), generator=generator, device=generator.device).to(points.device)
    chosen = [first]
    nearest = (points - points[first]).square().sum(dim=1)  # (N,) distance to the closest seed
    squared = points.square().sum(dim=1)  # (N,)
    for _ in range(k - 1):
        weights = nearest.to(wide).cumsum(dim=0)  # (N,)
        drawn = torch.rand(trials, generator=generator, device=generator.device)
        drawn = drawn.to(points.device).to(wide) * weights[-1]
        candidates = torch.searchsorted(weights, drawn)
        candidates = candidates.clamp(max=N - 1)  # all weights are 0 once every point is a seed
        # (N, C) @ (C, trials) -> squared distances (N, trials)
        distance = squared[:, None] + squared[candidates] - 2 * points @ points[candidates].T
        distance = torch.minimum(distance.clamp_(min=0), nearest[:, None])
        best = distance.sum(dim=0).argmin()
        nearest = distance[:, best].clone()
        nearest[candidates[best]] = 0  # exactly: rounding must not let a seed be drawn again
        chosen.append(candidates[best, None])
    return points[torch.cat(chosen)]


def kmeans(points, k, generator, max_iters=100, tol=1e-4, init=None, max_bytes=1 << 26):
    """Partition `points` (N, C) of any float type into at most k clusters; returns a `KMeans`.

    Stops when the points no longer move, when a step lowers the inertia by less than `tol` of
    itself, or after `max_iters` steps. `init` (k, C) replaces the seeding. A centroid that loses
    all its points moves to the point that is farthest from its own; if there are fewer distinct
    points than k, some clusters stay empty. Raises ValueError for no points, k < 1 or an `init`
    of another shape.
    """
    if len(points) == 0 or k < 1:
        raise ValueError(f"cannot make {k} clusters of {len(points)} points")
    x = points.float()
    centre = x.mean(dim=0)
    x = x - centre
    if init is None:
        centroids = seed_centroids(x, k, generator)
    elif init.shape != (k, x.shape[1]):
        raise ValueError(f"init has shape {tuple(init.shape)}, not {(k, x.shape[1])}")
    else:
        centroids = init.float() - centre
    cluster, distance = assign(x, centroids, max_bytes)
    inertia, iterations, converged = distance.cpu().double().sum().item(), 0, False
    while iterations < max_iters and not converged:
        iterations += 1
        centroids = means(x, cluster, centroids, distance)
        before, previous = cluster, inertia
        cluster, distance = assign(x, centroids, max_bytes)
        inertia = distance.cpu().double().sum().item()
        converged = torch.equal(cluster, before) or previous - inertia <= tol * previous
    return KMeans(centroids + centre, cluster, inertia, iterations, converged)


def means(points, cluster, centroids, distance):
    """Mean (K, C) of each cluster's points; empty clusters go to the farthest points (N,)."""
    count = torch.bincount(cluster, minlength=len(centroids))  # (K,)
    total = torch.zeros_like(centroids).index_add_(0, cluster, points)  # (K, C)
    new = total / count.clamp(min=1)[:, None]
    empty = (count == 0).nonzero()[:, 0]
    farthest = distance.topk(min(len(empty), len(points))).indices
    new[empty] = centroids[empty]
    new[empty[: len(farthest)]] = points[farthest]
    return new


def cluster_batches(cluster, batch_size, generator):
    """One epoch of batches: a list of ceil(N / batch_size) index tensors, freshly drawn.

    cluster: (N,). Every example comes exactly once. A batch is filled from one cluster while the
    cluster lasts; what is left over at the clusters' ends is packed together, whole clusters side
    by side, so that only the epoch's last batch is short. With all examples in one cluster these
    are plain shuffled batches.
    """
    N = len(cluster)
    count = torch.bincount(cluster)  # (K,)
    shuffled = torch.randperm(N, generator=generator)
    place = torch.empty_like(count)  # clusters in random order, so that leftovers meet by chance
    place[torch.randperm(len(count), generator=generator)] = torch.arange(len(count))
    order = shuffled[place[cluster[shuffled]].argsort(stable=True)]  # grouped by cluster
    ordered = cluster[order]
    size = torch.zeros_like(count)
    size[place] = count
    start = size.cumsum(0) - size  # where each cluster begins in `order`, by place
    rank = torch.arange(N) - start[place[ordered]]  # (N,) position within its own cluster
    full = rank < count[ordered] // batch_size * batch_size
    batches = [*order[full].split(batch_size), *order[~full].split(batch_size)]
    batches = [batch for batch in batches if len(batch)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
