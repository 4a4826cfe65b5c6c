"""The method: statistics of a cluster in, a low-rank update of the LM head out.

ChameleonLLM (Yuksel & Sawaf 2025, arXiv 2502.04315; published code, class LoRALinearHyper): the
requests of a cluster are summed up by a mean of their token embeddings, and a small network turns
that mean into the factors of a LoRA update of the LM head, made for this cluster and then thrown
away.

    tokens (N, P) -> statistics (K, C) -> A (K, r, C), B (K, V, r) -> logits W h + scale B A h

Departures from the published code: the mean is taken over prompt tokens only, never over tokens
that are to be predicted; it weighs every token alike, not every request; statistics are
standardised, which the network's dropout of 0.5 gives way to; and the network starts as plain
LoRA, A random and B zero whatever the statistic, so that the first logits are the frozen head's.
"""

import tempfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.cluster import assign, kmeans
from lab.model import LMHead, Update, lora_factors


def batch_statistics(mean, count, cluster):
    """Mean embedding (K, C) of each cluster's tokens, from each request's (B, C) and its length.

    count (B,); cluster (B,) from 0 to K - 1. Every token weighs alike, in a long request as in a
    short one. A cluster without a token gets zeros.
    """
    K = int(cluster.max()) + 1
    total = mean.new_zeros(K, mean.shape[1]).index_add_(0, cluster, mean * count[:, None])  # (K, C)
    return total / count.new_zeros(K).index_add_(0, cluster, count).clamp(min=1)[:, None]


class HyperNetwork(nn.Module):
    """C -> 64 -> 32 -> n_out with two ReLUs, as in the published code.

    64 C + 64 + 64 * 32 + 32 + 33 n_out parameters: the output layer is nearly all of them. Its
    weights, which make the output depend on the statistic, start at zero and learn from the second
    step on; its bias is `start` (n_out,), so that is what an untrained network writes.
    """

    def __init__(self, n_in, start):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_in, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, len(start)),
        )
        nn.init.zeros_(self.layers[-1].weight)
        self.layers[-1].bias.data.copy_(start)

    def forward(self, statistics):
        return self.layers(statistics)  # (K, C) -> (K, n_out)


class ClusteredHead(LMHead):
    """A head that is told the mean embedding of the cluster that a request is in.

    `center` and `spread` (C,) standardise the statistic and `centroids` (K, C) are the training
    clusters; all three are measured on the training prompts and kept with the weights.
    """

    needs_statistics = clustered_batches = stores_clusters = True

    def __init__(self, weight, n_clusters=1, scope="prompt"):
        super().__init__(weight)
        C, self.scope = weight.shape[1], scope
        for name, shape in (("center", (C,)), ("spread", (C,)), ("centroids", (n_clusters, C))):
            self.register_buffer(name, torch.zeros(shape, device=weight.device))

    def read(self, examples, embedding):
        return Prompts(examples, embedding, self.scope)

    def fit_clusters(self, prompts, k, generator):
        """Cluster (N,) of the training prompts; keeps what inference needs."""
        self.center.copy_(prompts.mean.mean(dim=0))
        self.spread.copy_(prompts.mean.std(dim=0, correction=0))
        self.centroids.copy_(self.kmeans(prompts, k, generator).centroids)
        return self.nearest(prompts)

    def features(self, prompts):
        """What k-means clusters: mean embeddings, less the corpus's, on the unit sphere (N, C)."""
        features, center = table(*prompts.mean.shape), self.center.cpu()
        for rows in torch.arange(len(features)).split(1 << 14):
            features[rows] = F.normalize(prompts.mean[rows] - center, dim=1)
        return features.to(self.weight.device)

    def kmeans(self, prompts, k, generator):
        return kmeans(self.features(prompts), k, generator, dtype=product_type(self.weight.device))

    def nearest(self, prompts):
        """Nearest training centroid (N,) of each prompt; for training prompts, their cluster."""
        return assign(self.features(prompts), self.centroids)[0].cpu()

    def group(self, prompts, k=None, generator=None):
        """Cluster (N,) of new requests.

        With k, by k-means on the requests at hand (the paper's inference-time clusters); without,
        by the nearest training centroid, which also serves a single request. Either way a
        cluster's statistic is that of the requests in it.
        """
        if k is None:
            return self.nearest(prompts)
        return self.kmeans(prompts, k, generator).cluster.cpu()

    def assigned(self, prompts):
        """Nearest training cluster (N,), and its statistic (N, C), whoever else is asking.

        A centroid has lost how far from `center` its prompts lay: it is put back at the distance
        that training prompts have on average (root mean square).
        """
        cluster = self.nearest(prompts)
        return cluster, self.center + self.spread.norm() * self.centroids[cluster]

    def told(self, prompts, index, which, members, group):
        """The rows `index` to read, and what `losses` is told of them: statistics (K, C), cluster
        (B,). which (B,) names each row's cluster, group (M,) that of each of the `members` (M,).
        """
        if not len(members):
            return index, self.center.cpu().repeat(int(which.max()) + 1, 1), which
        return index, batch_statistics(prompts.mean[members], prompts.count[members], group), which

    def standardised(self, statistics):
        deviation = (statistics - self.center) / self.spread.clamp(min=1e-6)  # (K, C)
        return deviation.where(self.spread > 1e-6, 0)  # what never varied in training says nothing


