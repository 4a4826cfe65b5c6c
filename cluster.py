"""k-means in plain torch, and the batches that it leads to.

ChameleonLLM groups the requests at hand by k-means on their token embeddings (arXiv 2502.04315).
This is Lloyd's algorithm (1982) from k-means++ seeds (Arthur & Vassilvitskii 2007), on any device.
Points are read in chunks, so that a table of N x K distances never exists. Departures from the
published code: seeds are not just random points, the steps end when they gain next to nothing, and
batches are drawn anew in each epoch.
"""

import torch

CHUNK = 1 << 22  # numbers in a chunk's table of distances: 16 MB
SKETCH = 64  # numbers that a point keeps while seeds are chosen


def nearest(points, centroids):
    """Nearest centroid of each point: points (N, C), centroids (K, C) -> cluster (N,), int64, and
    squared distance (N,). Ties go to the lower index.
    """
    # Near zero, the digits that tell points apart are kept; one far point does not move a median.
    center = points[::len(points) // 1024 + 1].median(dim=0).values
    centroids = centroids - center
    half = centroids.square().sum(dim=1) / 2  # (K,)
    cluster, distance = [], []
    for x in points.split(max(1, CHUNK // len(centroids))):
        x = x - center  # (n, C)
        # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x|^2 is the same for every c.
        best = torch.addmm(-half, x, centroids.T).argmax(dim=1)  # (n, C) @ (C, K) -> (n, K) -> (n,)
        cluster.append(best)  # (n,)
        distance.append((x - centroids[best]).square().sum(dim=1))  # (n,)
    return torch.cat(cluster), torch.cat(distance)


def seeds(points, k, generator):
    """k-means++: each seed is a point drawn with the square of its distance to the seeds before it.

    points (N, C) -> indices (k,). Every seed costs a look at all points, so they are looked at in
    a sketch: a random projection to a few numbers, which keeps squared distances in proportion
    (Johnson & Lindenstrauss 1984). Rough ones are enough to draw by.
    """
    N, C = points.shape
    if C > SKETCH:
        points = points @ torch.randn(C, SKETCH, generator=generator).to(points.device)
        # (N, C) @ (C, 64) -> (N, 64)
    points = points - points.median(dim=0).values  # as in `nearest`
    square = points.square().sum(dim=1)  # (N,)
    weight = torch.ones_like(square)  # the first is any point
    distance = torch.full_like(square, torch.inf)  # (N,), squared, to the nearest seed so far
    chosen = []
    for _ in range(k):
        total = weight.cumsum(dim=0, dtype=torch.float32 if weight.is_mps else torch.float64)
        drawn = torch.rand((), generator=generator).to(total) * total[-1]
        seed = torch.searchsorted(total, drawn, right=True).clamp(max=N - 1)
        chosen.append(seed)
        to_seed = square - 2 * (points @ points[seed]) + square[seed]  # (N, C) @ (C,) -> (N,)
        distance = torch.minimum(distance, to_seed.clamp(min=0))
        distance[seed] = 0  # exactly: rounding must not have it drawn again
        weight = distance if distance.any() else torch.ones_like(distance)  # all points are seeds
    return torch.stack(chosen)


def means(points, cluster, k):
    """Mean (k, C) of each cluster's points (N, C), zeros for none, and their number (k,)."""
    total = points.new_zeros(k, points.shape[1]).index_add_(0, cluster, points)  # (N, C) -> (k, C)
    count = cluster.bincount(minlength=k)  # (k,)
    return total / count.clamp(min=1)[:, None], count


def kmeans(points, k, generator, max_steps=100, tolerance=1e-4):
    """Partition points (N, C) into at most k clusters: centroids (k, C) and cluster (N,), int64.

    `generator`, a CPU's, draws the seeds. Each step moves every centroid to the mean of its points
    and every point to its nearest centroid. It ends when the sum of squared distances falls by no
    more than `tolerance` of itself. A centroid that has lost all its points moves to the point that
    is farthest from its own; with fewer distinct points than k, some clusters stay empty.
    Raises ValueError for no points, k < 1, or a point that is not finite.
    """
    if len(points) == 0 or k < 1:
        raise ValueError(f"cannot make {k} clusters of {len(points)} points")
    if not points.isfinite().all():
        raise ValueError("k-means met a point that is not finite (NaN or infinity)")
    points = points.float()
    centroids = points[seeds(points, k, generator)]
    cluster, distance = nearest(points, centroids)
    for _ in range(max_steps):
        before = distance.sum().item()
        centroids, count = means(points, cluster, k)
        empty = (count == 0).nonzero()[:, 0]
        farthest = distance.topk(min(len(empty), len(points))).indices
        centroids[empty[:len(farthest)]] = points[farthest]
        cluster, distance = nearest(points, centroids)
        if before - distance.sum().item() <= tolerance * before:
            break
    return centroids, cluster


def cluster_batches(cluster, batch_size, generator):
    """The paper's batches, each of one cluster: a list of index tensors, one epoch, freshly drawn.

    cluster: (N,). Every row comes exactly once. What does not fill a batch at the end of a cluster
    is packed with other leftovers: where clusters are smaller than a batch, most batches are mixed.
    """
    order = torch.randperm(len(cluster), generator=generator)
    parts = []
    for k in cluster.unique():
        parts += order[cluster[order] == k].split(batch_size)
    parts = [parts[i] for i in torch.randperm(len(parts), generator=generator)]
    full = [part for part in parts if len(part) == batch_size]
    rest = [part for part in parts if len(part) < batch_size]
    batches = full + list(torch.cat(rest).split(batch_size) if rest else ())
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def shuffled_batches(length, batch_size, generator, pool=32):
    """Batches of any rows: a list of index tensors, one epoch, freshly drawn; length (N,), tokens.

    Within a pool of so many batches, rows of like length come together: little padding is needed.
    """
    order = torch.randperm(len(length), generator=generator)
    order = torch.cat([part[length[part].argsort(stable=True)]
                       for part in order.split(pool * batch_size)])
    batches = order.split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
