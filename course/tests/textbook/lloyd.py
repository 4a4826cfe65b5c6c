"""k-means as Lloyd wrote it, k-means++ seeds, and batches: plain loops."""

import random

import torch


def table(points, centres):
    """Squared distances, a row a point."""
    return torch.stack([((points - c) ** 2).sum(1) for c in centres], dim=1)


def assign(points, centres):
    distances = table(points, centres)
    best = distances.min(dim=1).values
    first = (distances == best[:, None]).int().argmax(dim=1)
    return first, best


def centre_of_each(points, labels, k):
    centres, sizes = torch.zeros(k, points.shape[1], dtype=points.dtype), []
    for j in range(k):
        mine = points[labels == j]
        sizes.append(len(mine))
        if len(mine) > 0:
            centres[j] = mine.mean(dim=0)
    return centres, torch.tensor(sizes)


def cluster(points, start):
    """Alternate until no point changes its cluster."""
    if points.shape[0] < 1 or torch.isnan(points).any() or torch.isinf(points).any():
        raise ValueError("finite points are needed")
    k, centres = len(start), points[start].clone()
    labels, distance = assign(points, centres)
    for _ in range(200):
        centres, sizes = centre_of_each(points, labels, k)
        lonely = [j for j in range(k) if sizes[j] == 0]
        far = torch.sort(distance, descending=True).indices
        for j, i in zip(lonely, far, strict=False):
            centres[j] = points[i]
        new, distance = assign(points, centres)
        if torch.equal(new, labels):
            break
        labels = new
    return centres, new


def plus_plus(points, k, seed):
    draw = random.Random(seed)
    chosen = [draw.randrange(len(points))]
    while len(chosen) < k:
        nearest = table(points, points[chosen]).min(dim=1).values.tolist()
        if sum(nearest) > 0:
            chosen += draw.choices(range(len(points)), weights=nearest)
        else:
            chosen.append(draw.randrange(len(points)))
    return torch.tensor(chosen)


def batches_of_clusters(labels, size, seed):
    draw, groups = random.Random(seed), {}
    rows = list(range(len(labels)))
    draw.shuffle(rows)
    for row in rows:
        groups.setdefault(int(labels[row]), []).append(row)
    batches, rest = [], []
    for group in groups.values():
        while len(group) >= size:
            batches.append(group[:size])
            group = group[size:]
        rest += group
    batches += [rest[i:i + size] for i in range(0, len(rest), size)]
    draw.shuffle(batches)
    return [torch.tensor(b) for b in batches]


def batches_by_length(lengths, size, seed):
    draw = random.Random(seed)
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    rows.sort(key=lambda row: int(lengths[row]))
    batches = [torch.tensor(rows[i:i + size]) for i in range(0, len(rows), size)]
    draw.shuffle(batches)
    return batches