class ChameleonHead(ClusteredHead):
    """logits = W h + (alpha / rank) U(s) A(s) h, where s is the statistic of h's cluster.

    form "full" (the paper's): U = B (V, r) is written out by the network, whose output layer has
        33 r (C + V) parameters. With C = 768, V = 50,257 and r = 4 the network has 6,786,596, 33
        times the 204,100 of LoRA on the head.
    form "light": U = W P with P (C, r) written by the network, 33 r (2 C) parameters in its
        output layer, whatever the vocabulary: 254,048 in all at the same sizes. It can
        only move h within the space that W reads, W (h + scale P A h).
    """

    controls = ("own prompt only", "shuffled", "constant", "other articles")

    def __init__(self, weight, rank, alpha, form="full", n_clusters=1, scope="prompt"):
        super().__init__(weight, n_clusters, scope)
        V, C = weight.shape
        if form not in ("full", "light"):
            raise ValueError(f"form must be full or light, not {form}")
        self.rank, self.scale, self.form = rank, alpha / rank, form
        self.n_out = V if form == "full" else C  # rows of the second factor
        A, _ = lora_factors(C, self.n_out, rank)
        start = torch.cat([A.detach().flatten(), torch.zeros(rank * self.n_out)])
        self.hypernetwork = HyperNetwork(C, start).to(weight.device)

    def updates(self, statistics):
        K, C = statistics.shape
        out = self.hypernetwork(self.standardised(statistics))  # (K, C) -> (K, r C + r V)
        A, B = out.split([self.rank * C, self.rank * self.n_out], dim=1)
        A, B = A.view(K, self.rank, C), B.view(K, self.n_out, self.rank)  # (K, r C), (K, V r)
        if self.form == "light":
            B = self.weight @ B.to(self.weight.dtype)  # (V, C) @ (K, C, r) -> (K, V, r)
        return [Update(self.scale * A, B)]


class Prompts:
    """What clustering and statistics see of N examples: each one's mean embedding and length.

    mean (N, C) and count (N,), on the CPU, of the tokens in `scope`: "prompt", or "full" (it
    leaks; see `Examples.prompts`). Summed up once: drawing a batch anew costs no embedding look-up.
    """

    @torch.no_grad()
    def __init__(self, examples, embedding, scope="prompt"):
        weight = embedding.weight.detach()
        self.mean = table(len(examples), weight.shape[1])
        self.count = torch.empty(len(examples))
        for rows in torch.arange(len(examples)).split(1024):
            tokens, mask = examples.prompts(rows, scope)
            self.count[rows] = mask.sum(dim=1).float()
            # Sums of embeddings, without a (B, P, C) of them: (B, P) -> (B, C).
            total = F.embedding_bag(
                tokens.to(weight.device), weight, mode="sum",
                per_sample_weights=mask.to(weight.device, weight.dtype))
            self.mean[rows] = total.float().cpu() / self.count[rows, None]


def product_type(device, default=torch.float32):
    """What products are made in: autocast's type if it is on, else `default`."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else default


def table(n_rows, n_columns):
    """Empty float32 (N, C); past 1 GiB in a temporary file, which need not fit into memory."""
    if 4 * n_rows * n_columns <= 1 << 30:
        return torch.empty(n_rows, n_columns)
    with tempfile.TemporaryFile() as file:  # it lives as long as it is mapped
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(n_rows, n_columns)))
